"""Better pictures from a stock diffusers pipeline, without training: `python examples/guide_pipeline.py "two red circles" --nfe 400`.

The pipeline is yours, loaded as always; a reward chooses among what it could draw, within a budget of network evaluations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

import visalign
from visalign import pictures, registry


def main(words: Sequence[str] | None = None) -> Path:
    """Draw plain and guided from the same seed, and save both side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="toybox", help="a pipeline's folder or hub id (default: the toybox's)")
    parser.add_argument("--reward", default="clip_score")
    parser.add_argument("--method", default="best_of_n", help="see `visalign list steering`")
    parser.add_argument("--nfe", type=int, default=80, help="network evaluations a picture")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("guided.png"))
    given = parser.parse_args(words)
    pipeline = DiffusionPipeline.from_pretrained(registry.resolve_model(given.model))
    reward = visalign.load_reward(given.reward, checkpoint="toybox") if given.model == "toybox" else given.reward
    common = {"reward": reward, "steps": given.steps, "seed": 0}
    plain = visalign.sample(pipeline, given.prompt, **common)
    guided = visalign.sample(pipeline, given.prompt, method=given.method, budget={"nfe": given.nfe}, **common)
    for name, found in (("plain", plain), (given.method, guided)):
        print(f"{name:<20} reward {found.scores['total'][0]:.4f}  {found.nfe:g} evaluations  {found.seconds:.1f} s")
    pictures.before_after(plain.images, guided.images, [given.prompt]).save(given.out)
    return given.out


if __name__ == "__main__":
    main()
