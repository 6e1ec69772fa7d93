"""Losses: the surrogate is PPO's, its clipping has the right gradients, and the penalties are the Gaussian KL."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from visalign.losses import clipped_policy, path_kl, velocity_kl

RATIO = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.7, 1.1], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, 2.0, 2.0, -1.0, -1.0, 0.0], dtype=torch.float64)


def test_surrogate_is_the_textbook_maximum_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    advantage, weight = torch.randn(100, generator=generator), torch.rand(100, generator=generator)
    log_prob = (0.3 * torch.randn(100, generator=generator)).requires_grad_()
    ratio = log_prob.exp()
    textbook = (weight * torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.1))).mean()
    loss = clipped_policy(log_prob, torch.zeros(100), advantage, 0.2, 0.1, weight)
    assert_close(loss.value, textbook)
    assert_close(torch.autograd.grad(loss.value, log_prob), torch.autograd.grad(textbook, log_prob))


def test_metrics() -> None:
    metrics = clipped_policy(RATIO.log(), torch.zeros(6), ADVANTAGE, 0.2, 0.2).metrics
    assert metrics["ratio/mean"].item() == pytest.approx(RATIO.mean().item())
    assert metrics["ratio/std"].item() == pytest.approx(RATIO.std(correction=0).item())
    assert metrics["ratio/max_deviation"].item() == pytest.approx(0.3)
    assert metrics["clip/high"].item() == pytest.approx(1 / 6)  # ratio 1.3 where the advantage is positive
    assert metrics["clip/low"].item() == pytest.approx(1 / 6)
    assert metrics["kl/approximate"].item() == pytest.approx(RATIO.log().square().mean().item() / 2)


def test_on_policy_ratio_is_exactly_one() -> None:
    old = torch.randn(8, generator=torch.Generator().manual_seed(0))
    log_prob = old.clone().requires_grad_()
    loss = clipped_policy(log_prob, old, torch.arange(8.0), 1e-5, 1e-5)
    assert loss.metrics["ratio/max_deviation"] == 0
    assert loss.value.item() == -3.5
    assert_close(torch.autograd.grad(loss.value, log_prob)[0], -torch.arange(8.0) / 8)


def test_tiny_clip_ranges_are_told_apart_in_float32() -> None:
    log_ratio = torch.tensor([0.9e-6, 1.1e-6, -0.9e-6, -1.1e-6], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    (gradient,) = torch.autograd.grad(clipped_policy(log_ratio, torch.zeros(4), advantage, 1e-6, 1e-6).value, log_ratio)
    assert (gradient != 0).tolist() == [True, False, True, False]


def test_clipped_overflow_sends_no_nan_back() -> None:
    log_ratio = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = clipped_policy(log_ratio, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.1, 0.1)
    assert torch.autograd.grad(loss.value, log_ratio)[0].tolist() == [0.0, 0.0]


def test_clip_low_of_one_never_clips() -> None:
    log_ratio = torch.tensor([-50.0])
    assert clipped_policy(log_ratio, torch.zeros(1), -torch.ones(1), 1.0, 1.0).metrics["clip/low"] == 0


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, generator=generator, dtype=torch.float64), torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)


def test_path_kl_is_the_gaussian_kl() -> None:
    prediction, reference = pair()
    kappa, std = torch.tensor([-0.1, -0.5, -0.9], dtype=torch.float64), torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    wide_std, wide_kappa = std[:, None, None], kappa[:, None, None]
    want = kl_divergence(Normal(wide_kappa * prediction, wide_std), Normal(wide_kappa * reference, wide_std)).mean((1, 2))
    assert_close(path_kl(kappa, std, prediction, reference), want)


def test_velocity_kl_has_an_explicit_weight_and_reaches_the_policy_only() -> None:
    prediction, reference = (value.requires_grad_() for value in pair())
    weight = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    penalty = velocity_kl(prediction, reference, weight)
    assert_close(penalty, weight * velocity_kl(prediction, reference))
    assert_close(velocity_kl(prediction, reference), (prediction - reference).square().mean((1, 2)))
    penalty.sum().backward()
    assert prediction.grad is not None
    assert reference.grad is None
    assert velocity_kl(prediction.half(), reference.half()).dtype == torch.float32
