"""Which of two runs is better, and is the difference more than chance? `python examples/compare_runs.py runs/a runs/b --reward toybox`.

Both draw the same prompts from the same noise, so that pictures are compared in pairs. "toybox", or any model, may stand in a run's place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import visalign
from visalign import prompts


def main(words: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print a line for each judge; name -> mean difference and its standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--reward", action="append", required=True, help="a judge, best one that neither was trained by")
    parser.add_argument("--prompts", default="toybox/prompts_test.jsonl")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(words)
    listed = prompts.load(given.prompts)
    drawn = listed.evaluation(given.images)
    judges = dict.fromkeys(given.reward, 1.0)
    ends = [
        visalign.sample(visalign.load(source), drawn, reward=judges, steps=given.steps).scores for source in (given.first, given.second)
    ]
    found: dict[str, tuple[float, float]] = {}
    for name in given.reward:
        gap = ends[1][name] - ends[0][name]
        gap = gap[gap.isfinite()]
        mean, error = gap.mean().item(), (gap.std() / len(gap) ** 0.5).item()
        found[name] = mean, error
        old, new = (scores[name].nanmean() for scores in ends)
        print(f"{name:<20} {old:.4f} → {new:.4f}  difference {mean:+.4f} ± {error:.4f} (standard error)")
    return found


if __name__ == "__main__":
    main()
