"""Two tables of toybox.md: which algorithms raise held-out accuracy for sure, and how soon they come to Flow-GRPO's.

What a gain could owe to chance is two things, and each has a test, one-sided, that leaves the other out:

1. the run: seeds train differently. A t-test over the seeds' gains; with three seeds it has two degrees of freedom, and only a gain over
   1.69 standard deviations of the seeds passes.
2. the prompts: others might have been held out. All runs and the base draw the same prompts from the same noise, so verdicts are paired;
   the pictures of one prompt are no independent witnesses, and seeds share theirs, so what is tested is the mean difference over seeds of
   each prompt, by a t-test with a variance that is robust to clusters.

A gain counts where both reject at 5 %, the verifier's and the second judge's alike: four tests, of which the weakest decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

from benchmarks.records import markdown
from benchmarks.toybox_runs import FLOW, Run, by_name, change, mean_curve, reached, title

JUDGES = ("strict", "second_judge")
LEVEL = 0.05


def over_seeds(gains: Sequence[float]) -> float | None:
    """p that the mean gain of a seed is not above 0; None of a single one."""
    count = len(gains)
    return _above_zero(statistics.fmean(gains), statistics.stdev(gains) / count**0.5, count - 1) if count > 1 else None


def over_prompts(runs: Sequence[Run], judge: str) -> float | None:
    """p that the mean gain over prompts is not above 0, for these runs' weights; None where verdicts weren't kept."""
    if not all(judge in run.get("right", {}) for run in runs):
        return None
    pictures = np.array(runs[0]["right"]["pictures"][0], float)
    gained = np.mean([np.subtract(*run["right"][judge][::-1]) for run in runs], 0)
    count, mean = len(pictures), gained.sum() / pictures.sum()
    error = np.sqrt(count / (count - 1) * np.square(gained - mean * pictures).sum()) / pictures.sum()
    return _above_zero(float(mean), float(error), count - 1)


def _above_zero(mean: float, error: float, degrees: int) -> float:
    """p of Student's t, one-sided."""
    return float(stats.t.sf(mean / error, degrees)) if error else float(mean <= 0)


def gains_table(runs: Sequence[Run]) -> str:
    """One row per algorithm."""
    rows: list[list[str]] = []
    for name, some in by_name(runs).items():
        row, chances = [f"`{title(name)}`", str(len(some))], list[float | None]()
        for judge in JUDGES:
            gains = [run["curve"][-1][judge] - run["curve"][0][judge] for run in some]
            found = [over_seeds(gains), over_prompts(some, judge)]
            chances += found
            row += [f"{statistics.fmean(gains):+.3f}", *map(_chance, found)]
        rows.append([*row, change(some, "diversity"), _verdict(chances)])
    head = ["algorithm", "seeds"] + [cell for judge in JUDGES for cell in (judge.replace("_", " "), "p, seeds", "p, prompts")]
    return markdown([*head, "diversity", "raised for sure"], rows)


def _chance(value: float | None) -> str:
    return "" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _verdict(chances: Sequence[float | None]) -> str:
    """Of the verifier's two tests and the second judge's."""
    known = [value for value in chances if value is not None]
    if any(value >= LEVEL for value in known):
        first = all(value is not None and value < LEVEL for value in chances[:2])
        return "no: only the verifier says so" if first else "no"
    return "yes" if len(known) == len(chances) else "not known"


def speed_table(runs: Sequence[Run]) -> str:
    """Seconds to the accuracy with which Flow-GRPO ends, on the mean curve of all seeds."""
    groups = by_name(runs)
    if FLOW not in groups:
        return ""
    rows: list[list[str]] = []
    for name, some in groups.items():
        row = [f"`{title(name)}`", str(len(some)), str(max(len(run["curve"]) for run in some) - 1)]
        for judge in JUDGES:
            goal = statistics.fmean(run["curve"][-1][judge] for run in groups[FLOW])
            own, flow = (mean_curve(group, judge, "seconds") for group in (some, groups[FLOW]))
            needed, slow = (reached(curve, judge, goal, "seconds") for curve in (own, flow))
            best = max(point[judge] for point in own)
            if not needed or not slow:
                row.append(f"not: at best {best:.3f}" if goal > flow[0][judge] else "no gain to compare with")
            else:
                row.append(f"{needed:.0f} s, {slow / needed:.1f} times as fast")
        rows.append(row)
    return markdown(["algorithm", "seeds", "evaluations", *(judge.replace("_", " ") for judge in JUDGES)], rows)


def section(runs: Sequence[Run]) -> list[str]:
    """Parts of the page."""
    found = ["## Raised for sure?", (__doc__ or "").split("\n\n", 1)[1].strip(), gains_table(runs)]
    if speeds := speed_table(runs):
        text = "From the mean over seeds, by straight lines between evaluations: few of them make these seconds coarse."
        found += ["## Seconds to the accuracy with which Flow-GRPO ends", text, speeds]
    return found
