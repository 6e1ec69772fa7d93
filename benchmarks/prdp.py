"""`python -m benchmarks.prdp [--seconds 240] [--seeds 0,1,2] [--evaluations 4] [--only-table]`: long runs on few and on many prompts.

PRDP's claim in miniature (arXiv 2402.08714): on few prompts it gains what policy gradients gain; on many, where policy gradients without
a KL become unstable, it goes on. Flow-GRPO without a KL and PRDP, by the toybox's own recipes, on eight training prompts and on all 1,616,
judged on the same held-out prompts. An hour on two cores.

One JSON per run under results/prdp; a run that is there and was made by the same recipe is not made again. From all that exist it writes
benchmarks/prdp.md and its plot. To be run from the repository's root.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records, toybox
from benchmarks.records import markdown, mean_and_std
from benchmarks.toybox_runs import Run, change, load, windows

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, PLOT = records.RESULTS / "prdp", ROOT / "benchmarks" / "prdp.md", ROOT / "assets" / "pictures" / "prdp_runs.png"
ALGORITHMS = {"flow_grpo": "toybox", "prdp": "toybox_reward_difference"}  # name -> recipe
PROMPTS: dict[str, dict[str, Any]] = {"few": {"prompts.train": "benchmarks/recipes/eight_prompts.jsonl"}, "many": {}}
JUDGES = ("strict", "second_judge")


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Run's name -> (recipe, what differs from it)."""
    return {f"{name}_{amount}": (recipe, PROMPTS[amount]) for amount in PROMPTS for name, recipe in ALGORITHMS.items()}


def rewards(run: Run) -> tuple[float, float, float]:
    """The training reward's mean over the first windows of steps, over the best one, and over the last."""
    found = windows(run, "reward/mean")
    few = max(1, len(found) // 20)
    means = [statistics.fmean(found[n : n + few]) for n in range(0, len(found) - few + 1, few)]
    return means[0], max(means), means[-1]


def table(runs: Sequence[Run]) -> str:
    """One row per algorithm and amount of prompts."""
    rows: list[list[str]] = []
    for name in cases():
        some = [run for run in runs if run["name"] == name]
        if not some:
            continue
        first, best, last = (statistics.fmean(part) for part in zip(*map(rewards, some), strict=True))
        stopped = sum(bool(run["stopped"]) for run in some)
        seeds = f"{len(some)}" + (f", {stopped} stopped early" if stopped else "")
        steps = statistics.fmean(run["steps"] for run in some)
        row = [f"`{name}`", seeds, f"{steps:.0f}", f"{first:.3f} → {best:.3f} → {last:.3f}"]
        for judge in JUDGES:
            lost = [max(point[judge] for point in run["curve"]) - run["curve"][-1][judge] for run in some]
            row += [change(some, judge), mean_and_std(lost)]
        rows.append([*row, change(some, "diversity")])
    head = ["run", "seeds", "steps", "training reward: first, best, last 5 %", "strict", "lost since its best"]
    return markdown([*head, "second judge", "lost since its best", "diversity"], rows)


def verdict(runs: Sequence[Run], amount: str, judge: str) -> str:
    """PRDP against Flow-GRPO at the end, paired by seed."""
    ends = {name: {run["seed"]: run["curve"][-1][judge] for run in runs if run["name"] == f"{name}_{amount}"} for name in ALGORITHMS}
    gaps = [value - ends["flow_grpo"][seed] for seed, value in ends["prdp"].items() if seed in ends["flow_grpo"]]
    if len(gaps) < 2:
        return f"* {amount} prompts, {judge}: not known, {len(gaps)} seeds of both."
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    said = "PRDP is ahead" if mean > 2 * error else "Flow-GRPO is ahead" if mean < -2 * error else "no difference that shows"
    return f"* {amount} prompts, {judge}: {said}, {mean:+.3f} ± {error:.3f}."


def page(runs: Sequence[Run]) -> str:
    machine = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    seconds = ", ".join(sorted({f"{run['seconds']:g}" for run in runs}))
    parts = [
        "# PRDP and Flow-GRPO without a KL, on few and on many prompts",
        "Written by `python -m benchmarks.prdp`; don't edit.",
        f"Runs of {seconds} s of training from the same base; few: eight training prompts, many: all 1,616. {runs[0]['pictures']} held-out "
        "prompts and the same noise in every run; mean ± std over seeds. The paper: on 45 prompts HPSv2 0.347 against DDPO's 0.340; on "
        "more than 100,000 0.318 against 0.246, below the base's 0.269. It blames that DDPO's rewards have no baseline of their own prompt "
        "there; Flow-GRPO's groups always have one, so that what fails in the paper is not in this comparison.",
        table(runs),
        "At the end, PRDP less Flow-GRPO, mean ± standard error over seeds; what exceeds twice that counts:",
        "\n".join(verdict(runs, amount, judge) for amount in PROMPTS for judge in JUDGES),
        "![reward and both judges over time](../assets/pictures/prdp_runs.png)",
        "Made on: " + "; ".join(machine) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Training reward and both judges over training seconds, few prompts above and many below; a thin line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained", dpi=110)
    panels = figure.subplots(len(PROMPTS), 1 + len(JUDGES), squeeze=False)
    for row, amount in zip(panels, PROMPTS, strict=True):
        for colour, name in zip(("tab:blue", "tab:orange"), ALGORITHMS, strict=True):
            for number, run in enumerate(run for run in runs if run["name"] == f"{name}_{amount}"):
                style = {"color": colour, "alpha": 0.8, "linewidth": 1.2, "label": "_" if number else f"{name}, {amount} prompts"}
                pace, curve = statistics.fmean(run["rows"]["seconds"]), windows(run, "reward/mean")
                row[0].plot([(n + 1) * pace for n in range(len(curve))], curve, **style)
                for panel, judge in zip(row[1:], JUDGES, strict=True):
                    panel.plot(
                        [point["seconds"] for point in run["curve"]], [point[judge] for point in run["curve"]], "o-", markersize=3, **style
                    )
        for panel, title in zip(row, ("training reward", *(judge.replace("_", " ") + ", held out" for judge in JUDGES)), strict=True):
            panel.set(title=f"{title}, {amount} prompts", xlabel="seconds of training")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write(folder: Path = FOLDER, target: Path = PAGE, picture: Path = PLOT) -> None:
    """The page and its plot, if there is a run."""
    runs = load(folder)
    if runs:
        target.write_text(page(runs), encoding="utf-8")
        plot(runs, picture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prdp", description="Flow-GRPO and PRDP on few and on many prompts.")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, for each run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--evaluations", type=int, default=4, help="evenly spaced, the last at the end")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    for seed in [] if given.only_table else map(int, given.seeds.split(",")):  # one seed of everything comes first
        for name, (recipe, overrides) in cases().items():
            if toybox.done(recipe, seed, given.seconds, FOLDER, name, overrides):
                print(f"{name}, seed {seed}: done before")
                continue
            last = toybox.run(recipe, seed, given.seconds, given.evaluations, FOLDER, alias=name, overrides=overrides)
            first, end = last["curve"][0]["strict"], last["curve"][-1]["strict"]
            print(f"{name}, seed {seed}: {last['steps']} steps, strict {first:.3f} → {end:.3f} {last['stopped']}", flush=True)
            write()
    write()


if __name__ == "__main__":
    main()
