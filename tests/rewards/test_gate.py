"""Gate: by hand, and what could make failing pay."""

from __future__ import annotations

import math

import pytest
import torch

from visalign.errors import UserError
from visalign.rewards.gate import Gate, group_minimum
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Channel(Reward):
    """The mean of one channel."""

    def __init__(self, channel: int, low: float = 0.0):
        self.spec = RewardSpec(f"channel{channel}", differentiable=True, range=(low, 1.0))
        self.channel = channel

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images[:, self.channel].mean((1, 2)))


def inputs(quality: list[float], gate: list[float], groups: list[int] | None = None) -> RewardInput:
    values = torch.tensor([quality, gate, quality]).T
    images = values[:, :, None, None].expand(-1, -1, 2, 2).clone()
    return RewardInput(images, ["p"] * len(quality), groups=None if groups is None else torch.tensor(groups))


def members(low: float = 0.0) -> dict[str, tuple[Reward, float]]:
    return {"good": (Channel(0, low), 2.0), "safe": (Channel(1), 5.0)}


NAN = math.nan


def test_quality_counts_where_the_gate_is_open() -> None:
    reward = Gate(members(), gate="safe", threshold=0.5, failed=0.0)
    output = reward.score(inputs([0.1, 0.9, 0.8, NAN, 0.7], [0.6, 0.4, 0.5, 0.9, NAN]))
    torch.testing.assert_close(output.scores, torch.tensor([0.2, 0.0, 1.6, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(output.components["passes"], torch.tensor([1.0, 0.0, 1.0, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(output.components["safe"], torch.tensor([0.6, 0.4, 0.5, 0.9, NAN]), equal_nan=True)
    assert (reward.spec.range, reward.spec.scope, reward.spec.differentiable) == ((0.0, 2.0), "point", True)


def test_failing_gets_the_lowest_of_its_group() -> None:
    reward = Gate(members(-1.0), gate="safe", threshold=0.5)
    quality, gate = [0.3, 0.9, -0.2, 0.4, 0.6, 0.7], [0.6, 0.1, 0.9, 0.2, 0.9, 0.9]
    output = reward.score(inputs(quality, gate, [0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(output.scores, 2 * torch.tensor([0.3, -0.2, -0.2, 0.4, 0.6, 0.7]))
    assert reward.spec.scope == "group"
    assert "groups" in reward.spec.needs


def test_group_minimum_skips_what_is_invalid() -> None:
    found = group_minimum(torch.tensor([1.0, NAN, 2.0, NAN]), torch.tensor([5, 5, 3, 1]))
    assert found.tolist() == [1.0, 1.0, 2.0, math.inf]


def test_failing_must_not_pay() -> None:
    with pytest.raises(UserError, match="failed=0 can be better than passing, since the other rewards go down to -2"):
        Gate(members(-1.0), gate="safe", threshold=0.5, failed=0.0)
    assert Gate(members(-1.0), gate="safe", threshold=0.5, failed=-3.0).spec.range == (-3.0, 2.0)
    with pytest.raises(UserError, match="gate='ok' is none of the rewards in `of`: good, safe"):
        Gate(members(), gate="ok", threshold=0.5)
    with pytest.raises(UserError, match="no reward in `of` has a weight"):
        Gate({"safe": (Channel(1), 1.0)}, gate="safe", threshold=0.5)
