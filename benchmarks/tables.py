"""`python -m benchmarks.tables`: write the README's tables of what exists, from the folders themselves (`--check` only compares)."""

from __future__ import annotations

import sys
from pathlib import Path

from visalign import config, registry, sources

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- tables:begin (python -m benchmarks.tables writes what stands between these marks) -->", "<!-- tables:end -->"


def tables() -> str:
    """A table per plug-in folder, and one of the recipes."""
    parts: list[str] = []
    for kind, title in (("rewards", "Rewards"), ("trainers", "Trainers"), ("families", "Families")):
        rows = [f"| `{name}` | {sources.summary(kind, name)} |" for name in registry.names(kind)]
        parts.append("\n".join([f"### {title}", "", "| name | what it is |", "|---|---|", *rows]))
    rows = [f"| `{name}` | {config.purpose(name)} |" for name in config.packaged()]
    parts.append("\n".join(["### Recipes", "", "| name | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def filled(text: str) -> str:
    """The README with fresh tables."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n## What there is\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    text = README.read_text()
    if "--check" in sys.argv:
        return int(filled(text) != text)
    README.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
