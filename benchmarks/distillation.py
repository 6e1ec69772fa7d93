"""`python -m benchmarks.distillation [--seconds 240] [--seeds 0,1,2] [--shares 0,0.25,0.5,0.75,1]`: is guidance worth its second forward?

For each seed two students of configs/toybox_cfg_distillation.yaml train for the same seconds: one for quality, with diversity at weight 0,
and one for diversity as well. They, what lies between their weights, and the base with and without guidance draw the same held-out prompts
from the same noise. Diversity is measured twice: of what pictures show (CLIP), which wrong pictures have, too, and of what is where (the
patches of DINO), which is what the reward pays for. Half an hour on two cores.

One JSON per seed under results/distillation; one that is there and was made by the same recipe is not made again. From all that exist it
writes benchmarks/distillation.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import records, toybox
from benchmarks.machine import describe
from benchmarks.records import markdown, mean_and_std
from visalign import build
from visalign.evaluation import evaluate
from visalign.policy import Policy, interpolated
from visalign.trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = records.RESULTS / "distillation", ROOT / "benchmarks" / "distillation.md"
PLOT = ROOT / "assets" / "pictures" / "distillation_runs.png"
RECIPE = "toybox_cfg_distillation"
JUDGES = ("strict", "second_judge", "clip_score", "diversity", "places")
BETWEEN = 2.0  # guidance of the base between none and the teacher's
Row = dict[str, Any]


def judged(trainer: Trainer, policy: Policy, guidance: float = 1.0) -> dict[str, float]:
    """What the judges say of a policy's pictures, and the forwards that each took."""
    section, before = trainer.config.eval, policy.nfe
    steps = section.steps or trainer.config.policy.steps
    common = {"steps": steps, "seed": 0, "batch": section.batch, "guidance": guidance}
    found = evaluate(policy, trainer.examiner.prompts, trainer.session.judges, **common)
    figures = {name: records.rounded(found.metrics[f"eval/{name}"]) for name in JUDGES}
    return figures | {"nfe": (policy.nfe - before) / len(found.prompts)}


def student(seed: int, seconds: float, weight: float | None, images: int | None) -> tuple[Trainer, dict[str, Any]]:
    """A student that has trained, its averaged weights in place, and how that went; `weight` of diversity, or the recipe's."""
    overrides: dict[str, Any] = {} if weight is None else {"rewards.diversity.weight": weight}
    recipe = toybox.load(RECIPE, seed, overrides | ({} if images is None else {"eval.images": images}))
    with tempfile.TemporaryDirectory() as scratch:
        place = lambda part: recipe.model_copy(update={"run": recipe.run.model_copy(update={"path": Path(scratch) / part})})  # noqa: E731
        step_seconds = toybox.pace(build.trainer(place("pilot")), seconds)
        trainer = build.trainer(place("run"))
        found = toybox.train(trainer, seconds, step_seconds, toybox.Judged({}, {}), evaluations=1)
    if trainer.average:
        for parameter, value in zip(trainer.parameters, trainer.average.values, strict=True):
            parameter.data.copy_(value)
        trainer.average = None
    return trainer, {key: found[key] for key in ("steps", "seconds_per_step", "stopped")}


def run(seed: int, seconds: float, shares: Sequence[float], images: int | None = None) -> dict[str, Any]:
    """Both students of a seed, and everything that is compared with them."""
    (quality, first), (diverse, second) = student(seed, seconds, 0.0, images), student(seed, seconds, None, images)
    teacher = diverse.settings.teacher
    with diverse.policy.reference():
        rows: list[Row] = [{"name": "base"} | judged(diverse, diverse.policy)]
        rows += [{"name": f"base, guidance {g:g}"} | judged(diverse, diverse.policy, g) for g in (BETWEEN, teacher)]
    curve: list[Row] = []
    weights = {share: interpolated(quality.policy, diverse.policy, share) for share in shares}
    for share, values in weights.items():
        diverse.policy.family.network.load_state_dict(values)
        curve.append({"share": share} | judged(diverse, diverse.policy))
    students = {"quality": first, "diverse": second}
    head = {"seed": seed, "seconds": seconds, "recipe": key(seed, seconds, shares), "pictures": len(diverse.examiner.prompts)}
    return head | describe() | students | {"rows": rows, "curve": curve}


def key(seed: int, seconds: float, shares: Sequence[float]) -> str:
    return toybox.digest([toybox.fingerprint(toybox.load(RECIPE, seed), seconds), list(shares)])


def page(runs: Sequence[dict[str, Any]]) -> str:
    """distillation.md."""
    names = [row["name"] for row in runs[0]["rows"]]
    lines = [[name, *cells([row for run in runs for row in run["rows"] if row["name"] == name])] for name in names]
    shares = sorted({row["share"] for run in runs for row in run["curve"]})
    for share in shares:
        found = [row for run in runs for row in run["curve"] if row["share"] == share]
        lines.append([{0.0: "student, quality", 1.0: "student, diversity"}.get(share, f"{share:g} of the way"), *cells(found)])
    machine = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    steps = ", ".join(f"{statistics.fmean(run[part]['steps'] for run in runs):.0f}" for part in ("quality", "diverse"))
    parts = [
        "# CFG distillation: guidance in one forward, and diversity",
        "Written by `python -m benchmarks.distillation`; don't edit.",
        f"Students of {runs[0]['seconds']:g} s of training each ({steps} steps; for quality alone, and for diversity as well), and weights "
        f"between theirs. {runs[0]['pictures']} held-out prompts, the same noise for all; mean ± std over {len(runs)} seeds. NFE are "
        "forwards a picture. Diversity is that of what pictures show, to CLIP, which wrong pictures have, too; that of places, of what is "
        "where, to the patches of DINO, is what the reward pays for.",
        markdown(["model", "NFE", "strict", "second judge", "CLIP score", "diversity", "of places"], lines),
        "\n".join(claim(runs, judge) for judge in ("strict", "second_judge", "diversity", "places")),
        "![accuracy over diversity, from the one student's weights to the other's](../assets/pictures/distillation_runs.png)",
        "Made on: " + "; ".join(machine) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def claim(runs: Sequence[dict[str, Any]], judge: str) -> str:
    """The student of each kind less the teacher, paired by seed."""
    said: list[str] = []
    for share, kind in ((0.0, "quality"), (1.0, "diversity")):
        ends = [row[judge] - run["rows"][-1][judge] for run in runs for row in run["curve"] if row["share"] == share]
        said += [f"the student for {kind} {mean_and_std(ends)}"] if ends else []
    ends = [{row["share"]: row[judge] for row in run["curve"]} for run in runs]
    adds = [found[1.0] - found[0.0] for found in ends if {0.0, 1.0} <= found.keys()]
    said += [f"so the reward adds {mean_and_std(adds)}"] if adds else []
    return f"* {judge.replace('_', ' ')} over the guided teacher's: {', '.join(said)}."


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Both judges over both diversities, means over seeds: the way from one student's weights to the other's, the base, its guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained", dpi=100)
    mean = lambda rows, key: [statistics.fmean(row[key] for row in same) for same in zip(*rows, strict=True)]  # noqa: E731
    curve, rows = [run["curve"] for run in runs], [run["rows"] for run in runs]
    for panel, (kind, judge) in zip(figure.subplots(2, 2).flat, product(("diversity", "places"), ("strict", "second_judge")), strict=True):
        x, y = mean(curve, kind), mean(curve, judge)
        panel.plot(x, y, "o-", label="students (number: share of the one for diversity)")
        for share, *place in zip(mean(curve, "share"), x, y, strict=True):
            panel.annotate(f"{share:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=8)
        for row, *place in zip(runs[0]["rows"], mean(rows, kind), mean(rows, judge), strict=True):
            panel.plot(*place, "s", label=row["name"])
        panel.set(xlabel="diversity of places" if kind == "places" else kind, ylabel=judge.replace("_", " "))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def cells(rows: Sequence[Row]) -> list[str]:
    return [f"{rows[0]['nfe']:g}", *(mean_and_std([row[name] for row in rows]) for name in JUDGES)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description="Is guidance worth its second forward?")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, for each student")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shares", default="0,0.25,0.5,0.75,1", help="of the diverse student's weights")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    shares = [float(share) for share in given.shares.split(",")]
    for seed in [] if given.only_table else map(int, given.seeds.split(",")):
        file = FOLDER / f"{seed}.json"
        if file.exists() and records.read(file)["recipe"] == key(seed, given.seconds, shares):
            print(f"seed {seed}: done before")
            continue
        found = run(seed, given.seconds, shares)
        records.write(file, found)
        print(
            f"seed {seed}: "
            + ", ".join(f"{row.get('name', row.get('share'))} {row['strict']:.3f}" for row in found["rows"] + found["curve"])
        )
    runs = [records.read(file) for file in sorted(FOLDER.glob("*.json"))]
    if runs:
        PAGE.write_text(page(runs), encoding="utf-8")
        plot(runs, PLOT)


if __name__ == "__main__":
    main()
