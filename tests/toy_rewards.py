"""Rewards of the toy worlds, loaded as `tests.toy_rewards:NAME` would be by a user."""

from __future__ import annotations

import torch

from visalign.families.toy import Toy
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Closeness(Reward):
    """-½‖x - target‖² of the point that a toy picture holds."""

    spec = RewardSpec("closeness", differentiable=True)

    def __init__(self, target: tuple[float, float] = (2.0, 1.0)):
        self.target = torch.tensor(target)

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(-0.5 * (Toy.points(batch.images) - self.target).square().sum(1))


class Flaky(Closeness):
    """Closeness that fails for a share of the pictures in the calls `first` to `last`, counted from 1."""

    def __init__(self, first: int = 1, last: int = 10**9, share: float = 1.0):
        super().__init__()
        self.first, self.last, self.share, self.calls = first, last, share, 0

    def score(self, batch: RewardInput) -> RewardOutput:
        self.calls += 1
        scores = super().score(batch).scores
        lost = torch.arange(len(batch)) < self.share * len(batch) * (self.first <= self.calls <= self.last)
        errors = ["HTTP 503: the judge\nis asleep" if bad else None for bad in lost.tolist()]
        return RewardOutput.of(torch.where(lost, torch.nan, scores), info={"errors": errors})


class Brightness(Reward):
    """Mean of the pixels: smooth, and different for any two pictures."""

    spec = RewardSpec("brightness", differentiable=True, range=(0.0, 1.0))

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.mean((1, 2, 3)))


class Slope(Reward):
    """A linear reward: the best policy for it less a KL only shifts every mean, which is what a toy's network can do."""

    spec = RewardSpec("slope", differentiable=True)

    def __init__(self, direction: tuple[float, float] = (1.0, 0.5)):
        self.direction = torch.tensor(direction)

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(Toy.points(batch.images) @ self.direction)


class Flat(Reward):
    """Finds all pictures equal."""

    spec = RewardSpec("flat")

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(torch.full((len(batch),), 0.5))
