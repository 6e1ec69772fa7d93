"""Align by the Python API and take the adapter home: `python examples/align_and_export.py --steps 20 --out adapter`.

What is exported is a stock LoRA: diffusers loads it without visalign.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

import visalign
from visalign import build, registry


def main(words: Sequence[str] | None = None) -> Path:
    """Train an adapter, export it, and draw with it in the stock pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="toybox")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--run", default="runs/adapter")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    given, overrides = parser.parse_known_args(words)
    adapter = ["policy.lora={rank: 16, alpha: 32}", "policy.train=[]", "optimizer.lr=3e-4", "eval.scan=[]"]
    run = visalign.align(given.recipe, [f"run.path={given.run}", f"run.steps={given.steps}", *adapter, *overrides])
    policy = visalign.load(run)
    print(f"{build.export(policy, given.out)} of {run} → {given.out}")
    pipeline = DiffusionPipeline.from_pretrained(registry.resolve_model(policy.name))
    pipeline.load_lora_weights(given.out)
    pipeline("a red circle", num_inference_steps=4, height=32, width=32, max_sequence_length=10).images[0].save(given.out / "picture.png")
    return given.out


if __name__ == "__main__":
    main()
