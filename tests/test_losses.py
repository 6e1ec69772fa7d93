"""Losses: the surrogate is PPO's, its clipping has the right gradients, Guard's ratio is as published, the penalties are Gaussian KLs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from visalign.losses import (
    Loss,
    clipped_policy,
    guard_log_ratio,
    noise_weights,
    path_kl,
    per_step_statistics,
    per_step_summary,
    reward_difference,
    velocity_kl,
)
from visalign.paths import Flow, gain
from visalign.transitions import TRANSITIONS, kernel

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


def test_a_clip_range_of_each_transition() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob, advantage = 0.3 * torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    low, high = torch.tensor([0.1, 0.3, 1.5]).repeat(20), torch.tensor([0.2, 0.05, 0.1]).repeat(20)
    loss = clipped_policy(log_prob, torch.zeros(60), advantage, low, high)
    parts = [clipped_policy(log_prob[n::3], torch.zeros(20), advantage[n::3], low[n].item(), high[n].item()) for n in range(3)]
    assert_close(loss.value, torch.stack([part.value for part in parts]).mean())
    for name in ("clip/low", "clip/high"):
        assert_close(loss.metrics[name], torch.stack([part.metrics[name] for part in parts]).mean())
    equal = clipped_policy(log_prob, torch.zeros(60), advantage, torch.full((60,), 0.2), torch.full((60,), 0.1))
    assert_close(equal.value, clipped_policy(log_prob, torch.zeros(60), advantage, 0.2, 0.1).value)


def test_temperature_scales_the_log_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantage, std = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(4))
    cps = 2 * std.square()
    loss = clipped_policy(log_prob, old, advantage, 0.2, 0.2, temperature=cps)
    assert_close(loss.value, clipped_policy(cps * (log_prob - old), torch.zeros(20).double(), advantage, 0.2, 0.2).value)
    assert loss.log_ratio is not None
    assert_close(loss.log_ratio, cps * (log_prob - old))
    assert_close(loss.metrics["kl/approximate"], (log_prob - old).square().mean() / 2)  # of the densities, whatever the temperature


TIMES = torch.tensor([0.96, 0.8, 0.5, 0.2], dtype=torch.float64)
STEPS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 0.7, "dpm_sde": 0.0}


def drawn(kind: str, size: float = 0.01) -> dict[str, Tensor]:
    """A transition of each of four steps, replayed by a policy that has moved: noise, delta, kappa, std, and both log-densities."""
    generator = torch.Generator().manual_seed(0)
    x, old, move, noise = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    t, t_next = TIMES, TIMES - 0.1
    step = TRANSITIONS[kind](Flow(), t, t_next, STEPS[kind])
    before, after = (kernel(Flow(), x, prediction, t, t_next, step) for prediction in (old, old + size * move))
    x_next = before.draw(noise)
    kappa = gain(Flow(), step.a, step.c, t)
    bias = ((after.mean - before.mean).square() / (2 * before.std.square())).mean((1, 2))
    densities = {"log_prob": after.log_prob(x_next), "old_log_prob": before.log_prob(x_next)}
    return {"noise": noise, "delta": size * move, "kappa": kappa, "std": step.std, "bias": bias, **densities}


@pytest.mark.parametrize("kind", STEPS)
def test_guard_ratio_is_the_published_one(kind: str) -> None:
    for size in (1e-4, 0.01, 1.0):
        found = drawn(kind, size)
        published = (found["std"] * (found["log_prob"] - found["old_log_prob"] + found["bias"])).exp()
        assert_close(guard_log_ratio(found["noise"], found["delta"], found["kappa"]).exp(), published, rtol=0, atol=1e-12)
        narrow = guard_log_ratio(found["noise"].float(), found["delta"].float(), found["kappa"].float())
        assert narrow.dtype == torch.float32
        assert_close(narrow.exp().double(), published, rtol=1e-6, atol=1e-6)


def test_guard_ratio_has_no_bias_under_the_old_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    delta, kappa, std = torch.tensor([[0.5, -1.0, 2.0, 0.1]], dtype=torch.float64), torch.tensor(-0.3).double(), torch.tensor(0.2).double()
    guard = guard_log_ratio(noise, delta.expand_as(noise), kappa)
    deviation = kappa.abs() * delta.norm() / 4
    assert guard.mean().abs() < 4 * deviation / 20_000**0.5
    assert guard.std() == pytest.approx(deviation.item(), rel=0.02)
    plain = guard / std - (kappa / std).square() * delta.square().mean() / 2
    assert plain.mean() < -1


@pytest.mark.parametrize("kind", STEPS)
def test_one_over_kappa_makes_every_step_weigh_the_same(kind: str) -> None:
    """Gradients of the loss with respect to the prediction, in units of the noise: the gain of each step."""
    found = drawn(kind)
    gains: dict[str, Tensor] = {}
    weights = {"paper": torch.full((4,), 1 / 0.1, dtype=torch.float64), "equal": 1 / found["kappa"].abs()}
    for name, weight in weights.items():
        delta = torch.zeros_like(found["delta"]).requires_grad_()
        log_ratio = guard_log_ratio(found["noise"], delta, found["kappa"])
        loss = clipped_policy(log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), 1e-6, 1e-6, weight)
        (gradient,) = torch.autograd.grad(loss.value, delta)
        gains[name] = (gradient / found["noise"]).flatten(1)[:, 0] * 4 * 15
    assert_close(gains["equal"], torch.ones(4, dtype=torch.float64))
    if kind == "flow_sde":
        assert_close(gains["paper"], torch.full((4,), 1 + 0.7**2 / 2, dtype=torch.float64))
    if kind == "dance_sde":
        assert_close(gains["paper"], 1 + 0.3**2 * (1 - TIMES) / (2 * TIMES))


def test_statistics_of_each_step_add_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob, advantage = 1e-6 * torch.randn(90, generator=generator), torch.randn(90, generator=generator)
    step = torch.arange(90) % 3 + 1  # of 5 steps, 0 and 4 are not trained
    sums = torch.zeros(4, 5, dtype=torch.float64)
    for rows in torch.randperm(90, generator=generator).split(20):
        loss = clipped_policy(log_prob[rows].requires_grad_(), torch.zeros(len(rows)), advantage[rows], 1e-6, 5e-7)
        assert loss.log_ratio is not None
        assert loss.clipped is not None
        assert not loss.log_ratio.requires_grad
        sums = sums + per_step_statistics(loss.log_ratio, loss.clipped, step[rows], 5)
    assert sums[0].tolist() == [0, 30, 30, 30, 0]
    summary = per_step_summary(sums)
    for n in (1, 2, 3):
        own, sign = log_prob[step == n].double(), advantage[step == n]
        assert summary["ratio/mean"][n].item() - 1 == pytest.approx(own.mean().item(), rel=1e-3, abs=1e-12)
        assert summary["ratio/std"][n].item() == pytest.approx(own.std(correction=0).item(), rel=1e-4)
        clipped = ((sign > 0) & (own > 5e-7)) | ((sign < 0) & (own < -1e-6))
        assert summary["clip/fraction"][n].item() == pytest.approx(clipped.double().mean().item())
    assert all(value[[0, 4]].isnan().all() for value in summary.values())


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


def test_noise_weights() -> None:
    assert_close(noise_weights(torch.tensor([0.1, 0.2, 0.6])), torch.tensor([1 / 3, 2 / 3, 2.0]))


def one_pair(moved: list[float], wanted: float) -> tuple[Loss, Tensor]:
    """PRDP's loss of one pair over two steps, clipped at 0.2, and its derivatives (2, 2): the first member moved, the second did not."""
    log_ratio = torch.tensor([moved, [0.0, 0.0]], requires_grad=True)
    credit, clip, one = torch.tensor([[wanted], [0.0]]), torch.full((2,), 0.2), torch.ones(2, 1)
    options = {"beta": 1.0, "clip_low": clip, "clip_high": clip}
    loss = reward_difference(log_ratio, torch.zeros(2, 2), credit, one, torch.zeros(2).long(), torch.ones(1, 2), **options)
    return loss, torch.autograd.grad(loss.value, log_ratio)[0]


@pytest.mark.parametrize(
    ("moved", "wanted", "error", "slope", "clipped"),
    [  # (error)²/8 and its derivative, error/4, at each step of the first member; steps that the clip holds have none
        ([0.1, 0.1], 1.0, 0.8, (-0.2, -0.2), False),
        ([0.3, 0.1], 1.0, 0.7, (0.0, -0.175), True),  # towards the target and too far: the cut path's error is larger, and counts
        ([0.3, 0.3], 1.0, 0.6, (0.0, 0.0), True),
        ([-0.3, 0.1], 1.0, 1.2, (-0.3, -0.3), False),  # away from it: pulled back at both steps
        ([0.3, 0.1], 0.1, -0.3, (0.075, 0.075), False),  # beyond it: pulled back
        ([0.2, -0.2], 0.0, 0.0, (0.0, 0.0), False),
    ],
)
def test_prdp_is_clipped_step_by_step_and_never_below_its_error(
    moved: list[float], wanted: float, error: float, slope: tuple[float, float], clipped: bool
) -> None:
    loss, found = one_pair(moved, wanted)
    assert loss.value.item() == pytest.approx(error**2 / 8, abs=1e-8)
    assert_close(found[0], torch.tensor(slope), atol=1e-7, rtol=1e-6)
    assert loss.metrics["clip/pairs"].item() == clipped


def test_prdp_averages_valid_pairs_within_groups_and_groups() -> None:
    rng = torch.Generator().manual_seed(0)
    log_ratio, old, credit = (torch.randn(7, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    groups, clip, beta = torch.tensor([4, 4, 9, 4, 9, 4, 2]), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64), 0.7
    weight = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.2, 1.0, 1.0])[:, None].repeat(1, 3)
    weight[5, 1] = 0
    answers = torch.ones(3, 3).triu()
    cut = old + torch.minimum(torch.maximum(log_ratio - old, -clip), clip)
    total = 0.0
    for column in range(3):
        for group in (4, 9):
            rows = [n for n in range(7) if groups[n] == group and weight[n, column] > 0]
            pairs = [(a, b) for a in rows for b in rows if a < b]
            for a, b in pairs:
                wanted = credit[a, column] - credit[b, column]
                errors = [wanted - beta * (said[a, column:] - said[b, column:]).sum() for said in (log_ratio, cut)]
                total += float(weight[a, column] * weight[b, column] * max(e**2 for e in errors)) / len(pairs) / 3  # three groups
    found = reward_difference(log_ratio, old, credit, weight, groups, answers, beta=beta, clip_low=clip, clip_high=clip)
    assert found.value.item() == pytest.approx(total / (4 * beta * 6))


def test_prdp_explains_all_where_log_ratios_are_rewards() -> None:
    rewards, zero, one = torch.tensor([0.3, -1.0, 2.0]), torch.zeros(3).long(), torch.ones(3, 1)
    free = {"beta": 0.25, "clip_low": torch.tensor(1e9), "clip_high": torch.tensor(1e9)}
    spread = torch.stack([rewards * 3, rewards + 5.0], 1)  # 0.25·(3 + 1)·reward and a constant
    found = reward_difference(spread, spread, rewards[:, None], one, zero, torch.ones(1, 2), **free)
    assert found.value.item() < 1e-12
    assert found.metrics["explained"].item() == pytest.approx(1.0)
    nothing = reward_difference(spread, spread, rewards[:, None], torch.zeros(3, 1), zero, torch.ones(1, 2), **free)
    assert (nothing.value.item(), nothing.metrics["explained"].item()) == (0.0, 0.0)
