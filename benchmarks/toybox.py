"""`python -m benchmarks.toybox [NAME …] [--seconds 90] [--seeds 0,1,2] [--again] [--only-table]`: every algorithm, one world.

Every recipe configs/toybox_NAME.yaml, the default job, and RPO on the toybox's own task, trains for the same seconds; evaluations are not
counted. A NAME is one of these, or the path of a recipe. A run takes two minutes and a half of two cores, all of them three hours.

Each run is one file, results/toybox/NAME-SEED.json; one that is there and was made by the same recipe is not run again, so the command
goes on where it was stopped. From all files that exist it then writes benchmarks/toybox.md and its plot. Runs on one thread
(OMP_NUM_THREADS=1), of which two can go on at once, take fewer steps in their seconds: they are kept and compared apart, in
results/toybox/one_core.

DenseGRPO's calibration, which can be kept and used again, stands beside the seconds and is not part of them.

A learning rate that decays by steps has to fit a run whose number of steps is not known: some steps of a policy that is thrown away are
timed first, and `optimizer.decay_steps` is the number that fits. All runs are evaluated with the same noise, whatever their seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, toybox_table
from benchmarks.machine import describe
from visalign import build, config, registry
from visalign.config import Config
from visalign.evaluation import Evaluation, evaluate
from visalign.pictures import before_after
from visalign.sampling import pictures
from visalign.trainer import NonFiniteError, Trainer

FOLDER, RECIPES = records.RESULTS / "toybox", Path(__file__).parent / "recipes"
ONE_CORE = FOLDER / "one_core"
LEFT_OUT = ("toybox_full", "toybox_reward_model", "toybox_noise_optimization", "toybox_rpo", "toybox_sd15", "toybox_wan")  # other tasks
SETTINGS = ("policy", "rewards", "trainer", "exploration", "transition", "credit", "ratio", "optimizer")  # of a recipe, kept with its run


def names() -> list[str]:
    """The recipes that are compared."""
    return [
        *(name for name in config.packaged() if re.match(r"toybox(_|$)", name) and name not in LEFT_OUT),
        str(RECIPES / "rpo_scenes.yaml"),
    ]


def load(name: str, seed: int, overrides: Mapping[str, Any] | None = None) -> Config:
    """A recipe with its algorithm's defaults."""
    recipe = config.load(name, {"run.seed": seed, "run.resume": "never", "eval.scan": [], **(overrides or {})})
    return build.completed(recipe, registry.load("trainers", recipe.trainer.name).defaults)


def digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(recipe: Config, seconds: float) -> str:
    """Equal for runs that would be the same: of everything in a recipe that is not a default, but for where and how long it runs."""
    content = recipe.model_dump(mode="json", exclude={"run": {"path", "steps"}, "log": True}, exclude_defaults=True)
    return digest([content, seconds])


# --- a run -------------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What a run has spent on training.

    Attributes:
        seconds: of steps.
        forwards: of the denoiser, for one latent each: of rollouts, of completions for credit, and of replays.
        backwards: of the denoiser, in replays.
        scored: pictures that the reward looked at.
    """

    seconds: float = 0.0
    forwards: int = 0
    backwards: float = 0.0
    scored: float = 0.0

    @contextmanager
    def spending(self, trainer: Trainer) -> Iterator[None]:
        rewards = trainer.session.rewards
        started, forwards, calls = time.perf_counter(), trainer.policy.nfe, rewards.calls
        yield
        self.seconds += time.perf_counter() - started
        self.forwards += trainer.policy.nfe - forwards
        self.scored += (rewards.calls - calls) / len(rewards.rewards)

    def point(self, step: int, judged: dict[str, float]) -> dict[str, float]:
        """A point of the run's curve: what was spent, and what the judges say; `nfe` counts a backward as two forwards."""
        spent = {"seconds": self.seconds, "forwards": self.forwards, "nfe": self.forwards + 2 * self.backwards, "scored": self.scored}
        return {"step": step} | {key: records.rounded(value) for key, value in (spent | judged).items()}


@dataclass(frozen=True)
class Judged:
    """What judges say of pictures.

    Attributes:
        figures: judge -> mean score, and diversity and the others.
        right: judge that says 0 or 1 -> how many pictures of each prompt are right; and "pictures" -> how many there are of each.
    """

    figures: dict[str, float]
    right: dict[str, list[int]]


Judge = Callable[[Trainer], Judged]


def judge(trainer: Trainer) -> Judged:
    """The averaged weights on the test prompts, with the same noise in all runs: strict, second_judge, diversity and the others."""
    section, policy = trainer.config.eval, trainer.config.policy
    common = {"seed": 0, "batch": section.batch, "describe": "evaluate"}
    guidance = policy.guidance if section.guidance is None else section.guidance
    with trainer.averaged():
        prompts, judges = trainer.examiner.prompts, trainer.session.judges
        found = evaluate(trainer.policy, prompts, judges, steps=section.steps or policy.steps, guidance=guidance, **common)
    figures = {key.removeprefix("eval/"): value for key, value in found.metrics.items() if key.startswith("eval/")}
    return Judged(figures, right(found))


def right(found: Evaluation) -> dict[str, list[int]]:
    """See `Judged`; prompts in the order of their list. A verdict that failed is none that is right."""
    prompt = found.prompts.groups.unique(return_inverse=True)[1]
    verdicts = {alias: scores.nan_to_num(0.0) for alias, scores in found.scores.items()}
    binary = {alias: said.long() for alias, said in verdicts.items() if torch.isin(said, torch.tensor([0.0, 1.0])).all()}
    counted = {"pictures": torch.ones_like(prompt)} | binary
    return {name: torch.zeros(int(prompt.max()) + 1).long().index_add(0, prompt, said).tolist() for name, said in counted.items()}


def base(trainer: Trainer, folder: Path, judge: Judge = judge) -> Judged:
    """What the judges say before training: judged once per commit and sampler, and kept."""
    file, commit = folder / "base.json", describe()["commit"]
    unused = {"eval": {"every", "scan", "grid"}, "policy": {"lora", "ema", "gradient_checkpointing"}}
    sections = trainer.config.model_dump(mode="json", include={"eval", "policy", "prompts"}, exclude=unused)
    key = digest([commit, sections])
    known = records.read(file) if file.exists() else {}
    if key not in known:
        known[key] = asdict(judge(trainer)) | {"commit": commit}
        records.write(file, known)
    return Judged(known[key]["figures"], known[key]["right"])


def pace(trainer: Trainer, seconds: float) -> float:
    """Mean seconds of a step: after two to warm up, four spread over a run, because windows that move make them differ."""
    trainer.step(1)
    steps = max(1, int(seconds / trainer.step(2)["seconds"]))
    return statistics.fmean(trainer.step(1 + steps * n // 4)["seconds"] for n in range(4))


def fit_decay(trainer: Trainer, steps: int) -> int | None:
    """Let a learning rate that decays reach its end after so many steps."""
    optimizer = trainer.config.optimizer
    if optimizer.decay_steps is None:
        return None
    trainer.config = trainer.config.model_copy(update={"optimizer": optimizer.model_copy(update={"decay_steps": steps})})
    return steps


def train(trainer: Trainer, seconds: float, step_seconds: float, before: Judged, evaluations: int, judge: Judge = judge) -> dict[str, Any]:
    """Train until the seconds are spent; what was measured on the way."""
    ledger, calibration, rows, stopped = Ledger(), Ledger(), list[dict[str, float]](), ""
    curve, last = [ledger.point(0, before.figures)], before
    with calibration.spending(trainer):
        getattr(trainer, "calibrate", lambda: None)()  # DenseGRPO's, which `fit` would do first
    decay = fit_decay(trainer, max(1, round(seconds / step_seconds)))
    marks = [seconds * (n + 1) / evaluations for n in range(evaluations)]
    while marks:
        try:
            with ledger.spending(trainer):
                rows.append(trainer.step(len(rows) + 1))
            ledger.backwards += rows[-1]["nfe_backward"] * rows[-1]["images"]
        except NonFiniteError as error:
            if not rows:
                raise
            stopped, marks = str(error), []
        if not marks or ledger.seconds >= marks[0]:
            last = judge(trainer)
            curve.append(ledger.point(len(rows), last.figures))
            marks = [mark for mark in marks if mark > ledger.seconds]
    return {
        "steps": len(rows),
        "seconds_per_step": records.rounded(statistics.median(row["seconds"] for row in rows)),
        "calibration": {key: records.rounded(getattr(calibration, key)) for key in ("seconds", "forwards", "scored")},
        "decay_steps": decay,
        "stopped": stopped,
        "curve": curve,
        "right": {name: [counts, last.right[name]] for name, counts in before.right.items()},
        "rows": columns(rows),
    }


def columns(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Metrics of all steps, name by name; those of single denoising steps are left out, and NaN is null."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not re.search(r"/\d+$", key)))
    values = {key: [row.get(key) for row in rows] for key in keys}
    return {key: [None if v is None or v != v else records.rounded(v) for v in column] for key, column in values.items()}


def portrait(trainer: Trainer) -> Tensor:
    """(8, 3, H, W): the averaged weights' pictures of the first test prompts."""
    section, policy = trainer.config.eval, trainer.config.policy
    with trainer.averaged():
        prompts = trainer.examiner.prompts.take(slice(0, 8))
        return pictures(trainer.policy, prompts, steps=section.steps or policy.steps, seed=0, batch=8, guidance=policy.guidance)


def run(
    name: str,
    seed: int,
    seconds: float,
    evaluations: int,
    folder: Path = FOLDER,
    *,
    alias: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    picture: Path | None = None,
    judge: Judge = judge,
    portrait: Callable[[Trainer], Tensor] = portrait,
) -> dict[str, Any]:
    """Train one recipe with one seed, and write it down.

    Args:
        alias: what the run is called; None: as its recipe.
        overrides: of the recipe.
        picture: where pictures of before and after go.
        judge: what is asked at every evaluation.
        portrait: what these pictures show.
    """
    recipe = load(name, seed, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        place = lambda part: {"run": recipe.run.model_copy(update={"path": Path(scratch) / part})}  # noqa: E731
        pilot = build.trainer(recipe.model_copy(update=place("pilot")))
        before = base(pilot, folder, judge)
        step_seconds = pace(pilot, seconds)
        trainer = build.trainer(recipe.model_copy(update=place("run")))
        first = portrait(trainer) if picture else None
        found = train(trainer, seconds, step_seconds, before, evaluations, judge)
    if picture and first is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        before_after(first, portrait(trainer), trainer.examiner.prompts.texts[: len(first)]).save(picture)
    settings = recipe.model_dump(mode="json", include=set(SETTINGS))
    head = {"name": alias or Path(name).stem, "seed": seed, "seconds": seconds, "recipe": fingerprint(recipe, seconds)}
    record = head | {"pictures": recipe.eval.images} | describe() | found | {"settings": settings}
    records.write(file_of(alias or name, seed, folder), record)
    return record


def file_of(name: str, seed: int, folder: Path = FOLDER) -> Path:
    return folder / f"{Path(name).stem}-{seed}.json"


def done(
    name: str, seed: int, seconds: float, folder: Path = FOLDER, alias: str | None = None, overrides: Mapping[str, Any] | None = None
) -> bool:
    """Whether this run is written down already."""
    file = file_of(alias or name, seed, folder)
    return file.exists() and records.read(file)["recipe"] == fingerprint(load(name, seed, overrides), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toybox", description="Every algorithm on the toybox, for equal seconds.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all of the toybox), or paths of recipes")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training, for each run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--evaluations", type=int, default=2, help="evenly spaced, the last at the end")
    parser.add_argument("--again", action="store_true", help="repeat runs that are there already")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    chosen = [] if given.only_table else given.names or names()
    folder = FOLDER if torch.get_num_threads() > 1 else ONE_CORE
    for seed in map(int, given.seeds.split(",")):  # one seed of everything comes first
        for name in chosen:
            if not given.again and done(name, seed, given.seconds, folder):
                print(f"{name}, seed {seed}: done before")
                continue
            last = run(name, seed, given.seconds, given.evaluations, folder)
            first, end = last["curve"][0], last["curve"][-1]
            print(f"{name}, seed {seed}: {last['steps']} steps, strict {first['strict']:.3f} → {end['strict']:.3f} {last['stopped']}")
            toybox_table.write(FOLDER, ONE_CORE, given.seconds)
    toybox_table.write(FOLDER, ONE_CORE, given.seconds)


if __name__ == "__main__":
    main()
