"""The FLUX.1 family against the stock pipeline, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.families.conformance import Conformance
from tests.tiny.flux import flux
from visalign import registry
from visalign.errors import UserError
from visalign.rollout import Prompts
from visalign.sampling import pictures

TEXTS = ["two red circles", "a star left of a ring"]


def packed(noise: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(noise, *noise.shape)


class TestFlux(Conformance):
    build = staticmethod(flux)
    part = "single_transformer_blocks"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 12, "distilled_guidance": 2.5, "negative_prompt": "a blue cross"}

    def packed(self, noise: Tensor) -> Tensor:
        return packed(noise)

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        negative = ["a blue cross"] * len(prompts)
        return {"true_cfg_scale": guidance, "guidance_scale": 2.5, "negative_prompt": negative, "max_sequence_length": 12}


def test_the_shift_follows_the_size_of_the_pictures(tmp_path: Path) -> None:
    flux(tmp_path)
    small, large = (registry.load_policy(str(tmp_path), resolution=side).family.grid(4) for side in (32, 64))
    assert small[0] == large[0] == 1
    assert (large[1:-1] > small[1:-1]).all(), "larger pictures are noised longer"
    ratio = (large[1:-1] / (1 - large[1:-1])) / (small[1:-1] / (1 - small[1:-1]))
    mu = 0.65 * (256 - 64) / 192  # from 64 to 256 tokens, base_shift 0.5 to max_shift 1.15
    assert torch.allclose(ratio, torch.full_like(ratio, mu).exp(), rtol=1e-4), "σ = e^μ s / (1 + (e^μ - 1) s)"


def test_schnell_takes_no_guidance_and_has_a_grid_without_a_shift(tmp_path: Path) -> None:
    flux(tmp_path / "tiny-schnell", guided=False, use_dynamic_shifting=False, shift=1.0)
    policies = [registry.load_policy(str(tmp_path / "tiny-schnell"), resolution=32, distilled_guidance=g) for g in (1.0, 8.0)]
    assert policies[0].family.step_distilled
    assert torch.allclose(policies[0].family.grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    first, second = (pictures(policy, Prompts.of(TEXTS), steps=2, seed=0) for policy in policies)
    assert torch.equal(first, second)


def test_distilled_guidance_is_an_input_of_dev(tmp_path: Path) -> None:
    flux(tmp_path)
    first, second = (
        pictures(registry.load_policy(str(tmp_path), resolution=32, distilled_guidance=g), Prompts.of(TEXTS), steps=2, seed=0)
        for g in (1.0, 8.0)
    )
    assert (first - second).abs().max() > 1e-4


def test_pictures_of_part_of_a_patch_are_refused(tmp_path: Path) -> None:
    flux(tmp_path)
    with pytest.raises(UserError, match=r"policy\.resolution=34: this model draws multiples of 4 pixels; use 32"):
        registry.load_policy(str(tmp_path), resolution=34)
