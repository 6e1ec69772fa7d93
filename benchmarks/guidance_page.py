"""The page that `benchmarks.guidance` writes of its runs; every number and verdict in it is taken from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records

PAGE = Path(__file__).parent / "guidance.md"
PLOT = records.RESULTS / "guidance.png"
WANTED = 0.20  # by how much the best method should lift strict accuracy at 32 times the plain cost
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 % for so many runs
Run = dict[str, Any]

INTRODUCTION = """# Guided sampling at equal cost

Written by `python -m benchmarks.guidance`. {prompts} held-out prompts of the toybox, {pictures} pictures each, {steps} steps, guided by
`{reward}`; the same noise for every method. All methods with their defaults; the budget decides how many candidates, particles, proposals
or paths they take.

- **strict** (the verifier) and **second judge** have not been seen by any search; **reward** is what was searched by: where it rises and
  they don't, it was hacked. **diversity**: mean distance (1 - cosine of DINO features) between the pictures of a prompt.
- ±: half of the 95 % confidence interval of the mean over seeds (Student's t).
- **NFE** per returned picture is forwards + 2·backwards. **scored**: pictures that the reward looked at, per returned picture.
- **seconds** are those of all pictures together. A search whose time is over still finishes its first pictures, so methods that carry
  several paths at once may take longer than they were given.
- **against best of N**: the difference in strict accuracy, seed by seed, with its interval.
"""


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return STUDENT.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5


def said(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± interval."""
    mean, half = statistics.fmean(values), interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def grouped(runs: Sequence[Run], kind: str, multiple: int) -> dict[str, list[Run]]:
    """name -> its runs, one per seed, best first; plain pictures cost the same in both kinds."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if (run["kind"], run["multiple"]) == (kind, multiple) or (run["name"], run["multiple"]) == ("plain", 1):
            found.setdefault(run["name"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: -statistics.fmean(run["strict"] for run in item[1])))


def versus(some: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Differences in strict accuracy at the same seeds."""
    base = {run["seed"]: run["strict"] for run in others}
    return [run["strict"] - base[run["seed"]] for run in some if run["seed"] in base]


def table(runs: Sequence[Run], kind: str, multiple: int) -> str:
    """All methods at one budget."""
    head = ["method", "seeds", "strict", "second judge", "reward", "diversity", "against best of N", "NFE", "scored", "seconds"]
    by_name, rows = grouped(runs, kind, multiple), list[list[str]]()
    for name, some in by_name.items():
        apart = versus(some, by_name.get("best_of_n", []))
        figures = [said([run[key] for run in some]) for key in ("strict", "second_judge", "reward", "diversity")]
        nfe = [run["nfe"] + 2 * run["nfe_backward"] for run in some]
        costs = [
            f"{statistics.fmean(values):.0f}" for values in (nfe, [run["reward_calls"] for run in some], [run["seconds"] for run in some])
        ]
        rows.append([f"`{name}`", str(len(some)), *figures, "" if name == "best_of_n" or not apart else said(apart, sign="+"), *costs])
    return records.markdown(head, rows)


def verdict(runs: Sequence[Run], kind: str, multiple: int) -> str:
    """Who wins, by how much over the plain pictures, and whether best of N does."""
    by_name = grouped(runs, kind, multiple)
    searches = [name for name in by_name if not name.startswith("plain") and "aligned" not in name]
    if "plain" not in by_name or not searches:
        return "Not all runs have been made yet."
    best = searches[0]
    lift = versus(by_name[best], by_name["plain"])
    second = [run["second_judge"] for run in by_name[best]]
    before = statistics.fmean(run["second_judge"] for run in by_name["plain"])
    text = f"Best: `{best}`, strict {said(lift, sign='+')} over plain, second judge {before:.3f} → {statistics.fmean(second):.3f}."
    if best == "best_of_n":
        return f"{text} **Best of N wins**: no search beats it here."
    apart = versus(by_name[best], by_name.get("best_of_n", []))
    if not apart:
        return text
    half = interval(apart)
    sure = not math.isnan(half) and statistics.fmean(apart) > half
    return f"{text} Over best of N it gains {said(apart, sign='+')}: {'more than' if sure else 'within'} what seeds differ by."


def wanted(runs: Sequence[Run]) -> str:
    """Whether the best method lifts strict accuracy by what is wanted at 32 times the plain NFE."""
    by_name = grouped(runs, "nfe", 32)
    lifts = {name: versus(some, by_name.get("plain", [])) for name, some in by_name.items() if not name.startswith("plain")}
    lifts = {name: lift for name, lift in lifts.items() if lift}
    if not lifts:
        return ""
    best = max(lifts, key=lambda name: statistics.fmean(lifts[name]))
    reached = "reached" if statistics.fmean(lifts[best]) >= WANTED else "**not reached**"
    return (
        f"Wanted: at 32 times the plain NFE at least +{WANTED:.2f} strict over plain. `{best}`: {said(lifts[best], sign='+')}, {reached}."
    )


def curve(runs: Sequence[Run]) -> str:
    """Strict accuracy by budget."""
    multiples = sorted({run["multiple"] for run in runs if run["kind"] == "nfe"})
    names = list(dict.fromkeys(name for multiple in reversed(multiples) for name in grouped(runs, "nfe", multiple)))
    cells = {multiple: grouped(runs, "nfe", multiple) for multiple in multiples}
    rows = [
        [f"`{name}`", *(said([run["strict"] for run in cells[m][name]]) if name in cells[m] else "" for m in multiples)]
        for name in names
        if not name.startswith("plain") and "aligned" not in name
    ]
    return records.markdown(["strict at", *(f"{multiple} ×" for multiple in multiples)], rows)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Strict accuracy and guiding reward over NFE, a line per method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    searched = [run for run in runs if run["kind"] == "nfe" and "aligned" not in run["name"] and " at " not in run["name"]]
    for number, name in enumerate(sorted({run["name"] for run in searched} - {"plain"})):
        some = [run for run in searched if run["name"] in (name, "plain")]
        for panel, key in zip(panels, ("strict", "second_judge", "reward"), strict=True):
            multiples = sorted({run["multiple"] for run in some})
            y = [statistics.fmean(run[key] for run in some if run["multiple"] == multiple) for multiple in multiples]
            panel.plot(multiples, y, "o-", color=colormaps["tab10"](number % 10), label=name, markersize=4)
    for panel, text in zip(panels, ("strict, held out", "second judge", "guiding reward"), strict=True):
        panel.set(title=text, xlabel="times the plain NFE", xscale="log")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if panels[0].lines:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    if not runs:
        return "# Guided sampling at equal cost\n\nNo run yet: `python -m benchmarks.guidance`.\n"
    first = runs[0]
    given = {
        "prompts": first["prompts"],
        "pictures": first["pictures"],
        "steps": first["steps"],
        "reward": next(iter(first["reward_options"])),
    }
    parts = [INTRODUCTION.format(**given), wanted(runs), f"![Accuracy over budget]({PLOT.relative_to(PAGE.parent)})"]
    for kind, title in (("nfe", "plain NFE"), ("seconds", "the plain sampler's seconds")):
        multiples = sorted({run["multiple"] for run in runs if run["kind"] == kind and run["multiple"] > 1}, reverse=True)
        for multiple in multiples if kind == "seconds" else multiples[:1]:
            parts += [f"## {multiple} times {title}", table(runs, kind, multiple), verdict(runs, kind, multiple)]
    if any("aligned" in run["name"] for run in runs):
        parts += ["## Without a search: guidance of the base, an aligned policy, and the hybrid sampler", table(runs, "nfe", 1)]
    parts += ["## Accuracy over budgets", curve(runs)]
    parts += [f"{m} ×: {verdict(runs, 'nfe', m)}" for m in sorted({run["multiple"] for run in runs if run["kind"] == "nfe"}) if m > 1]
    machine = ", ".join(f"{key} {first[key]}" for key in ("device", "threads", "torch", "commit"))
    return "\n\n".join([*filter(None, parts), f"Measured on: {machine}."]) + "\n"


def load(folder: Path) -> list[Run]:
    """All runs that were made with the settings of the newest."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    runs = [records.read(file) for file in files]
    same = ("prompts", "pictures", "steps", "reward_options")
    return [run for run in runs if all(run[key] == runs[-1][key] for key in same)]


def write(folder: Path, target: Path = PAGE, picture: Path = PLOT) -> None:
    """guidance.md and the plot."""
    runs = load(folder)
    target.write_text(page(runs), encoding="utf-8")
    if runs:
        plot(runs, picture)
