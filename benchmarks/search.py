"""`python -m benchmarks.search NAME key.sub=value …`: one recorded trial of the default job; without arguments, the table of all trials.

A trial is `configs/toybox.yaml`, as it was at the trial's commit, with overrides; its held-out accuracies before and after and its seconds
go to results/search.jsonl, and the table of all trials to benchmarks/search.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe
from visalign import build, config, tracking

FILE = Path(__file__).parent / "results" / "search.jsonl"
PAGE = Path(__file__).parent / "search.md"


def trial(name: str, overrides: list[str]) -> dict[str, object]:
    """Train once and record."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = config.load("toybox", ["eval.scan=[]", *overrides, f"run.path={folder}", "run.resume=never"])
        rows = tracking.read(build.trainer(recipe).fit())
    first, last = rows[0], rows[-1]
    found: dict[str, object] = {"name": name, "overrides": overrides, "seed": recipe.run.seed, "images": recipe.eval.images}
    found["steps"] = last["step"]
    found["minutes"] = round(sum(row.get("seconds", 0.0) for row in rows) / 60, 2)
    for judge in ("strict", "second_judge", "diversity"):
        found[judge] = [round(first[f"eval/{judge}"], 4), round(last[f"eval/{judge}"], 4)]
    curve = [(row["step"], round(row["eval/strict"], 4)) for row in rows if "eval/strict" in row]
    return found | {"curve": curve} | describe()


def table() -> str:
    """All trials, largest gain first."""
    trials = [json.loads(line) for line in FILE.read_text().splitlines()]
    trials.sort(key=lambda t: t["strict"][0] - t["strict"][1])
    lines = ["| trial | changes | seed | steps | minutes | pictures | strict | second judge | note |", "|" + "---|" * 9]
    for t in trials:
        strict, second = t["strict"], t["second_judge"]
        changes = " ".join(f"`{o}`" for o in t["overrides"])
        lines.append(
            f"| {t['name']} | {changes} | {t['seed']} | {t['steps']} | {t['minutes']} | {t['images']} | {strict[0]:.3f} → {strict[1]:.3f} "
            f"({strict[1] - strict[0]:+.3f}) | {second[0]:.3f} → {second[1]:.3f} | {t.get('note', '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        with FILE.open("a") as file:
            file.write(json.dumps(trial(sys.argv[1], sys.argv[2:])) + "\n")
    PAGE.write_text(f"# Trials of the default job\n\nWritten by `python -m benchmarks.search`.\n\n{table()}\n")
    print(table())


if __name__ == "__main__":
    main()
