"""What `benchmarks.toybox` has written down, read back: runs, their curves, and what is averaged over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.records import mean_and_std, read

FLOW = "toybox"  # the default job's name
WINDOW = 5
Run = dict[str, Any]
Curve = Sequence[dict[str, float]]


def load(folder: Path) -> list[Run]:
    """All runs that are written down, by name and seed."""
    return sorted((read(file) for file in folder.glob("*-*.json")), key=lambda run: (run["name"], run["seed"]))


def title(name: str) -> str:
    """ "toybox_dance_grpo" is "dance_grpo", and the default job says what it is."""
    return name.removeprefix("toybox_") if name != FLOW else "flow_grpo (toybox)"


def by_name(runs: Sequence[Run], judge: str = "strict") -> dict[str, list[Run]]:
    """name -> its runs; what ends best on average comes first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["name"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: -statistics.fmean(run["curve"][-1][judge] for run in item[1])))


def at(run: Run, key: str, axis: str, place: float) -> float:
    """A curve's value between its points, by straight lines; its ends beyond them."""
    points = [(point[axis], point[key]) for point in run["curve"]]
    for (left, low), (right, high) in pairwise(points):
        if place <= right:
            share = max(0.0, (place - left) / (right - left)) if right > left else 1.0
            return low + share * (high - low)
    return points[-1][1]


def reached(curve: Curve, key: str, value: float, axis: str = "step") -> float | None:
    """Where on an axis a curve first comes to a value, between its points by straight lines; None if it doesn't."""
    for before, after in pairwise(curve):
        if before[key] >= value:
            return before[axis]
        if after[key] >= value:
            return before[axis] + (value - before[key]) / (after[key] - before[key]) * (after[axis] - before[axis])
    return None


def mean_curve(runs: Sequence[Run], key: str, axis: str) -> Curve:
    """The average over runs, at the places of all their evaluations."""
    places = sorted({point[axis] for run in runs for point in run["curve"]})
    return [{axis: place, key: statistics.fmean(at(run, key, axis, place) for run in runs)} for place in places]


def change(runs: Sequence[Run], key: str, digits: int = 3) -> str:
    """Before → after, mean ± std over seeds."""
    first = statistics.fmean(run["curve"][0][key] for run in runs)
    return f"{first:.{digits}f} → {mean_and_std([run['curve'][-1][key] for run in runs], digits)}"


def per_picture(run: Run, key: str) -> float:
    """Mean of a metric over steps."""
    return statistics.fmean(value for value in run["rows"][key] if value is not None)


def pairs(runs: Sequence[Run], name: str, flow: str = FLOW) -> list[tuple[Run, Run]]:
    """(Flow-GRPO, the other) for every seed that both have."""
    others = {run["seed"]: run for run in runs if run["name"] == name}
    return [(run, others[run["seed"]]) for run in runs if run["name"] == flow and run["seed"] in others]


def windows(run: Run, key: str) -> list[float]:
    """Averages of a metric over the last `WINDOW` steps, from the step on that has so many; none of a metric that the run doesn't have."""
    values = [value or 0.0 for value in run["rows"].get(key, [])]
    return [statistics.fmean(values[n : n + WINDOW]) for n in range(len(values) - WINDOW + 1)]
