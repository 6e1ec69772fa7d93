"""`python -m benchmarks.subject [--steps 40] [--every 8] [--seeds 0,1,2] [--only-table]`: RPO learns a subject.

RPO (arXiv 2407.12164) learns one particular thing from a few pictures of it, and stops where a validation reward is highest, the λ-harmonic
mean of likeness and prompt-following. Here the thing is a star of four points that the model has never seen, in sixteen pictures of eight
prompts, and every star that a prompt names should become it (configs/toybox_rpo.yaml, at a rate that doesn't decay, as in the paper, so
that something is left to stop). Half of the held-out compositions validate: they choose the weights that are kept. What is said below is
measured on the other half.

Likeness is DINO's to the subject's pictures. The verifier doesn't know the subject, and calls it unknown; so `following` takes what is a
star of any kind or no known shape for the star, and asks for everything else: count, colour, relation, the other objects, and no dirt. The
second judge calls the subject a cross: of prompts without a cross it can say the same. `subject` is the verifier with the subject's own
outline beside the six: everything as asked, and every star the particular one. Drawn scenes of the subject pass all three.

A quarter of an hour on two cores. One JSON per seed under results/subject; one that is there and was made by the same recipe is not made
again. From all that exist it writes benchmarks/subject.md, its plot, and pictures of seed 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import records, toybox
from benchmarks.machine import describe
from benchmarks.records import markdown, mean_and_std
from benchmarks.toybox_gains import over_seeds
from visalign import build, checkpoint, pictures, prompts, tracking
from visalign.evaluation import Evaluation, evaluate
from visalign.noise import seed_for
from visalign.rollout import Prompts
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox import scenes, styles
from visalign.toybox.judge import SecondJudge
from visalign.toybox.perception import CLEAN, look
from visalign.trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, PICTURES = records.RESULTS / "subject", ROOT / "benchmarks" / "subject.md", ROOT / "assets" / "pictures"
SHEET, PLOT = PICTURES / "subject.png", PICTURES / "subject_runs.png"
RECIPE = "toybox_rpo"
STAR, SUBJECT, STYLE = "star", "sparkle", "sparkle"  # the word, the shape that it should become, and the look that draws it so
SPLIT = 2  # salt of the halves: chosen so that both have prompts of every kind
VALIDATION, TEST, SHOWN = 128, 256, 6  # pictures
JUDGES = ("likeness", "following", "second_following", "subject", "clip_score", "harmonic", "diversity")
Run = dict[str, Any]


class Following(Reward):
    """1 where a picture shows what its prompt says, the star's shape aside, else 0.

    Args:
        judge: "verifier", or "second", which takes the subject for a cross: prompts that name one are invalid.
        exactly: of the verifier: every star is the subject, and no other shape will do.
    """

    spec = RewardSpec("following", needs=frozenset({"prompt"}), range=(0.0, 1.0))
    held_out_only = True

    def __init__(self, judge: Literal["verifier", "second"] = "verifier", exactly: bool = False):
        self.second = SecondJudge() if judge == "second" else None
        self.taken = {SUBJECT} if exactly else {SUBJECT, STAR, "unknown"} if self.second is None else {STAR, "unknown", "cross"}

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) of pictures (N, 3, H, W)."""
        if self.second is None:
            views = look(batch.images, (*scenes.SHAPES, SUBJECT))
            seen = [(view.objects, view.blemish <= CLEAN) for view in views]
        else:
            seen = [(objects, True) for objects in self.second.perceive(batch.images)]
        found: list[float] = []
        for (objects, clean), record, prompt in zip(seen, batch.metadata, batch.prompts, strict=True):
            wanted = scenes.wanted(dict(record), prompt)
            if wanted is None or (self.second and "cross" in (clause["class"] for clause in wanted["include"])):
                found.append(float("nan"))
                continue
            named = [replace(o, shape=STAR if o.shape in self.taken else "other" if o.shape == STAR else o.shape) for o in objects]
            found.append(scenes.meets(named, wanted)[0] * clean)
        return RewardOutput.of(torch.tensor(found, device=batch.images.device))


def halves(folder: Path) -> tuple[Path, Path]:
    """Files of the prompts that validate, and of those that test; two orders of the same objects are never apart."""
    held_out = prompts.load("toybox/star_test.jsonl")
    sides: tuple[list[str], list[str]] = [], []
    for text, record in zip(held_out.texts, held_out.metadata, strict=True):
        objects = sorted((clause["class"], clause["count"], clause.get("color", "")) for clause in record["include"])
        sides[seed_for("validation", SPLIT, str(objects)) % 2].append(json.dumps({"prompt": text} | record))
    files = folder / "validation.jsonl", folder / "test.jsonl"
    for file, lines in zip(files, sides, strict=True):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def changes(steps: int, every: int) -> dict[str, Any]:
    """What the runs differ in from the recipe."""
    judge = lambda **options: {"use": "benchmarks.subject:Following"} | options  # noqa: E731
    judges = {"following": judge(), "second_following": judge(judge="second"), "subject": judge(exactly=True)}
    more = {f"eval.rewards.{name}": section for name, section in judges.items()}
    return {"run.steps": steps, "eval.every": every, "eval.images": VALIDATION, "optimizer.decay_steps": None} | more


# --- a run -------------------------------------------------------------------------------------------------------------


def judged(trainer: Trainer, tested: Prompts) -> Evaluation:
    """The averaged weights on these prompts."""
    section, policy = trainer.config.eval, trainer.config.policy
    with trainer.averaged():
        return evaluate(trainer.policy, tested, trainer.session.judges, steps=policy.steps, guidance=policy.guidance, batch=section.batch)


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: records.rounded(metrics[f"eval/{name}"]) for name in JUDGES}


def run(seed: int, steps: int, every: int, sheet: Path | None = None) -> Run:
    """Train with one seed; the validation's curve, and what was tested before, at the best step and at the last."""
    with tempfile.TemporaryDirectory() as scratch:
        validation, test = halves(Path(scratch))
        where = {"prompts.test": str(validation), "run.path": str(Path(scratch) / "run")}
        trainer = build.trainer(toybox.load(RECIPE, seed, changes(steps, every) | where))
        tested = prompts.load(test).evaluation(TEST, trainer.config.prompts.balance)
        found = {"before": judged(trainer, tested)}
        folder = trainer.fit()
        found["last"] = judged(trainer, tested)
        kept = checkpoint.newest(folder / "best", steps)
        assert kept is not None, "the last step is judged"
        best = trainer.load(kept)
        found["best"] = judged(trainer, tested)
        rows = [row for row in tracking.read(folder) if "eval/harmonic" in row]
        seconds = sum(row["seconds"] for row in tracking.read(folder) if "seconds" in row)
    if sheet:
        draw(found, sheet)
    head = {"seed": seed, "recipe": key(seed, steps, every), "steps": steps, "best_step": best, "seconds": records.rounded(seconds)}
    curve = [{"step": int(row["step"])} | figures(row) for row in rows]
    return head | {"pictures": TEST} | describe() | {name: figures(e.metrics) for name, e in found.items()} | {"curve": curve}


def key(seed: int, steps: int, every: int) -> str:
    """Equal for runs that would be the same."""
    recipe = toybox.load(RECIPE, seed, changes(steps, every))
    return toybox.digest([toybox.fingerprint(recipe, 0.0), steps, SPLIT, TEST])


def draw(found: dict[str, Evaluation], path: Path) -> None:
    """What a scene of the subject would look like, above what the policy drew before, at its best and at its last."""
    asked = found["before"].prompts.take(slice(0, SHOWN))
    texts, metadata = asked.texts, asked.metadata
    scene = torch.cat([styles.drawn(text, record, 1, style=STYLE) for text, record in zip(texts, metadata, strict=True)])
    bands: list[Tensor] = [scene, *(found[name].images[:SHOWN] for name in ("before", "best", "last"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.sheet(bands, SHOWN, texts, ("a scene", "before", "best", "last")).save(path)


# --- the page ----------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """Before, at the best validation, and at the end; and the gains of the kept weights."""
    rows = [[name, *(mean_and_std([run[name][judge] for run in runs]) for judge in JUDGES)] for name in ("before", "best", "last")]
    for text, one, two in (("best less before", "best", "before"), ("best less last", "best", "last")):
        gaps = {judge: [run[one][judge] - run[two][judge] for run in runs] for judge in JUDGES}
        rows.append([text, *(mean_and_std(gaps[judge]) for judge in JUDGES)])
        chances = [over_seeds(gaps[judge]) for judge in JUDGES]
        rows.append(["p over seeds, that it is not above 0", *("" if p is None else f"{p:.3f}" for p in chances)])
    return markdown(["weights", *(f"`{judge}`" for judge in JUDGES)], rows)


def page(runs: Sequence[Run]) -> str:
    """subject.md."""
    machine = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    lost = [[run["curve"][0]["harmonic"], max(p["harmonic"] for p in run["curve"]), run["curve"][-1]["harmonic"]] for run in runs]
    before, best, last = (statistics.fmean(part) for part in zip(*lost, strict=True))
    stops = ", ".join(f"{run['best_step']} of {run['steps']}" for run in runs)
    parts = [
        "# A subject learnt by RPO",
        "Written by `python -m benchmarks.subject`; don't edit.",
        (__doc__ or "").split("\n\n", 1)[1].split("\n\nA quarter of an hour")[0],
        f"{runs[0]['pictures']} pictures of the half that tests, the same noise for all; mean ± std over {len(runs)} seeds of "
        f"{statistics.fmean(run['seconds'] for run in runs):.0f} s of training each.",
        table(runs),
        f"Early stop: the best validation came at step {stops}. Its harmonic reward went {before:.4f} → {best:.4f} → {last:.4f}, before, "
        "at its best and at the end.",
        "![validation over steps](../assets/pictures/subject_runs.png)",
        "Seed 0, the same noise:\n\n![a scene of the subject, before, best, last](../assets/pictures/subject.png)",
        "Made on: " + "; ".join(machine) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def plot(runs: Sequence[Run], path: Path) -> None:
    """The validation over steps, a line per seed, with a mark where the weights were kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=100)
    shown = {"harmonic": "harmonic: what decides", "likeness": "likeness", "following": "prompt-following"}
    for panel, (judge, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for colour, run in enumerate(runs):
            style = {"color": f"C{colour}", "linewidth": 1.3}
            steps, values = ([point[name] for point in run["curve"]] for name in ("step", judge))
            panel.plot(steps, values, label=f"seed {run['seed']}", **style)
            panel.plot(run["best_step"], values[steps.index(run["best_step"])], "o", **style)
        panel.set(title=f"{title}, validation", xlabel="steps of training")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write(folder: Path = FOLDER, target: Path = PAGE, picture: Path = PLOT) -> None:
    """The page and its plot, if there is a run."""
    if runs := [records.read(file) for file in sorted(folder.glob("*.json"))]:
        target.write_text(page(runs), encoding="utf-8")
        plot(runs, picture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subject", description="RPO learns a subject.")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--every", type=int, default=8, help="steps between validations")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    for seed in [] if given.only_table else map(int, given.seeds.split(",")):
        file = FOLDER / f"{seed}.json"
        if file.exists() and records.read(file)["recipe"] == key(seed, given.steps, given.every):
            print(f"seed {seed}: done before")
            continue
        found = run(seed, given.steps, given.every, SHEET if seed == 0 else None)
        records.write(file, found)
        said = (f"{name} {found['before'][name]:.3f} → {found['best'][name]:.3f}" for name in ("likeness", "following", "subject"))
        print(f"seed {seed}: best at step {found['best_step']}, {', '.join(said)}", flush=True)
        write()
    write()


if __name__ == "__main__":
    main()
