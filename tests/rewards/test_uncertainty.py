"""Uncertainty: what each source measures, what each form does with it, and that doubt is always there to see."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.perturb import perturbed
from visalign.rewards.uncertainty import Uncertainty
from visalign.scoring import Panel, Reward, RewardError, RewardInput, RewardOutput, RewardSpec


class Level(Reward):
    """scale · mean + offset, with a dense map of minus the pixels, and an uncertainty of its own if asked."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, sigma: float | None = None, dense: bool = False, high: float = 1.0):
        self.spec = RewardSpec("level", differentiable=True, range=(-math.inf, high))
        self.scale, self.offset, self.sigma, self.dense = scale, offset, sigma, dense

    def score(self, batch: RewardInput) -> RewardOutput:
        mean = batch.images.mean((1, 2, 3))
        sigma = None if self.sigma is None else self.sigma * (1 + torch.arange(len(mean)))
        return RewardOutput.of(self.scale * mean + self.offset, uncertainty=sigma, dense=-batch.images.mean(1) if self.dense else None)


def batch(*values: float, views: Tensor | None = None) -> RewardInput:
    images = torch.rand(len(values), 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    return RewardInput(images + torch.tensor(values)[:, None, None, None], ["p"] * len(values), views=views)


def test_the_members_own_uncertainty_is_subtracted() -> None:
    inputs = batch(0.1, 0.2)
    output = Uncertainty(Level(sigma=0.3), source="inner", kappa=2.0).score(inputs)
    raw = inputs.images.mean((1, 2, 3))
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty, torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(output.scores, raw - 2 * torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(output.components["level"], raw)


def test_a_weight_leaves_the_score_and_counts_invalid_ones_nothing() -> None:
    inputs = batch(0.1, 0.2, 0.3)
    inputs.images[2] = math.nan
    output = Uncertainty(Level(sigma=0.3), source="inner", form="weight", tolerance=0.6).score(inputs)
    assert output.weight is not None
    torch.testing.assert_close(output.weight[:2], torch.tensor([math.exp(-0.25), math.exp(-1.0)]))
    torch.testing.assert_close(output.scores[:2], inputs.images[:2].mean((1, 2, 3)))
    assert output.valid.tolist() == [True, True, False]
    assert Panel({"a": (Uncertainty(Level(sigma=0.3), source="inner", form="weight"), 1.0)}).score(inputs).weight is not None


def test_changes_measure_the_spread_over_the_picture_and_its_copies() -> None:
    inputs = batch(0.1, 0.4)
    output = Uncertainty(Level(), changes=4).score(inputs)
    each = torch.stack([inputs.images.mean((1, 2, 3)), *(perturbed(inputs.images, n).mean((1, 2, 3)) for n in range(4))])
    torch.testing.assert_close(output.uncertainty, each.std(0, correction=0))
    torch.testing.assert_close(output.scores, each[0] - each.std(0, correction=0))


def test_a_reward_that_never_changes_its_mind_has_a_finite_gradient() -> None:
    inputs = batch(0.1)
    images = inputs.images.requires_grad_()
    output = Uncertainty(Level(scale=0.0, offset=0.5)).score(replace(inputs, images=images))
    (gradient,) = torch.autograd.grad(output.scores.sum(), images)
    assert gradient.isfinite().all()
    torch.testing.assert_close(output.scores.detach(), torch.tensor([0.5]))


def test_an_ensemble_agrees_up_to_unit_and_zero() -> None:
    base, inputs = batch(0.1, 0.2, 0.3, 0.5, 0.9), batch(0.3, 0.7)
    members: dict[str, tuple[Reward, float]] = {"a": (Level(), 1.0), "b": (Level(100.0, -7.0), 3.0), "off": (Level(), 0.0)}
    reward = Uncertainty(members, source="ensemble")
    with pytest.raises(UserError, match="must see pictures of the untrained model first"):
        reward.score(inputs)
    reward.calibrate(base)
    output = reward.score(inputs)
    values = base.images.mean((1, 2, 3))
    scale = 1.4826 * (values - values.median()).abs().median()
    standard = (inputs.images.mean((1, 2, 3)) - values.median()) / scale
    torch.testing.assert_close(output.scores, standard, rtol=1e-3, atol=1e-3)  # agreement: nothing is subtracted
    assert output.uncertainty is not None
    assert output.uncertainty.max() < 1e-3
    opposed = Uncertainty({"a": (Level(), 1.0), "b": (Level(-1.0), 1.0)}, source="ensemble", form="weight")
    opposed.calibrate(base)
    found = opposed.score(inputs)
    torch.testing.assert_close(found.scores, torch.zeros(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.uncertainty, standard.abs(), rtol=1e-3, atol=1e-3)


def test_two_views_compare_dense_maps_pixel_by_pixel() -> None:
    inputs = batch(0.1, 0.2)
    views = torch.stack([inputs.images, inputs.images + 0.2], 1)
    reward = Uncertainty(Level(dense=True, high=0.0), source="two_views", form="attenuate", kappa=0.5)
    output = reward.score(replace(inputs, views=views))
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty, torch.full((2,), 0.1))
    dense = -inputs.images.mean(1)
    torch.testing.assert_close(output.scores, (dense * math.exp(-0.1)).mean((1, 2)) - 0.5 * 0.1)
    assert output.dense is not None
    torch.testing.assert_close(output.dense, dense * math.exp(-0.1))
    scalar = Uncertainty(Level(), source="two_views").score(replace(inputs, views=views))
    torch.testing.assert_close(scalar.uncertainty, torch.full((2,), 0.1))
    with pytest.raises(RewardError, match="needs views"):
        Panel({"u": (reward, 1.0)}).score(inputs)


def test_a_lower_bound_and_a_weight_do_not_depend_on_the_rewards_zero() -> None:
    inputs = batch(0.1, 0.4)
    for form in ("lower_bound", "weight"):
        here, there = (Uncertainty(Level(offset=offset, sigma=0.3), source="inner", form=form).score(inputs) for offset in (0.0, 5.0))
        torch.testing.assert_close(there.scores, here.scores + 5)
        torch.testing.assert_close(there.weight, here.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "ensemble"}, "source=ensemble wants two or more|wants one reward"),
        ({"form": "attenuate"}, "needs source=two_views"),
        ({"form": "attenuate", "source": "two_views"}, "0 at best"),
        ({"kappa": -1.0}, "kappa >= 0"),
        ({"tolerance": 0.0}, "tolerance > 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Uncertainty(Level(), **options)


def test_a_member_without_what_the_source_needs_is_refused() -> None:
    with pytest.raises(UserError, match="level reports none of its own"):
        Uncertainty(Level(), source="inner").score(batch(0.1))
    dull = Uncertainty(Level(high=0.0), source="two_views", form="attenuate")
    with pytest.raises(UserError, match="needs a dense map, and level has none"):
        dull.score(batch(0.1, views=torch.rand(1, 1, 3, 16, 16)))
    with pytest.raises(UserError, match="source=augment wants one reward"):
        Uncertainty({"a": (Level(), 1.0), "b": (Level(), 1.0)})
