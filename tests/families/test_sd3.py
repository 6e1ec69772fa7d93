"""The SD3 family against the stock pipeline, on the toybox's classes with untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.families.conformance import Conformance, scramble
from visalign import registry
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.toybox import styles
from visalign.toybox.build_sd3 import assemble, small_vae

TEXTS = ["two red circles", "a star left of a ring"]


class TestSD3(Conformance):
    part = "_context"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 10}
    sides = (32, 64)

    @staticmethod
    def build(folder: Path) -> None:
        assemble(small_vae()).save_pretrained(folder)

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": 10}


@pytest.fixture
def policy(tiny_sd3: Path) -> Policy:
    return registry.load_policy(str(tiny_sd3), max_sequence_length=10)


def test_full_fine_tuning_of_some_weights(policy: Policy) -> None:
    policy.train_weights(["_context"])
    assert policy.named_trainable()
    assert all("_context" in name for name in policy.named_trainable())
    with pytest.raises(ValueError, match="'contxt'"):
        policy.train_weights(["contxt"])
    policy.train_weights()
    assert len(policy.trainable()) == len(list(policy.family.network.parameters()))


def test_grid_is_the_schedulers_own(policy: Policy) -> None:
    grid = policy.family.grid(10)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert abs(float(grid[-2]) - 0.2) < 1e-6  # the toybox's shift_terminal
    scheduler = policy.family.pipeline.scheduler
    scheduler.set_timesteps(10)
    assert torch.allclose(grid, scheduler.sigmas.to(grid), atol=1e-6)


def test_pictures_do_not_depend_on_the_batch(policy: Policy) -> None:
    prompts = Prompts.of(TEXTS * 2)
    whole, split = (pictures(policy, prompts, steps=3, seed=0, batch=n) for n in (4, 1))
    assert (whole - split).abs().max() < 1e-5


def test_encoded_pictures_decode_to_themselves_whatever_their_size() -> None:
    policy = registry.load_policy("toybox", max_sequence_length=10)
    scenes = styles.drawn("two red circles", {}, 2)
    latents = policy.family.encode_images(scenes)
    assert latents.shape == (2, *policy.family.latent_shape)
    assert 0.5 < latents.std() < 2, "of the scale that the network knows"
    assert (policy.family.decode(latents) - scenes).abs().mean() < 0.01
    larger = torch.nn.functional.interpolate(scenes, scale_factor=2.0, mode="bicubic", antialias=True).clamp(0, 1)
    padded = torch.nn.functional.pad(larger, (8, 8))  # its middle is what counts
    assert (policy.family.decode(policy.family.encode_images(padded)) - scenes).abs().mean() < 0.02
    pipeline = policy.family.pipeline  # pyright: ignore[reportAttributeAccessIssue]
    stock = pipeline.vae.encode(scenes * 2 - 1).latent_dist.mean
    assert torch.allclose(latents, (stock - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor, atol=1e-4)


def test_unconditional_half_of_guidance_carries_no_gradient(policy: Policy) -> None:
    policy.add_lora(4, 8)
    scramble(policy, 0.05)
    condition, x = policy.family.encode(TEXTS), torch.randn(2, *policy.family.latent_shape)
    grads = []
    for scale in (1.0, 3.0):
        policy.predict(x, torch.full((2,), 0.5), condition, scale).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None]))
        for parameter in policy.trainable():
            parameter.grad = None
    assert (grads[1] - 3 * grads[0]).abs().max() < 1e-5 * grads[1].abs().max()  # w · ∂v_c alone


def test_reference_is_the_adapter_switched_off(policy: Policy) -> None:
    condition, x, sigma = policy.family.encode(TEXTS), torch.randn(2, *policy.family.latent_shape), torch.full((2,), 0.5)
    with torch.no_grad():
        base = policy.predict(x, sigma, condition)
        policy.add_lora(4, 8)
        scramble(policy, 0.05)
        assert (policy.predict(x, sigma, condition) - base).abs().max() > 1e-3
        with policy.reference():
            assert torch.equal(policy.predict(x, sigma, condition), base)
