"""PickScore: the logit of a CLIP, optionally divided by 26."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from visalign.rewards.pickscore import PickScore
from visalign.scoring import RewardInput

BATCH = RewardInput(torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)), ["a ring", "a star", "a red ring"])


def test_score_is_the_logit(clip_folder: str) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    reward = PickScore(clip_folder)
    output = reward.score(BATCH)
    pixels = processor.image_processor(list((BATCH.images * 255).round().byte()), return_tensors="pt")
    texts = processor.tokenizer(BATCH.prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        official = model(**pixels, **texts).logits_per_image.diag()
    torch.testing.assert_close(output.scores, official, rtol=0, atol=0.05)  # 8-bit rounding, times a scale of 14
    torch.testing.assert_close(output.scores, model.logit_scale.exp().detach() * output.components["cosine"])
    assert tuple(output.embeddings["pickscore"].shape) == (3, 16)


def test_normalise_divides_by_26(clip_folder: str) -> None:
    raw, normalised = PickScore(clip_folder), PickScore(clip_folder, normalise=True)
    torch.testing.assert_close(normalised.score(BATCH).scores * 26, raw.score(BATCH).scores)
    assert raw.encoder is normalised.encoder


def test_processor_of_another_folder(clip_folder: str, tmp_path: Path) -> None:
    """As the published weights come: a model without tokenizer and picture processor."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(clip_folder) / name, bare)
    scores = PickScore(str(bare), processor=clip_folder).score(BATCH).scores
    torch.testing.assert_close(scores, PickScore(clip_folder).score(BATCH).scores)
