"""The SDXL family against the stock pipeline under its own Euler scheduler, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.conformance import TEXTS, Conformance
from tests.tiny.sdxl import sdxl
from visalign import registry
from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.rollout import Prompts
from visalign.sampling import pictures


class TestSDXL(Conformance):
    build = staticmethod(sdxl)
    part = "mid_block"


def negative(folder: Path) -> list[bool]:
    """Whether the negative prompt's words, and their pooled summary, are anything but zeros."""
    found = registry.load_policy(str(folder)).family.encode(TEXTS).negative
    assert found is not None
    return [bool(found[name].any()) for name in ("text", "pooled")]


def test_a_negative_prompt_is_words_and_an_empty_one_zeros_where_the_config_says_so(tmp_path: Path) -> None:
    sdxl(tmp_path)
    assert not any(negative(tmp_path))
    policy, prompts = registry.load_policy(str(tmp_path), negative_prompt="a blue cross"), Prompts.of(TEXTS)
    noise = gaussian(policy.family.latent_shape, 0, prompts.noise_ids, 0)
    difference = pictures(policy, prompts, steps=3, seed=0, guidance=5.0) - policy.family.stock(TEXTS, noise, 3, 5.0)
    assert difference.abs().max() <= 1e-5
    sdxl(tmp_path / "words", zeros=False)
    assert all(negative(tmp_path / "words"))


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_students_step_on_trailing_times_to_clean_data(tmp_path: Path, kind: str) -> None:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    sdxl(tmp_path / "tiny-turbo", kind, timestep_spacing="trailing")
    policy, prompts = registry.load_policy(str(tmp_path / "tiny-turbo")), Prompts.of(TEXTS)
    assert policy.family.step_distilled
    assert policy.family.grid(4).tolist() == [999, 749, 499, 249, -1]
    assert policy.family.grid(1).tolist() == [999, -1]
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "tiny-turbo")
    stock.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler.set_timesteps(4)
    deviation = float(stock.scheduler.sigmas[0])
    noise = gaussian(policy.family.latent_shape, 0, prompts.noise_ids, 0) * (deviation**2 + 1) ** 0.5 / deviation  # to DDIM's start
    theirs = stock(prompt=TEXTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="pt").images
    assert (pictures(policy, prompts, steps=4, seed=0) - theirs).abs().max() <= 1e-5


def test_a_half_precision_vae_decodes_in_full(tmp_path: Path) -> None:
    sdxl(tmp_path)
    policy = registry.load_policy(str(tmp_path), dtype="fp16")
    assert policy.family.modules()["vae"].dtype == torch.float32
    assert policy.family.modules()["unet"].dtype == torch.float16


def test_a_model_of_another_process_is_refused(tmp_path: Path) -> None:
    sdxl(tmp_path, "EDMEulerScheduler")
    with pytest.raises(UserError, match="the model's scheduler, EDMEulerScheduler, has no table of alphas"):
        registry.load_policy(str(tmp_path))
