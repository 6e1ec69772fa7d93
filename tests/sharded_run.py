"""What each process of a sharded run does: four steps at once, and two and two, by a recipe in a file."""

from __future__ import annotations

import sys
from pathlib import Path

from visalign import build, config


def main(recipe: str) -> None:
    folder = Path(recipe).parent
    for name, steps in (("once", 4), ("twice", 2), ("twice", 4)):
        trainer = build.trainer(config.load(recipe, {"run.path": str(folder / name), "run.steps": steps}))
        assert trainer.processes.sharded
        trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1])
