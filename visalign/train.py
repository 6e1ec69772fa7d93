"""Train by a recipe: `accelerate launch visalign/train.py [CONFIG] [key.sub=value …]`, the same as `visalign train …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# As a script, this folder would come first on the module path and its files would hide others of the same name.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]

from visalign import build, cli, config, summary  # noqa: E402


def main(words: Sequence[str]) -> int:
    """Load, build, fit; the exit code."""
    recipe, overrides = cli.split(words)
    trainer = build.loop(config.load(recipe, overrides))
    folder = trainer.fit()
    if trainer.processes.main:
        print(summary.text(folder))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
