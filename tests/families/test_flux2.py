"""The FLUX.2 family against the stock pipelines, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.families.conformance import Conformance
from tests.tiny import flux2
from visalign import registry
from visalign.errors import UserError
from visalign.rollout import Prompts


class TestDev(Conformance):
    build = staticmethod(flux2.dev)
    part = "single_transformer_blocks"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 40, "distilled_guidance": 2.5}
    guidances = (1.0,)

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": 2.5, "max_sequence_length": 40}


class TestKlein(Conformance):
    build = staticmethod(flux2.klein)
    part = "single_transformer_blocks"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 64}

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": 64}


def test_pictures_become_the_latents_that_the_pipeline_makes_of_them(tmp_path: Path) -> None:
    flux2.klein(tmp_path)
    family: Any = registry.load_policy(str(tmp_path), resolution=32).family
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(family.encode_images(images), family.pipeline._encode_vae_image(images * 2 - 1, None), atol=1e-5)


def test_distilled_klein_draws_in_few_steps_without_guidance(tmp_path: Path) -> None:
    flux2.klein(tmp_path, distilled=True)
    policy = registry.load_policy(str(tmp_path), resolution=32, max_sequence_length=64)
    assert policy.family.step_distilled
    assert not registry.load_policy(str(tmp_path), resolution=32, step_distilled=False).family.step_distilled
    condition = policy.family.encode(["two red circles"])
    assert condition.negative is None
    with pytest.raises(UserError, match="has no unconditional half to guide away from; use guidance 1"):
        policy.predict(torch.randn(1, *policy.family.latent_shape), torch.ones(1), condition, 4.0)
