"""The toybox's video model: it trains, resumes, and what it saves loads in stock diffusers and as a policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from visalign import registry
from visalign.prompts import load
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.toybox import build_wan, moving_scenes, scenes

CPU = torch.device("cpu")


def test_it_trains_resumes_and_draws_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"VIDEOS": 6, "VAE_STEPS": 2, "VAE_BATCH": 2, "FLOW_STEPS": 10, "BATCH": 2, "STOCK_BATCH": 1, "SETTINGS": ((2, 1.0),)}
    for name, value in small.items():
        monkeypatch.setattr(build_wan, name, value)
    monkeypatch.setattr(build_wan.measure, "__defaults__", (2,))
    for _ in range(2):  # the second time there is nothing left to train
        build_wan.build(tmp_path / "out", tmp_path / "work", CPU)
    assert set(json.loads((tmp_path / "out" / "wan" / "quality.json").read_text())) == {
        "strict_2_steps_guidance_1",
        "motion_2_steps_guidance_1",
    }
    prompts = load(tmp_path / "out" / "moving_test.jsonl")
    assert prompts.metadata[0]["motion"] in scenes.DIRECTIONS
    known = set(load(tmp_path / "out" / "moving_train.jsonl").texts)
    assert not known & set(prompts.texts)
    stock = WanPipeline.from_pretrained(tmp_path / "out" / "wan")
    call = {"height": 64, "width": 64, "num_frames": moving_scenes.FRAMES, "num_inference_steps": 2, "guidance_scale": 1.0}
    assert stock(prompts.texts[0], output_type="pt", **call).frames.shape == (1, moving_scenes.FRAMES, 3, 64, 64)
    policy = registry.load_policy(str(tmp_path / "out" / "wan"), resolution=64, frames=moving_scenes.FRAMES, max_sequence_length=8)
    assert pictures(policy, Prompts.of(prompts.texts[:1]), steps=2, seed=0).shape == (1, moving_scenes.FRAMES, 3, 64, 64)


def test_the_autoencoder_sees_what_moves_in_whole_latents() -> None:
    videos, _ = build_wan.draw(5, seed=0)
    coded = torch.zeros(5, 1, 3, 64, 64)  # every pixel says which latent it belongs to
    torch.manual_seed(0)
    cut = build_wan.crops(videos, 40)
    assert cut.shape == (40, moving_scenes.FRAMES, 3, build_wan.CROP, build_wan.CROP)
    assert (cut != scenes.GROUND[0]).flatten(1).any(1).all()
    coded[:] = (torch.arange(64) // 8).float()
    coded[:, :, 1] = (torch.arange(64) // 8).float()[:, None]
    rows, columns = build_wan.crops(coded, 40)[:, 0, 1, :, 0], build_wan.crops(coded, 40)[:, 0, 0, 0, :]
    for places in (rows, columns):
        assert (places.unflatten(1, (-1, 8)).diff(dim=2) == 0).all()


def test_more_of_the_prompts_padding_is_no_other_prompt() -> None:
    """As many tokens as a stock call pads to are more zeros, at the end."""
    torch.manual_seed(0)
    pipeline = build_wan.assemble(build_wan.small_vae())
    model = build_wan.Denoiser(pipeline)
    text = pipeline.tokenizer(["a red circle moving left"], padding="max_length", max_length=8, return_tensors="pt")
    x, sigma = torch.randn(1, build_wan.CHANNELS, 5, 8, 8), torch.tensor([0.5])
    said = model(x, sigma, text.input_ids, text.attention_mask, 12)
    embedded = pipeline.encode_prompt("a red circle moving left", do_classifier_free_guidance=False, max_sequence_length=12)[0]
    wanted = pipeline.transformer(x, sigma * 1000, embedded, return_dict=False)[0]
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-5)
