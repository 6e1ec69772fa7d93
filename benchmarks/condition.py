"""`python -m benchmarks.condition [--steps 30] [--seeds 0,1,2] [--only-table]`: Ctrl-U with a reward that errs.

Ctrl-U (arXiv 2410.11236) trains a generator to keep to a condition by a reward model that reads the condition back out of a picture, and
gives less weight to places where the model reads two generations of one sample differently. Here scenes are noised, recovered at once, and
held to their own map of colours (configs/toybox_ctrl_u.yaml). The reward errs: it sees a quarter of the pictures through a haze that
halves every contrast to the ground, and asks for colours beyond the right ones. Which pictures is a function of their bytes, so that it
errs on two generations of a sample apart, which is what their disagreement can show; an error that both share would pass.

Compared after equal steps, with the clean reward and with the one that errs: no weighting, which needs one generation of a sample, not
two; Ctrl-U's, place by place; and a weight of the whole picture by its disagreement. Held-out scenes are noised to four levels and
recovered: `agreement` is that of the clean map, which can't tell a right colour from one beyond it, `closeness` that of the objects'
colours themselves. The verifier and the second judge say what became of pictures drawn from noise.

Twenty minutes on two cores. One JSON per run under results/condition; one that is there and was made by the same recipe is not made again.
From all that exist it writes benchmarks/condition.md, and pictures of seed 0.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, toybox
from benchmarks.machine import describe
from benchmarks.records import markdown, mean_and_std
from benchmarks.toybox_gains import over_seeds
from benchmarks.toybox_runs import Run, by_name, change, load
from visalign import build
from visalign.noise import gaussian
from visalign.paths import mix
from visalign.rewards.condition import Condition
from visalign.rollout import Prompts
from visalign.scoring import RewardInput, RewardOutput
from visalign.toybox import scenes, styles
from visalign.trainer import Trainer
from visalign.trainers.reward_gradient import RewardGradient

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, PICTURES = records.RESULTS / "condition", ROOT / "benchmarks" / "condition.md", ROOT / "assets" / "pictures" / "condition"
RECIPE = "toybox_ctrl_u"
SCENES, LEVELS = 128, (12, 14, 16, 18)  # held out; steps of the recipe's grid from which they are recovered
SHOWN = slice(0, 6)
INK = 0.1  # difference from the ground from which on a scene's pixel is an object's
KEYS = ("agreement", "closeness", "strict", "second_judge")
READ: dict[str, dict[str, Any]] = {
    "clean": {"use": "condition", "kind": "colours", "form": "error"},
    "erring": {"use": "benchmarks.condition:ErringCondition", "share": 0.25, "haze": 0.5},
}
WEIGHTED: dict[str, dict[str, Any]] = {
    "none": {},
    "places": {"form": "attenuate", "kappa": 0.1},
    "pictures": {"form": "weight", "tolerance": 0.05},
}
CASES = (("clean", "none"), ("clean", "places"), ("erring", "none"), ("erring", "places"), ("erring", "pictures"))


class ErringCondition(Condition):
    """Agreement of the map of colours (`condition`, its form `error`), of pictures some of which are seen through a haze.

    Args:
        share: of the pictures that are.
        haze: share of the ground's colour in what is seen of them.
    """

    def __init__(self, share: float = 0.25, haze: float = 0.5):
        super().__init__("colours", form="error")
        self.share, self.haze = share, haze

    def score(self, batch: RewardInput) -> RewardOutput:
        return super().score(replace(batch, images=torch.stack([self.seen(image) for image in batch.images])))

    def seen(self, image: Tensor) -> Tensor:
        """What is seen of a picture (3, H, W)."""
        pixels = image.detach().mul(255).round().byte().cpu().numpy().tobytes()
        if random.Random(hashlib.sha256(pixels).digest()).random() >= self.share:
            return image
        return image + self.haze * (image.new_tensor(scenes.GROUND)[:, None, None] / 255 - image)


def overrides(read: str, weighted: str) -> dict[str, Any]:
    """What a run differs in from the recipe."""
    if weighted == "none":
        return {"rewards": {"consistency": READ[read]}, "trainer.view": None}
    return {"rewards": {"consistency": {"use": "uncertainty", "source": "two_views", "of": READ[read]} | WEIGHTED[weighted]}}


# --- held-out scenes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def recovered(trainer: Trainer, prompts: Prompts, level: int) -> tuple[Tensor, Tensor]:
    """Scenes (N, 3, H, W) of these prompts, and what the averaged weights recover of them from a level of noise."""
    assert isinstance(trainer, RewardGradient)
    family = trainer.policy.family
    texts, metadata = prompts.texts, prompts.metadata
    shown = torch.cat([styles.drawn(text, record, 1, seed=n) for n, (text, record) in enumerate(zip(texts, metadata, strict=True))])
    shown = shown.to(trainer.device)
    noise = gaussian(family.latent_shape, 0, prompts.noise_ids, 0, device=trainer.device)
    at = torch.full((len(prompts),), level)
    x = mix(family.path, family.encode_images(shown), noise, trainer.sigmas[at])
    with trainer.averaged():
        return shown, family.decode(trainer.finish(x, at, family.encode(texts, metadata))).clamp(0, 1)


def closeness(shown: Tensor, images: Tensor) -> Tensor:
    """(N,) in [0, 1]: 1 less the mean absolute difference of pictures (N, 3, H, W) from scenes, where these have objects."""
    ground = shown.new_tensor(scenes.GROUND)[:, None, None] / 255
    objects = (shown - ground).abs().amax(1) > INK
    return 1 - ((images - shown).abs().mean(1) * objects).sum((1, 2)) / objects.sum((1, 2))


def judge(trainer: Trainer) -> toybox.Judged:
    """The judges of every run, and `agreement` and `closeness` of recovered scenes, averaged over levels."""
    found, prompts = toybox.judge(trainer), trainer.examiner.prompts.take(slice(0, SCENES))
    clean, agreement, close = Condition("colours"), list[float](), list[float]()
    for level in LEVELS:
        for rows in torch.arange(len(prompts)).split(trainer.settings.micro_batch):
            some = prompts.take(rows)
            shown, images = recovered(trainer, some, level)
            references = [scene[None] for scene in shown]
            agreement += clean.score(RewardInput(images, some.texts, some.metadata, references=references)).scores.tolist()
            close += closeness(shown, images).tolist()
    return toybox.Judged(found.figures | {"agreement": statistics.fmean(agreement), "closeness": statistics.fmean(close)}, found.right)


def portrait(trainer: Trainer) -> Tensor:
    """(6, 3, H, W): the first scenes, recovered from the most noise."""
    return recovered(trainer, trainer.examiner.prompts.take(SHOWN), LEVELS[0])[1]


def key(seed: int, read: str, weighted: str, steps: int) -> str:
    """Equal for runs that would be the same."""
    return toybox.digest([toybox.fingerprint(toybox.load(RECIPE, seed, overrides(read, weighted)), 0.0), steps, SCENES, LEVELS])


def run(seed: int, read: str, weighted: str, steps: int, picture: Path | None = None) -> Run:
    """Train one case with one seed; what the judges said before and after, and where pictures of both go."""
    recipe = toybox.load(RECIPE, seed, overrides(read, weighted))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build.trainer(recipe.model_copy(update={"run": recipe.run.model_copy(update={"path": Path(scratch) / "run"})}))
        before, shown = toybox.base(trainer, FOLDER, judge), portrait(trainer)
        toybox.fit_decay(trainer, steps)
        ledger = toybox.Ledger()
        for step in range(1, steps + 1):
            with ledger.spending(trainer):
                trainer.step(step)
        curve = [toybox.Ledger().point(0, before.figures), ledger.point(steps, judge(trainer).figures)]
        if picture:
            picture.parent.mkdir(parents=True, exist_ok=True)
            toybox.before_after(shown, portrait(trainer), trainer.examiner.prompts.texts[: len(shown)]).save(picture)
    head = {"name": f"{read}_{weighted}", "seed": seed, "recipe": key(seed, read, weighted, steps), "steps": steps}
    return head | {"pictures": recipe.eval.images} | describe() | {"curve": curve}


# --- the page ----------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """One row per run."""
    groups, rows = by_name(runs), list[list[str]]()
    for read, weighted in CASES:
        some = groups.get(f"{read}_{weighted}")
        if some:
            seconds = f"{statistics.fmean(run['curve'][-1]['seconds'] for run in some):.0f}"
            figures = [change(some, key) for key in (*KEYS, "diversity")]
            rows.append([f"`{read}`", weighted, str(len(some)), seconds, *figures])
    return markdown(["reward", "weighting", "seeds", "seconds", *(key.replace("_", " ") for key in KEYS), "diversity"], rows)


def verdict(runs: Sequence[Run], better: tuple[str, str], worse: tuple[str, str], key: str) -> str:
    """How far one case ends above another, paired by seed."""
    ends = [{run["seed"]: run["curve"][-1][key] for run in runs if run["name"] == "_".join(case)} for case in (better, worse)]
    gaps = [value - ends[1][seed] for seed, value in ends[0].items() if seed in ends[1]]
    if len(gaps) < 2:
        return f"not known: {len(gaps)} seeds of both"
    return f"{mean_and_std(gaps)}, p = {over_seeds(gaps):.3f}"


def page(runs: Sequence[Run]) -> str:
    """condition.md."""
    machine = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    asked = {
        "what the errors cost: clean less erring, no weighting": (CASES[0], CASES[2]),
        "what weighting places is worth with the reward that errs": (CASES[3], CASES[2]),
        "what weighting pictures is worth there": (CASES[4], CASES[2]),
        "what weighting places is worth with the clean reward": (CASES[1], CASES[0]),
    }
    lines = [[text, *(verdict(runs, *pair, key) for key in KEYS)] for text, pair in asked.items()]
    shown = [f"{read}_{weighted}" for read, weighted in CASES if (PICTURES / f"{read}_{weighted}.png").exists()]
    parts = [
        "# Ctrl-U with a reward that errs",
        "Written by `python -m benchmarks.condition`; don't edit.",
        (__doc__ or "").split("\n\n", 1)[1].split("\n\nTwenty minutes")[0],
        f"Runs of {runs[0]['steps']} steps from the same base, {runs[0]['pictures']} held-out prompts; agreement is the mean soft "
        f"intersection over union of {SCENES} scenes at {len(LEVELS)} levels. Before → after, mean ± std over seeds.",
        table(runs),
        "Differences at the end, paired by seed, mean ± std, with p of a one-sided t-test over seeds:",
        markdown(["at the end", *(key.replace("_", " ") for key in KEYS)], lines),
        *(
            f"`{name}`, seed 0, scenes recovered before above after:\n\n![{name}](../assets/pictures/condition/{name}.png)"
            for name in shown
        ),
        "Made on: " + "; ".join(machine) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path = FOLDER, target: Path = PAGE) -> None:
    """The page, if there is a run."""
    if runs := load(folder):
        target.write_text(page(runs), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.condition", description="Ctrl-U with a reward that errs.")
    parser.add_argument("--steps", type=int, default=30, help="of training, for each run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    given = parser.parse_args()
    for seed in [] if given.only_table else map(int, given.seeds.split(",")):  # one seed of everything comes first
        for read, weighted in CASES:
            file = FOLDER / f"{read}_{weighted}-{seed}.json"
            if file.exists() and records.read(file)["recipe"] == key(seed, read, weighted, given.steps):
                print(f"{file.stem}: done before")
                continue
            picture = PICTURES / f"{read}_{weighted}.png" if seed == 0 and read == "erring" and weighted != "pictures" else None
            found = run(seed, read, weighted, given.steps, picture)
            records.write(file, found)
            said = (f"{name} {found['curve'][0][name]:.3f} → {found['curve'][-1][name]:.3f}" for name in ("agreement", "closeness"))
            print(f"{file.stem}: {', '.join(said)}", flush=True)
            write()
    write()


if __name__ == "__main__":
    main()
