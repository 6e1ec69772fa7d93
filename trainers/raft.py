"""RAFT (arXiv 2304.06767) and reward-weighted regression: fine-tune on one's own better pictures with the loss of pretraining.

Of each prompt's group the best are kept (`select: best`, RAFT), or every picture is weighted by exp(reward/τ), over its group's mean
(`select: exponential`, reward-weighted regression, arXiv 2302.12192 and 2305.16381). Which weights draw is `draws`: the current ones
(online), or an older policy that is renewed every `old.every` steps; with `old.every: null` the untrained model draws throughout.

A group whose rewards are all equal teaches nothing and is dropped, as are pictures without a valid reward. Among equals at the border
the later ones in the batch are kept, so that a group of 0s and 1s isn't kept whole, as in published code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visalign import credit as credits
from visalign.config import Above, Fraction
from visalign.forward_process import ForwardTrainer, Units
from visalign.losses import Loss
from visalign.matching import error
from visalign.rollout import Noised, Rollout


class RAFT(ForwardTrainer):
    class Config(ForwardTrainer.Config):
        times: Literal["grid", "uniform", "logit_normal"] = "logit_normal"
        select: Literal["best", "exponential"] = "best"
        keep: Fraction = 0.125  # best: share of each group, at least one picture
        temperature: Above = 0.1  # exponential: τ, in the unit of the reward

    def credit(self, rollout: Rollout) -> Tensor:
        """(N, 1) the weight of each picture; 1 on average over a group of which all are kept."""
        settings, rewards = self.settings, rollout.rewards["total"]
        groups = rollout.prompts.groups.to(rewards.device)
        top = settings.select == "best"
        found = best(rewards, groups, settings.keep) if top else exponential(rewards, groups, settings.temperature)
        return (found if rollout.weights is None else found * rollout.weights.to(found))[:, None].to(self.device)

    def units(self, rollout: Rollout) -> Units:
        assert rollout.advantages is not None
        weight = rollout.advantages[:, 0]
        rows = (weight > 0).nonzero()
        return Units(rows, weight[rows[:, 0]], torch.ones_like(weight[rows[:, 0]]))

    def loss(self, batch: Noised) -> Loss:
        errors = error(self.predict(batch), batch.target)
        return Loss(batch.mean(batch.credit * errors), {"error": batch.mean(errors.detach())})


def best(rewards: Tensor, groups: Tensor, keep: float) -> Tensor:
    """1 for the best `keep` (a share) of each group's members, 0 for the others: (N,) float32."""
    size = int(groups.unique(return_counts=True)[1].max())
    ranked = torch.where(rewards.isfinite(), rewards, -torch.inf)
    return (credits.extremes(ranked, groups, max(1, round(keep * size)), 0) & rewards.isfinite() & differs(rewards, groups)).float()


def exponential(rewards: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """exp(reward/τ) over its mean in the group: (N,) float32; 0 where invalid."""
    counted = rewards.isfinite() & differs(rewards, groups)
    found = torch.zeros_like(rewards, dtype=torch.float64)
    for group in groups[counted].unique().tolist():
        rows = counted & (groups == group)
        found[rows] = (rewards[rows].double() / temperature).softmax(0) * rows.sum()
    return found.float()


def differs(rewards: Tensor, groups: Tensor) -> Tensor:
    """(N,) bool: the member's group has valid rewards that differ."""
    spread = credits.group_advantages(rewards, groups, std="none", clip=float("inf")) != 0
    return ((groups[:, None] == groups) & spread).any(1)
