"""`python -m benchmarks.everything [NAME …] [--plan]`: every table again, one benchmark after the other, about 13 hours of two cores.

Each benchmark is a command of its own, which this only calls, and keeps one file per run: stopped, it goes on where it was. What is left
and how long it will take is printed before each of them; with --plan, nothing else happens. Minutes are of a machine with two cores that
does nothing else, as timings need, and rough; a run whose recipe has changed is made again, but only missing files are counted.

A NAME is a benchmark's module; without one, all run. Those that write a single file run only where it is missing. The trials of
`benchmarks.search` are a record of what was tried, and not made again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import condition, distillation, guidance, noise, prdp, reward_runs, subject, toybox, toybox_runs
from benchmarks.records import RESULTS, markdown
from visalign import registry

SEEDS, FRESH = (0, 1, 2), (3, 4, 5, 6, 7)
WRAPPED = ("directional(clip_score)", "shaped(dino)", "uncertainty(dino)")
STRICT = ("strict_flow_grpo", "strict_vgpo")
ONCE = ("branch_ddim", "mix_ddim")
CHOSEN = ("toybox", "toybox_mix_grpo_flash")
ON_ALL = [name for name in toybox.names() if re.search("grpo|vgpo|toybox$", name)]  # by policy gradients
ON_ONE = [toybox_runs.FLOW, *(name for name in toybox.names() if name not in ON_ALL), "raft_unselected"]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        module: of benchmarks.
        minutes: of one of its runs.
        files: that it writes, one per run.
        arguments: of the command.
        resumes: it knows itself which runs are there already.
        one_core: it runs on one thread.
    """

    module: str
    minutes: float
    files: Sequence[Path]
    arguments: Sequence[str] = ()
    resumes: bool = True
    one_core: bool = False

    @property
    def missing(self) -> int:
        return sum(not file.exists() for file in self.files)


def jobs() -> list[Job]:
    """All of them, short ones first."""
    single = {"overhead": 1, "stock_call": 1, "verifier": 3, "preprocessing": 4, "reward_speed": 4, "credit": 8, "cost": 12}
    found = [Job(name, minutes, [RESULTS / f"{name}.json"], resumes=False) for name, minutes in single.items()]
    found += [Job("style_swap", 12, [RESULTS / "style_swap.json"]), Job("reward_model", 60, [RESULTS / "reward_model.json"])]
    found.append(Job("distillation", 10, [distillation.FOLDER / f"{seed}.json" for seed in SEEDS]))
    found.append(Job("subject", 5, [subject.FOLDER / f"{seed}.json" for seed in SEEDS]))
    files = [condition.FOLDER / f"{'_'.join(case)}-{seed}.json" for case in condition.CASES for seed in SEEDS]
    found.append(Job("condition", 1.4, files))
    names = [*reward_runs.PLAIN, *WRAPPED]
    files = [reward_runs.FOLDER / f"{reward_runs.stem(name)}-{seed}.json" for name in names for seed in SEEDS]
    found.append(Job("reward_runs", 2.3, files, names))
    files = [noise.FOLDER / noise.file_name("toybox/turbo", 1, method, seed) for method in noise.METHODS for seed in SEEDS]
    found.append(Job("noise", 4.4, files))
    found.append(Job("prdp", 4.9, [prdp.FOLDER / f"{name}-{seed}.json" for name in prdp.cases() for seed in SEEDS]))
    asked = guidance.jobs(registry.names("steering"), list(SEEDS), None)
    found.append(Job("guidance", 0.6, [guidance.FOLDER / guidance.file_name(*job) for job in asked]))
    return [*found, *toyboxes()]


def toyboxes() -> list[Job]:
    """The commands whose runs are on toybox.md; the last writes its main table."""

    def job(minutes: float, names: Sequence[str], seeds: Sequence[int], *more: str, one_core: bool = False) -> Job:
        paths = [str(toybox.RECIPES / f"{name}.yaml") if (toybox.RECIPES / f"{name}.yaml").exists() else name for name in names]
        files = [toybox.file_of(name, seed, toybox.ONE_CORE if one_core else toybox.FOLDER) for name in names for seed in seeds]
        arguments = [*paths, "--seeds", ",".join(map(str, seeds)), "--evaluations", "6", *more]
        return Job("toybox", minutes, files, arguments, one_core=one_core)

    found = [job(6, ["dense_grpo_long"], [0], "--seconds", "260"), job(2.6, ONCE, [0]), job(2.6, STRICT, SEEDS)]
    return [*found, job(3.5, ON_ONE, SEEDS, one_core=True), job(2.6, ON_ALL, SEEDS), job(2.6, CHOSEN, FRESH)]


def left(some: Sequence[Job]) -> str:
    """A table of what is there and what is missing, and the hours that it will take."""
    rows: list[list[str]] = []
    for job in some:
        command = " ".join([job.module, *(Path(part).stem if part.endswith(".yaml") else part for part in job.arguments)])
        shown = command if len(command) <= 60 else command[:59] + "…"
        rows.append([shown, f"{len(job.files) - job.missing} of {len(job.files)}", f"{job.missing * job.minutes:.0f}"])
    hours = sum(job.missing * job.minutes for job in some) / 60
    return markdown(["benchmark", "runs there", "minutes left"], rows) + f"\n\nAbout {hours:.1f} hours left."


def main() -> int:
    every = jobs()
    known = list(dict.fromkeys(job.module for job in every))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everything", description="Every table again, resumable.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {' '.join(known)} (default: all)")
    parser.add_argument("--plan", action="store_true", help="only say what is left")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"no benchmark {', '.join(unknown)}; there is: {', '.join(known)}")
    chosen = [job for job in every if job.module in (given.names or known)]
    failed: list[str] = []
    for number, job in enumerate(chosen):
        print(left(chosen[number:]), flush=True)
        if given.plan:
            return 0
        if job.resumes or job.missing:
            threads = {"OMP_NUM_THREADS": "1"} if job.one_core else {}
            command = [sys.executable, "-m", f"benchmarks.{job.module}", *job.arguments]
            ended = subprocess.run(command, env=os.environ | threads, check=False)
            failed += [] if ended.returncode == 0 else [f"{job.module}: exit code {ended.returncode}"]
    print("\n".join(["Failed:", *failed] if failed else ["All tables are made."]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
