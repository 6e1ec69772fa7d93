"""`python -m benchmarks.style_swap [STYLE …] [--seconds 300] [--seed 0]`: does an adversarial reward carry over a look?

Trained by direct gradients, as the reward is differentiable: the pictures of a group share their ground, so comparing them is silent on it.

The only reward is a head that tells the policy's pictures from 200 reference pictures of another style (ground and palette), of
training compositions. Nothing else says what the style is. `moved` is how far the median colour of held-out pictures, which is their
ground, has gone from the model's own ground (0) to the references' (1); the verifier and the second judge know the old palette alone.

Writes results/style_swap.json, style_swap.md and pictures; a style that is there and was made by the same recipe is not made again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, toybox
from benchmarks.machine import describe
from benchmarks.reward_runs import PICTURES
from visalign import build, pictures
from visalign.sampling import pictures as sample
from visalign.toybox import scenes, styles
from visalign.trainer import Trainer

FILE, PAGE = records.RESULTS / "style_swap.json", Path(__file__).with_suffix(".md")
REFERENCES, SHOWN, MEASURED = 200, 8, 128  # pictures
BAND = 0.55, 0.9  # in which a head's accuracy should stay
HEAD: dict[str, Any] = {"lr": 1e-3, "max_accuracy": 0.85, "count": 4}
RECIPE: dict[str, Any] = {"policy.train": [], "trainer.depth": 2, "trainer.prompts": 16, "trainer.micro_batch": 16}
RECIPE |= {"optimizer.lr": 5e-5, "optimizer.final_lr": 5e-6, "trainer.kl": 0.0}


def references(style: str, folder: Path) -> Path:
    """A folder of scenes of training compositions in this style."""
    rng, by_kind = random.Random(0), scenes.prompts(test=False)
    asked = [rng.choice(by_kind[scenes.KINDS[n % len(by_kind)]]) for n in range(REFERENCES)]
    images = torch.cat([styles.drawn(scenes.describe(record), record, 1, seed=n, style=style) for n, record in enumerate(asked)])
    pictures.save(images, folder, [f"{n:03d}" for n in range(REFERENCES)])
    return folder


def moved(images: Tensor, style: str) -> float:
    """Mean over pictures (N, 3, H, W): 0 where the ground is the model's own, 1 where it is the style's."""
    own, other = (torch.tensor(styles.STYLES[name].ground) / 255 for name in ("plain", style))
    way = other - own
    return ((images.flatten(2).median(-1).values - own) @ way / way.square().sum()).mean().item()


def drawn(trainer: Trainer) -> Tensor:
    """(MEASURED, 3, H, W) of held-out prompts, the same noise before and after."""
    with trainer.averaged():
        return sample(trainer.policy, trainer.examiner.prompts.take(slice(0, MEASURED)), steps=trainer.config.policy.steps, seed=0)


def swap(style: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train on this style's references alone; what was measured."""
    with tempfile.TemporaryDirectory() as scratch:
        reward = HEAD | {"use": "adversarial", "references": str(references(style, Path(scratch) / "references"))}
        recipe = toybox.load("toybox_reward_gradient", seed, {"rewards": {"adversarial": reward}} | RECIPE)
        place = lambda part: {"run": recipe.run.model_copy(update={"path": Path(scratch) / part})}  # noqa: E731
        pace = toybox.pace(build.trainer(recipe.model_copy(update=place("pilot"))), seconds)
        trainer = build.trainer(recipe.model_copy(update=place("run")))
        before, images = toybox.judge(trainer), drawn(trainer)
        found = toybox.train(trainer, seconds, pace, before, 1)
        after = drawn(trainer)
    texts = trainer.examiner.prompts.texts[:SHOWN]
    pictures.before_after(images[:SHOWN], after[:SHOWN], texts).save(PICTURES / f"style_{style}.png")
    accuracy = torch.tensor(found["rows"]["reward_update/adversarial/d_accuracy"])
    report = {"moved": [moved(images, style), moved(after, style)], "accuracy": [accuracy.quantile(q).item() for q in (0.1, 0.5, 0.9)]}
    report["in_band"] = ((accuracy >= BAND[0]) & (accuracy <= BAND[1])).float().mean().item()
    report |= {key: [found["curve"][n][key] for n in (0, -1)] for key in ("strict", "second_judge", "diversity")}
    return report | {"steps": found["steps"], "rows": found["rows"]} | describe()


def page(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            f"`{name}`",
            f"{run['steps']}",
            *(f"{run[key][0]:.3f} → {run[key][1]:.3f}" for key in ("moved", "strict", "second_judge", "diversity")),
            " / ".join(f"{value:.2f}" for value in run["accuracy"]),
            f"{run['in_band']:.0%}",
        ]
        for name, run in found.items()
    ]
    head = ["style, seed, seconds", "steps", "moved", "verifier, strict", "second judge", "diversity"]
    head += ["head's accuracy: 10 %, median, 90 % of steps", f"in {BAND[0]}–{BAND[1]}"]
    text = (__doc__ or "").split("\n\n", 1)[1].split("\n\nWrites")[0]
    shown = dict.fromkeys(name.partition(",")[0] for name in found)
    grids = [f"`{style}`, before above after:\n\n![{style}](../assets/pictures/rewards/style_{style}.png)" for style in shown]
    return "\n\n".join(["# A look learnt from 200 pictures", text, records.markdown(head, rows), *grids]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_swap", description="An adversarial reward on another look.")
    parser.add_argument("styles", nargs="*", metavar="STYLE", help="of the toybox (default: pastel night)")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = records.read(FILE) if FILE.exists() else {}
    for style in given.styles or ("pastel", "night"):
        name, asked = f"{style}, {given.seed}, {given.seconds:g}", toybox.digest([HEAD, RECIPE])
        if found.get(name, {}).get("asked") != asked:
            found[name] = {"asked": asked} | swap(style, given.seed, given.seconds)
            records.write(FILE, found)
        PAGE.write_text(page(found), encoding="utf-8")
        print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
