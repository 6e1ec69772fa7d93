"""The SD3 family against the stock pipeline, on the toybox's classes with untrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from visalign import api, build, registry
from visalign.noise import gaussian
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.toybox import styles

TEXTS = ["two red circles", "a star left of a ring"]


@pytest.fixture
def policy(tiny_sd3: Path) -> Policy:
    return registry.load_policy(str(tiny_sd3), max_sequence_length=10)


def scramble(policy: Policy, scale: float = 0.05) -> None:
    """Move what learns away from its start, where an adapter does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(scale * torch.randn_like(parameter))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_noise_free_sample_equals_the_stock_pipeline(policy: Policy, guidance: float) -> None:
    prompts = Prompts.of(TEXTS)
    ours = pictures(policy, prompts, steps=4, seed=3, guidance=guidance)
    noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
    assert (ours - policy.family.stock(TEXTS, noise, 4, guidance)).abs().max() < 1e-5
    assert ours.shape == (2, 3, 64, 64)
    assert ours.std() > 0.01


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


def test_unique_prompts_are_encoded_once_and_rows_keep_their_order(policy: Policy) -> None:
    condition = policy.family.encode([TEXTS[1], TEXTS[0], TEXTS[1]])
    assert len(condition.tensors["pooled"]) == 2
    assert condition.index.tolist() == [0, 1, 0]
    assert torch.equal(condition.positive()["pooled"][0], condition.positive()["pooled"][2])


def test_pictures_do_not_depend_on_the_batch(policy: Policy) -> None:
    prompts = Prompts.of(TEXTS * 2)
    whole, split = (pictures(policy, prompts, steps=3, seed=0, batch=n) for n in (4, 1))
    assert (whole - split).abs().max() < 1e-5


def test_decode_is_differentiable_and_bounded(policy: Policy) -> None:
    latents = torch.randn(1, *policy.family.latent_shape, requires_grad=True)
    images = policy.family.decode(latents)
    images.mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert 0 <= images.min() <= images.max() <= 1


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
    scramble(policy)
    condition, x = policy.family.encode(TEXTS), torch.randn(2, *policy.family.latent_shape)
    grads = []
    for scale in (1.0, 3.0):
        policy.predict(x, torch.full((2,), 0.5), condition, scale).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None]))
        for parameter in policy.trainable():
            parameter.grad = None
    assert torch.allclose(grads[1], 3 * grads[0], rtol=1e-4, atol=1e-6)  # w · ∂v_c alone


def test_reference_is_the_adapter_switched_off(policy: Policy) -> None:
    condition, x, sigma = policy.family.encode(TEXTS), torch.randn(2, *policy.family.latent_shape), torch.full((2,), 0.5)
    with torch.no_grad():
        base = policy.predict(x, sigma, condition)
        policy.add_lora(4, 8)
        scramble(policy)
        assert (policy.predict(x, sigma, condition) - base).abs().max() > 1e-3
        with policy.reference():
            assert torch.equal(policy.predict(x, sigma, condition), base)


def test_exported_lora_with_alpha_twice_its_rank_draws_the_same_in_stock_diffusers(policy: Policy, tiny_sd3: Path, tmp_path: Path) -> None:
    policy.add_lora(4, 8)
    scramble(policy)
    prompts = Prompts.of(TEXTS)
    ours = pictures(policy, prompts, steps=3, seed=0)
    assert build.export(policy, tmp_path / "lora") == "adapter"
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    stock.load_lora_weights(tmp_path / "lora")
    reloaded = api.load(stock, device="cpu", max_sequence_length=10)
    assert (pictures(reloaded, prompts, steps=3, seed=0) - ours).abs().max() < 1e-5


def test_merged_export_is_a_whole_pipeline(policy: Policy, tmp_path: Path) -> None:
    policy.add_lora(4, 8)
    scramble(policy)
    ours = pictures(policy, Prompts.of(TEXTS), steps=3, seed=0)
    assert build.export(policy, tmp_path / "merged", merge=True) == "pipeline"
    merged = registry.load_policy(str(tmp_path / "merged"), max_sequence_length=10)
    assert (pictures(merged, Prompts.of(TEXTS), steps=3, seed=0) - ours).abs().max() < 1e-4
