"""What benchmarks share: JSON files that a diff can show, tables in Markdown, and a mean with its spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write(path: Path, found: dict[str, Any]) -> None:
    """One JSON object, a line for each of its values, and for each of the values of those: columns stay on one line."""
    lines = [f"{json.dumps(key)}: {_inner(value)}" for key, value in found.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    new.replace(path)  # a run that is cut off leaves no half a file


def _inner(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(v)}" for key, v in value.items()) + "\n}"
    if isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        return "[\n" + ",\n".join(f"  {json.dumps(v)}" for v in value) + "\n]"
    return json.dumps(value)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: float) -> float:
    """With the six digits that a table or a plot can use."""
    return float(f"{value:.6g}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; `head` and every row have as many cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def mean_and_std(values: Sequence[float], digits: int = 3) -> str:
    """ "0.531 ± 0.012", the sample's own spread; a single value alone."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
