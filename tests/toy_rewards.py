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


class Brightness(Reward):
    """Mean of the pixels: smooth, and different for any two pictures."""

    spec = RewardSpec("brightness", differentiable=True, range=(0.0, 1.0))

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.mean((1, 2, 3)))
