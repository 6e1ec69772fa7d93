"""`python -m benchmarks.reward_runs [NAME …] [--seconds 90] [--seeds 0,1,2]`: the default job with one other reward at a time.

Each reward is the only one; the verifier and the second judge, which none of these runs is trained on, say before and after what it was
worth. Wrappers stand around one of the rewards. One JSON per run under results/rewards; a run that is there and was made by the same
recipe is not made again. From all that exist it writes benchmarks/rewards.md and its pictures: eight prompts, same noise, before and after.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records, toybox
from benchmarks.records import markdown, mean_and_std

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, PICTURES = records.RESULTS / "rewards", ROOT / "benchmarks" / "rewards.md", ROOT / "assets" / "pictures" / "rewards"
PLAIN = ("clip_score", "vlm_yes", "prompt_echo", "dino", "adversarial")
OPTIONS: dict[str, dict[str, Any]] = {
    "dino": {"references": "toybox"},
    "adversarial": {"references": "toybox"},
}
Run = dict[str, Any]


def rewards(name: str) -> dict[str, Any]:
    """The section `rewards` of a run: "NAME", or "WRAPPER(NAME)"."""
    wrapper, _, inner = name.rstrip(")").partition("(")
    if not inner:
        return {name: {"use": name, **OPTIONS.get(name, {})}}
    return {wrapper: {"use": wrapper, "of": {"use": inner, **OPTIONS.get(inner, {})}}}


def judged_by(run: Run, key: str) -> tuple[float, float]:
    """Before and after."""
    return run["curve"][0][key], run["curve"][-1][key]


def table(runs: Sequence[Run]) -> str:
    """One row per reward: what it says of itself, and what judges say that it never saw."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["name"], []).append(run)
    rows = []
    for name, some in groups.items():
        own = [run["rows"]["reward/mean"] for run in some]
        few = max(1, min(map(len, own)) // 5)
        start, end = (
            statistics.fmean(statistics.fmean(part) for part in parts) for parts in ([o[:few] for o in own], [o[-few:] for o in own])
        )
        row = [f"`{name}`", str(len(some)), f"{statistics.fmean(run['steps'] for run in some):.0f}", f"{start:.3f} → {end:.3f}"]
        for key in ("strict", "second_judge", "clip_score", "diversity"):
            before = statistics.fmean(judged_by(run, key)[0] for run in some)
            row.append(f"{before:.3f} → {mean_and_std([judged_by(run, key)[1] for run in some])}")
        rows.append(row)
    head = ["only reward", "seeds", "steps", "itself, first and last fifth", "verifier, strict", "second judge", "clip_score", "diversity"]
    return markdown(head, rows)


def page(runs: Sequence[Run]) -> str:
    seconds = ", ".join(sorted({f"{run['seconds']:g}" for run in runs}))
    machine = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    shown = [name for name in dict.fromkeys(run["name"] for run in runs) if (PICTURES / f"{stem(name)}.png").exists()]
    parts = [
        "# The default job with every reward alone",
        "Written by `python -m benchmarks.reward_runs`; don't edit.",
        f"Runs of {seconds} s of training from the same base; {runs[0]['pictures']} held-out prompts, the same noise in every run; mean ± "
        "std over seeds. Neither the verifier nor the second judge is trained on: where the reward rises and they don't, it is hacked.",
        table(runs),
        *(f"`{name}`, seed 0, before above after:\n\n![{name}](../assets/pictures/rewards/{stem(name)}.png)" for name in shown),
        "Made on: " + "; ".join(machine) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def stem(name: str) -> str:
    """A run's name as a file's."""
    return name.replace("(", "_of_").rstrip(")")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_runs", description="The default job with every reward alone.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rewards, or WRAPPER(REWARD) (default: {' '.join(PLAIN)})")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training, for each run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        for name in [] if given.only_table else given.names or PLAIN:
            if toybox.done("toybox", seed, given.seconds, FOLDER, stem(name), {"rewards": rewards(name)}):
                print(f"{name}, seed {seed}: done before")
                continue
            picture = PICTURES / f"{stem(name)}.png" if seed == 0 else None
            options = {"overrides": {"rewards": rewards(name)}, "alias": stem(name), "picture": picture}
            last = toybox.run("toybox", seed, given.seconds, 1, FOLDER, **options)
            before, after = judged_by(last, "strict")
            print(f"{name}, seed {seed}: {last['steps']} steps, strict {before:.3f} → {after:.3f} {last['stopped']}", flush=True)
    runs = [records.read(file) for file in sorted(FOLDER.glob("*-*.json"))]
    if runs:
        PAGE.write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
