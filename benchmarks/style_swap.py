"""`python -m benchmarks.style_swap [STYLE …] [--steps 75] [--seed 0]`: does an adversarial reward carry over a look?

The only reward is a head that tells the policy's pictures from 200 reference pictures of another style, of training compositions. Nothing
else says what the style is. The head looks at pixels, because encoders of meaning hardly see a palette; the policy follows its gradient at
clean estimates of late steps, with a penalty against the model before training. On held-out pictures, `share` is how much of the ink has
the style's colour, and `shapes` the share of pictures that show what their prompt says when nobody asks for colours.

A policy in latent space can show no look that its decoder can't draw, so this is measured first, on pictures that the autoencoder has
encoded and decoded: the toybox's was taught one ground and eight colours, and draws all others as the nearest of these.

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
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures as sample
from visalign.toybox import perception, scenes, styles
from visalign.trainer import Trainer

FILE, PAGE = records.RESULTS / "style_swap.json", Path(__file__).with_suffix(".md")
REFERENCES, SHOWN, MEASURED = 200, 8, 128  # pictures
BAND = 0.55, 0.9  # in which a head's accuracy should stay
LOOKS = ("plain", "pastel", "night", "ink", "chalk")
HEAD: dict[str, Any] = {"checkpoint": "pixels", "jitter": 0.1, "lr": 1e-3, "steps": 4, "max_accuracy": 0.85, "count": 4}
RECIPE: dict[str, Any] = {"trainer.estimate": [2, 5], "trainer.kl": 0.1, "trainer.prompts": 16, "trainer.micro_batch": 16}
RECIPE |= {"optimizer.lr": 3e-4, "optimizer.final_lr": 1e-4, "optimizer.decay_steps": 110}
TRIED = Path(__file__).parent / "results" / "style_swap_tried.json"


def scenes_of(style: str) -> Tensor:
    """(REFERENCES, 3, 64, 64): training compositions in this style."""
    rng, by_kind = random.Random(0), scenes.prompts(test=False)
    asked = [rng.choice(by_kind[scenes.KINDS[n % len(by_kind)]]) for n in range(REFERENCES)]
    return torch.cat([styles.drawn(scenes.describe(record), record, 1, seed=n, style=style) for n, record in enumerate(asked)])


def share(images: Tensor, style: str) -> float:
    """Of all pixels of (N, 3, H, W) that are not nearest to the ground, how many are nearest to the style's colour."""
    colours = {"ground": scenes.GROUND, **scenes.COLOURS}
    own = list(colours.values()).index(styles.STYLES[style].wash)
    near = torch.cdist(images.permute(0, 2, 3, 1).reshape(-1, 3), torch.tensor(list(colours.values())) / 255).argmin(1)
    return ((near == own).sum() / (near > 0).sum()).item()


def shapes(images: Tensor, prompts: Prompts) -> float:
    """Share of pictures whose objects are exactly those of the prompt, of whatever colour."""
    found: list[float] = []
    for view, text, metadata in zip(perception.look(images), prompts.texts, prompts.metadata, strict=True):
        record = scenes.wanted(metadata, text)
        assert record
        bare = [{key: value for key, value in clause.items() if key != "color"} for clause in record["include"]]
        found.append(scenes.meets(view.objects, {"include": bare})[0])
    return sum(found) / len(found)


@torch.no_grad()
def reach(policy: Policy) -> dict[str, float]:
    """Style -> root mean square error, in levels of 255, of its scenes after encoding and decoding."""
    family = policy.family
    drawn = {style: scenes_of(style)[:32] for style in LOOKS}
    errors = {style: (family.decode(family.encode_images(images)) - images).square().mean().sqrt() for style, images in drawn.items()}
    return {style: records.rounded(255 * error.item()) for style, error in errors.items()}


def drawn(trainer: Trainer, prompts: Prompts) -> Tensor:
    """(MEASURED, 3, H, W), the same noise before and after."""
    with trainer.averaged():
        return sample(trainer.policy, prompts, steps=trainer.config.policy.steps, seed=0)


def swap(style: str, seed: int, steps: int) -> dict[str, Any]:
    """Train on this style's references alone; what was measured."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "references"
        pictures.save(scenes_of(style), folder, [f"{n:03d}" for n in range(REFERENCES)])
        reward = HEAD | {"use": "adversarial", "references": str(folder)}
        changes = {"rewards": {"adversarial": reward}, "run.path": str(Path(scratch) / "run")}
        trainer = build.trainer(toybox.load("toybox_reward_gradient", seed, changes | RECIPE))
        prompts = trainer.examiner.prompts.take(slice(0, MEASURED))
        decoder, before = reach(trainer.policy), drawn(trainer, prompts)
        rows = [trainer.step(step) for step in range(1, steps + 1)]
        after = drawn(trainer, prompts)
    pictures.before_after(before[:SHOWN], after[:SHOWN], prompts.texts[:SHOWN]).save(PICTURES / f"style_{style}.png")
    accuracy = torch.tensor([row["reward_update/adversarial/d_accuracy"] for row in rows])
    report: dict[str, Any] = {"accuracy": [accuracy.quantile(q).item() for q in (0.1, 0.5, 0.9)]}
    report["in_band"] = ((accuracy >= BAND[0]) & (accuracy <= BAND[1])).float().mean().item()
    report |= {
        "share": [share(images, style) for images in (before, after)],
        "shapes": [shapes(images, prompts) for images in (before, after)],
    }
    seconds = records.rounded(sum(row["seconds"] for row in rows))
    return report | {"steps": steps, "seconds": seconds, "reach": decoder, "rows": toybox.columns(rows)} | describe()


def row(name: str, run: dict[str, Any]) -> list[str]:
    figures = [f"{run[key][0]:.3f} → {run[key][1]:.3f}" for key in ("share", "shapes")]
    return [name, f"{run['steps']}", *figures, " / ".join(f"{value:.2f}" for value in run["accuracy"]), f"{run['in_band']:.0%}"]


def page(found: dict[str, dict[str, Any]]) -> str:
    text = (__doc__ or "").split("\n\n", 1)[1].split("\n\nWrites")[0]
    errors = next(iter(found.values()))["reach"]
    decoder = records.markdown(["style", "error of decoder(encoder(scene)), of 255"], [[f"`{s}`", f"{e:.1f}"] for s, e in errors.items()])
    head = ["run", "steps", "share", "shapes", "head's accuracy: 10 %, median, 90 % of steps", f"in {BAND[0]}–{BAND[1]}"]
    runs = records.markdown(head, [row(f"`{name}`", run) for name, run in found.items()])
    tried = records.markdown(head, [row(name, run) for name, run in records.read(TRIED).items()])
    shown = dict.fromkeys(name.partition(",")[0] for name in found)
    grids = [f"`{style}`, before above after:\n\n![{style}](../assets/pictures/rewards/style_{style}.png)" for style in shown]
    before = f"What was tried first, on `ink`; each ended after 150 to 500 seconds of a shared processor, or 70 steps:\n\n{tried}"
    return "\n\n".join(["# A look learnt from 200 pictures", text, decoder, runs, *grids, before]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_swap", description="An adversarial reward on another look.")
    parser.add_argument("styles", nargs="*", metavar="STYLE", help="of one colour: ink (the default), chalk")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = records.read(FILE) if FILE.exists() else {}
    for style in given.styles or ("ink",):
        name, asked = f"{style}, seed {given.seed}", toybox.digest([HEAD, RECIPE, given.steps])
        if found.get(name, {}).get("asked") != asked:
            found[name] = {"asked": asked} | swap(style, given.seed, given.steps)
            records.write(FILE, found)
        PAGE.write_text(page(found), encoding="utf-8")
        print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
