"""Geometric and harmonic means: formulas, bounds, and quantile tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from visalign.errors import UserError
from visalign.rewards.geometric import Geometric, beaten
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Channel(Reward):
    """The mean of one channel, in the unit of `scale`."""

    def __init__(self, channel: int, scale: float = 1.0, bounded: bool = True):
        self.spec = RewardSpec(f"channel{channel}", differentiable=True, range=(0.0, scale if bounded else math.inf))
        self.channel, self.scale = channel, scale

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(self.scale * batch.images[:, self.channel].mean((1, 2)))


def members(bounded: bool = True, a: float = 1.0, b: float = 3.0) -> dict[str, tuple[Reward, float]]:
    return {"a": (Channel(0, 10.0, bounded), a), "b": (Channel(1, 0.1, bounded), b), "shown": (Channel(2, bounded=False), 0.0)}


def inputs(*pairs: tuple[float, float]) -> RewardInput:
    values = torch.tensor([(a, b, math.nan) for a, b in pairs])
    return RewardInput(values[:, :, None, None].expand(-1, -1, 2, 2).clone(), ["p"] * len(pairs))


PAIRS = ((0.2, 0.8), (0.9, 0.1), (0.5, 0.5), (1.0, 1.0))


def floored(value: float) -> float:
    return 1e-3 + (1 - 1e-3) * value


def test_means_by_hand() -> None:
    geometric = Geometric(members()).score(inputs(*PAIRS))
    harmonic = Geometric(members(), mean="harmonic").score(inputs(*PAIRS))
    want = [(floored(a), floored(b)) for a, b in PAIRS]
    assert geometric.scores.tolist() == pytest.approx([a**0.25 * b**0.75 for a, b in want], rel=1e-5)
    assert harmonic.scores.tolist() == pytest.approx([1 / (0.25 / a + 0.75 / b) for a, b in want], rel=1e-5)
    assert geometric.valid.all(), "a member without a weight is only shown"
    assert (harmonic.scores <= geometric.scores + 1e-6).all()
    assert geometric.components["a/unit"].tolist() == pytest.approx([a for a, _ in PAIRS])
    assert geometric.components["a"].tolist() == pytest.approx([10 * a for a, _ in PAIRS])


def test_one_at_zero_pulls_all_down_but_keeps_its_gradient() -> None:
    for mean in ("geometric", "harmonic"):
        batch = inputs((0.0, 1.0), (0.3, 0.3))
        images = batch.images.requires_grad_()
        scores = Geometric(members(a=1.0, b=1.0), mean=mean).score(RewardInput(images, batch.prompts)).scores  # type: ignore[arg-type]
        assert scores[0] < scores[1]
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient[:, :2].isfinite().all()
        assert gradient[0, 0].abs().max() > 0


def test_an_invalid_member_is_invalid() -> None:
    assert Geometric(members()).score(inputs((math.nan, 0.5), (0.5, 0.5))).valid.tolist() == [False, True]


def test_quantiles_know_no_unit() -> None:
    base = inputs(*((n / 100, (n / 100) ** 2) for n in range(101)))
    reward = Geometric(members(bounded=False, a=1.0, b=1.0), scale="quantile", epsilon=1e-6)
    with pytest.raises(UserError, match="geometric must see pictures of the untrained model first"):
        reward.score(base)
    reward.calibrate(base)
    output = reward.score(inputs((0.25, 0.25), (0.9, 0.0), (0.64, 0.64)))
    assert output.components["a/unit"].tolist() == pytest.approx([0.25, 0.9, 0.64], abs=1e-3)
    assert output.components["b/unit"].tolist() == pytest.approx([0.5, 0.0, 0.8], abs=5e-3)
    assert output.scores.tolist() == pytest.approx([math.sqrt(0.125), 0.0, math.sqrt(0.512)], abs=5e-3)


def test_a_discrete_reward_gets_mean_ranks() -> None:
    table = torch.tensor([0.0] * 60 + [1.0] * 41)
    found = beaten(torch.tensor([0.0, 1.0, 0.5, -1.0, 2.0, math.nan]), table)
    assert found[:5].tolist() == pytest.approx([0.295, 0.8, 0.595, 0.0, 1.0], abs=0.01)
    assert found[5].isnan()


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        (members(bounded=False), {}, "a has no finite range; use scale=quantile"),
        (members(a=-1.0), {}, "the weight of a is below 0"),
        (members(), {"epsilon": 0.0}, r"epsilon must be in \(0, 1\)"),
    ],
)
def test_bad_options_are_user_errors(of: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Geometric(of, **options)
