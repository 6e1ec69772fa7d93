"""Train the toybox's model by a reward of your own: `python examples/own_reward.py --steps 20`.

A reward is a class with a `spec` and a `score`; a recipe names it `module:Class`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import visalign


class Warmth(visalign.Reward):
    """How much more red than blue a picture is, -1 to 1."""

    spec = visalign.RewardSpec("warmth", differentiable=True, range=(-1.0, 1.0))

    def score(self, batch: visalign.RewardInput) -> visalign.RewardOutput:
        red, _, blue = batch.images.mean((2, 3)).unbind(1)
        return visalign.RewardOutput.of(red - blue)


def main(words: Sequence[str] | None = None) -> Path:
    """Train, and say where the run is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="toybox")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/own_reward")
    given, overrides = parser.parse_known_args(words)
    warmth = f"{{warmth: {{use: '{Path(__file__).stem}:Warmth'}}}}"
    ours = [f"run.path={given.out}", f"run.steps={given.steps}", f"rewards={warmth}", f"eval.rewards={warmth}", "eval.scan=[]"]
    run = visalign.align(given.recipe, [*ours, *overrides])
    print(f"before and after: {run / 'report.html'}")
    return run


if __name__ == "__main__":
    main()
