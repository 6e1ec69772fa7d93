"""What the contract tests need to know of single rewards: how to build one offline, and pictures that it can score.

A reward without an entry is built by its class with no arguments and scores toybox scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tests import tiny_models
from tests.conftest import save_tiny_vlm, tiny_dino
from visalign import registry
from visalign.features import locate
from visalign.scoring import Reward, RewardInput
from visalign.toybox import scenes

PROMPTS = ("a red star", "two blue circles", "a green ring left of a cross", "a black square and a yellow triangle")


def tiny_clip(folder: Path) -> str:
    """A transformers CLIP with random weights and the toybox's tokenizer, and no open_clip files."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(locate("toybox/clip"))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": len(tokenizer) - 1, "max_position_embeddings": 14}
    torch.manual_seed(0)
    picture = {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=tower | tokens, vision_config=tower | picture, projection_dim=16)).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)


def tiny_detector(folder: Path) -> str:
    """A Mask2Former of COCO's 80 classes with random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 10}
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=80, **width, **layers)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor().save_pretrained(folder)
    return str(folder)


def dino_folder(folder: Path) -> str:
    """The toybox's DINO where it has been made, else a tiny one."""
    return "toybox/dino" if registry.asset("toybox/dino").is_dir() else tiny_dino(folder / "dino")


def preference_head(folder: Path) -> str:
    """An untrained head on the toybox's CLIP."""
    from visalign.heads import PreferenceHead

    torch.manual_seed(0)
    PreferenceHead("toybox/clip", 96, 16).save(folder)
    return str(folder)


def _class(name: str) -> type[Reward]:
    return registry.load("rewards", name)


def _geneval(folder: Path) -> Reward:
    return _class("geneval")(
        checkpoint=tiny_detector(folder / "detector"),
        color_checkpoint=tiny_clip(folder / "clip"),
        confidence=1e-3,  # so that random weights find something
        counting_confidence=1e-3,
        short_side=64,
    )


def _clip(**options: Any) -> Reward:
    return _class("clip_score")(checkpoint="toybox", **options)


def _calibrated(reward: Reward) -> Reward:
    reward.calibrate(scene_batch())
    return reward


FACTORIES: dict[str, Callable[[Path], Reward]] = {
    # Rounded pictures have no differences to compare gradients with.
    "adversarial": lambda folder: _class("adversarial")(checkpoint=dino_folder(folder), references="toybox", eight_bits=False),
    "condition": lambda folder: _class("condition")(references="toybox"),
    # The best of many, patches of plain ground or references, changes with every step, and with it the slope.
    "dino": lambda folder: _class("dino")(checkpoint=dino_folder(folder), references="toybox", patches="aligned", reduce="mean"),
    "diversity": lambda folder: _class("diversity")(checkpoint=dino_folder(folder)),
    "lambda_harmonic": lambda folder: _class("lambda_harmonic")(checkpoint=tiny_clip(folder), references="toybox"),
    "aesthetic": lambda folder: _class("aesthetic")(checkpoint="toybox", head=tiny_models.aesthetic_head(folder / "head.pth", 96)),
    "clip_score": lambda folder: _clip(),
    "directional": lambda folder: _calibrated(_class("directional")(of=_clip(), steps=20)),
    "gate": lambda folder: _class("gate")({"clip": (_clip(), 1.0), "ok": (_class("toybox")(), 1.0)}, gate="ok", threshold=0, failed=-1.0),
    "geneval": _geneval,
    "geometric": lambda folder: _class("geometric")({"clip": (_clip(), 2.0), "goal": (_clip(baseline="a picture"), 1.0)}),
    "hps": lambda folder: _class("hps")(checkpoint="toybox"),
    "hps3": lambda folder: _class("hps3")(checkpoint=tiny_models.hps3(folder), dtype="fp32"),
    "image_reward": lambda folder: _class("image_reward")(checkpoint=tiny_models.blip(folder)),
    "listener": lambda folder: _class("listener")(checkpoint=save_tiny_vlm(folder), listener=str(folder)),
    "pairwise_winrate": lambda folder: _class("pairwise_winrate")(checkpoint=save_tiny_vlm(folder)),
    "pickscore": lambda folder: _class("pickscore")(checkpoint=tiny_clip(folder)),
    "prompt_echo": lambda folder: _class("prompt_echo")(checkpoint=save_tiny_vlm(folder)),
    "segmental": lambda folder: _class("segmental")(of=_class("clip_score")(checkpoint="toybox"), random=False),
    "shaped": lambda folder: _calibrated(_class("shaped")(of=_clip())),
    "uncertainty": lambda folder: _class("uncertainty")(of=_clip(), changes=2),  # a third is JPEG, whose gradient is not its slope
    "video_reward": lambda folder: _class("video_reward")(checkpoint=tiny_models.video_reward(folder), dtype="fp32"),
    "vlm_rating": lambda folder: _class("vlm_rating")(checkpoint=save_tiny_vlm(folder)),
    "vlm_yes": lambda folder: _class("vlm_yes")(checkpoint=save_tiny_vlm(folder)),
    "preference": lambda folder: _class("preference")(preference_head(folder)),
}


def scene_batch() -> RewardInput:
    """Four slightly noisy toybox scenes of two groups, with every field that a reward may need."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    records = [scenes.parse(prompt) for prompt in PROMPTS]
    assert all(records)
    pictures = [np.asarray(scenes.render(scenes.lay_out(record, rng))) for record in records if record]
    clean = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    images = (clean + 0.01 * torch.randn(clean.shape, generator=generator)).clamp(0.02, 0.98)
    return RewardInput(
        images=images,
        prompts=list(PROMPTS),
        metadata=[record for record in records if record],
        video=images.unsqueeze(1).repeat(1, 5, 1, 1, 1),
        references=[images[:2], images[1:3], images[2:], images[:2]],
        groups=torch.tensor([0, 0, 1, 1]),
        latents=torch.randn(4, 4, 16, 16, generator=generator),
        sigma=torch.tensor([0.2, 0.4, 0.6, 0.8]),
    )


def bare_batch() -> RewardInput:
    """The same pictures without references of their own: among those of `scene_batch` is the picture itself, whose cosine has no slope."""
    return replace(scene_batch(), references=None)


def coco_batch() -> RewardInput:
    """The same pictures, asking for objects of photographs."""
    batch = scene_batch()
    clauses = ({"class": "bench"}, {"class": "dog", "color": "red"}, {"class": "cat"}, {"class": "clock"})
    metadata = [{"tag": "single_object", "include": [{"count": 1} | clause]} for clause in clauses]
    return RewardInput(batch.images, batch.prompts, metadata)


def text_batch() -> RewardInput:
    """Dark words on a light ground, the last one not what its prompt asks for."""

    def drawn(text: str) -> Tensor:
        picture = Image.new("RGB", (160, 96), (236, 230, 214))
        ImageDraw.Draw(picture).text((16, 24), text, fill=(30, 20, 70), font=ImageFont.load_default(36))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    images = torch.stack([drawn(text) for text in ("OPEN", "CLOSED")])
    noise = 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return RewardInput((images + noise).clamp(0.02, 0.98), [f'a sign that says "{text}"' for text in ("OPEN", "HOUSE")])


BATCHES: dict[str, Callable[[], RewardInput]] = {"condition": bare_batch, "dino": bare_batch, "geneval": coco_batch, "ocr": text_batch}


@pytest.fixture(scope="session")
def build_reward() -> Callable[[str, Path], Reward]:
    """(name, empty folder) -> the reward."""
    return lambda name, folder: FACTORIES[name](folder) if name in FACTORIES else _class(name)()


@pytest.fixture(scope="session")
def batch_of() -> Callable[[str], RewardInput]:
    """name -> inputs that the reward can score."""
    return lambda name: BATCHES.get(name, scene_batch)()


@pytest.fixture
def clip_folder(tmp_path: Path) -> str:
    return tiny_clip(tmp_path / "tiny_clip")
