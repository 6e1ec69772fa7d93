"""The preflight passes on every packaged recipe, and fails where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.conftest import save_tiny_sd3, tiny_dino
from tests.rewards.conftest import tiny_clip, tiny_detector
from tests.tiny import flux2
from tests.tiny.flux import flux, kontext
from tests.tiny.qwen_image import qwen_image, qwen_image_edit
from tests.tiny.sana import sana, sana_sprint
from tests.tiny.sdxl import sdxl
from tests.tiny.wan import wan21
from tests.tiny.z_image import z_image
from visalign import build, check, config, registry
from visalign.axes import Exploration
from visalign.pictures import save
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

SMALL = ["policy.resolution=64", "policy.options.max_sequence_length=10"]
TINY: dict[str, tuple[Callable[[Path], object], list[str]]] = {  # word in a recipe's name -> saves a tiny model, and what makes it fit
    "sd35": (partial(save_tiny_sd3, narrow=True), SMALL),
    "sd15": (tiny_models.sd15, ["policy.resolution=64", "policy.steps=4"]),
    "sdxl": (sdxl, ["policy.resolution=32", "policy.steps=3"]),
    "flux2_dev": (flux2.dev, ["policy.resolution=32", "policy.options.max_sequence_length=40"]),
    "flux2_klein": (flux2.klein, ["policy.resolution=32", "policy.options.max_sequence_length=64"]),
    "kontext": (kontext, ["policy.resolution=32", "policy.options.max_sequence_length=12"]),
    "wan21": (wan21, ["policy.options.max_sequence_length=8", "policy.resolution=16", "policy.steps=3"]),
    "flux": (flux, ["policy.resolution=32", "policy.options.max_sequence_length=12"]),
    "qwen_image_edit": (qwen_image_edit, ["policy.resolution=64"]),
    "qwen_image": (qwen_image, ["policy.resolution=32"]),
    "z_image": (z_image, ["policy.resolution=32", "policy.options.max_sequence_length=40"]),
    "sana_sprint": (sana_sprint, ["policy.resolution=32"]),
    "sana": (sana, ["policy.resolution=32"]),
}
SHORT = {  # of 10 to 50 steps, which teach a tiny model nothing more; what a recipe says of single steps has to fit
    "branch_grpo_sd35_pickscore": ["exploration.branches=[0,2]"],
    "reward_gradient_sd35_directional": ["trainer.estimate=[0,4]"],
    "reward_gradient_sd35_hps": ["trainer.depth=[1,4]"],
    "reward_gradient_sd35_image_reward": ["trainer.estimate=[2,4]"],
    "tempflow_grpo_sd35_pickscore": ["exploration.range=[0,2]"],
}


def failures(findings: list[check.Finding]) -> list[str]:
    return [str(finding) for finding in findings if not finding.passed]


def edits(folder: Path) -> list[str]:
    """Counting edits with a picture and a reference each, as a user would bring them, and the tiny judge of likeness."""
    scene = save(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), folder, ["scene"])[0]
    told = [{"prompt": "make it two cups", "condition": str(scene), "include": [{"class": "cup", "count": 2}]}]
    for file, records in (("edits", told), ("references", [{"prompt": told[0]["prompt"], "images": [str(scene)]}])):
        (folder / f"{file}.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    words = [f"prompts.{part}={folder / 'edits.jsonl'}" for part in ("train", "test")]
    return [*words, f"rewards.dino.references={folder / 'references.jsonl'}", f"rewards.dino.checkpoint={tiny_dino(folder / 'dino')}"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model for a recipe by its name, saved once."""
    root = tmp_path_factory.mktemp("models")

    def saved(recipe: str) -> Path:
        kind = next(word for word in TINY if word in recipe)
        if not (root / kind).is_dir():
            torch.manual_seed(0)
            TINY[kind][0](root / kind)
        return root / kind

    return saved


def on_tiny_models(name: str, model: Path, folder: Path) -> config.Config:
    """A packaged recipe with its model and rewards replaced by tiny random ones of the same classes."""
    whole = build.completed(config.load(name), registry.load("trainers", config.load(name).trainer.name).defaults)
    assert Exploration(whole.exploration, whole.policy.steps, 0).plan(1)  # with all its steps
    words = [
        f"policy.model={model}",
        "run.device=cpu",
        f"policy.steps={min(5, whole.policy.steps)}",
        *TINY[model.name][1],
        *SHORT.get(name, []),
    ]
    if "wan" in name:
        frames = 1 if name.startswith("dance") else 5
        words += [f"policy.options.frames={frames}", "rewards={jpeg: {use: segmental, of: {use: jpeg}, segments: 1}}"]
        return config.load(name, [*words, "eval.rewards={jpeg: {use: segmental, of: {use: jpeg}, segments: 1}}"])
    if "aesthetic" in name:
        clip, head = tiny_clip(folder / "clip"), tiny_models.aesthetic_head(folder / "head.pth", 16)
        words += [f"rewards.aesthetic={{use: aesthetic, checkpoint: {clip}, head: {head}}}", "eval.rewards={jpeg: 1.0}"]
    if "pickscore" in name:
        clip = tiny_clip(folder / "clip")
        words += [f"rewards.pickscore.checkpoint={clip}", "eval.rewards={jpeg: 1.0}"]
    if "kontext" in name or "edit" in name:
        words += edits(folder)
    if "geneval" in name:
        clip, detector = tiny_clip(folder / "clip"), tiny_detector(folder / "detector")
        words += [f"rewards.geneval.checkpoint={detector}", f"rewards.geneval.color_checkpoint={clip}", "rewards.geneval.short_side=64"]
        words += ["eval.rewards={jpeg: 1.0}"]
    if name.startswith("noise_hypernet"):
        words += [f"rewards={{pickscore: {{use: pickscore, checkpoint: {tiny_clip(folder / 'clip')}}}}}", "eval.rewards={jpeg: 1.0}"]
    if "hps" in name:
        words += [f"rewards.hps.checkpoint={tiny_clip(folder / 'clip')}", "eval.rewards={jpeg: 1.0}"]
    if "directional" in name:
        words += [f"rewards.directional.of.checkpoint={tiny_clip(folder / 'clip')}", "rewards.directional.pictures=4"]
        words += ["eval.rewards={jpeg: 1.0}"]
    if "image_reward" in name or name == "mix_grpo_flux_hps":
        words += [f"rewards.image_reward.checkpoint={tiny_models.blip(folder / 'blip')}", "eval.rewards={jpeg: 1.0}"]
    if "distillation" in name:
        words += [f"rewards.diversity.checkpoint={tiny_dino(folder / 'dino')}", "eval.rewards={jpeg: 1.0}"]
    if name == "mix_grpo_flux_hps":
        words += [f"rewards.pickscore={{use: pickscore, checkpoint: {folder / 'clip'}}}", "policy.steps=8"]
    if "flux2_dev" in name:
        words += [f"rewards.clip_score={{use: clip_score, checkpoint: {folder / 'clip'}}}"]
    if "ocr" in name:
        words += ["eval.rewards={jpeg: 1.0}"]
    return config.load(name, words)


@pytest.mark.parametrize("name", [name for name in config.packaged() if not name.startswith(("toybox", "noise_optimization"))])
def test_published_recipes_pass_on_a_tiny_folder_of_their_classes(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    findings = list(check.run(on_tiny_models(name, models(name), tmp_path)))
    assert len(findings) == len(check.CHECKS)
    assert not failures(findings)


def test_the_default_recipe_passes_and_equals_the_stock_pipeline() -> None:
    findings = {f.name: f for f in check.run(config.load("toybox", ["run.device=cpu"]))}
    assert not failures(list(findings.values()))
    assert "limit 1e-05" in findings["stock pipeline"].figure
    assert findings["replay"].figure.startswith("max |ratio - 1| = 0.00e+00")


class Drifting(Reward):
    """Scores the same picture differently each time, and above its range."""

    spec = RewardSpec("drifting", range=(0.0, 1.0))
    calls = 0

    def score(self, batch: RewardInput) -> RewardOutput:
        Drifting.calls += 1
        return RewardOutput.of(torch.full((len(batch),), 0.1 * Drifting.calls))


def test_a_reward_that_changes_its_mind_is_found(tiny_sd3: Path) -> None:
    words = [f"policy.model={tiny_sd3}", "run.device=cpu", *SMALL[1:], "eval.rewards={jpeg: 1.0}"]
    words += ["rewards={d: {use: 'tests.test_check:Drifting'}}"]
    found = failures(list(check.run(config.load("toybox", words))))
    assert len(found) == 1
    assert "again changed a score" in found[0]
