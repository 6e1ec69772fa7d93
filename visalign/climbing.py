"""The gradient of rewards by the initial noise: what a draw, a look and the way back cost, and which rewards can be climbed so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visalign.backprop import denoise
from visalign.errors import UserError
from visalign.paths import expand
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts
from visalign.scoring import Panel, RewardInput, Scores


@dataclass(frozen=True)
class Spent:
    """Per picture: `nfe` denoiser forwards, `nfe_backward` backward passes, `reward_calls` pictures scored."""

    nfe: float = 0.0
    nfe_backward: float = 0.0
    reward_calls: float = 0.0

    def __add__(self, more: Spent) -> Spent:
        return replace(self, **{name: getattr(self, name) + value for name, value in vars(more).items()})


@dataclass(frozen=True)
class Look:
    """What `look` sees: clean `latents` (N, ...), `images` (N, 3, H, W), `scores`, the `gradient` (N, ...) by the noise, and the cost."""

    latents: Tensor
    images: Tensor
    scores: Scores
    gradient: Tensor
    spent: Spent


def look(
    policy: Policy, rewards: Panel, x: Tensor, prompts: Prompts, condition: Condition, *, steps: int, guidance: float, slope: bool
) -> Look:
    """Draw from noises x (N, ...), score, and if `slope` differentiate the total by x, times the weight that rewards give themselves.

    The gradient is 0 where a score, or it, failed.
    """
    before = policy.nfe
    with torch.set_grad_enabled(slope):
        noise = x.detach().clone().requires_grad_(slope)
        final = denoise(policy, noise, condition, steps=steps, guidance=guidance, checkpointing=steps > 1)
        images = policy.family.decode(final)
        scores = rewards.score(RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups))
        total = torch.where(scores.valid, scores.total, 0.0).sum()
        gradient = torch.autograd.grad(total, noise)[0] if slope else torch.zeros_like(x)
    if scores.weight is not None:
        gradient = gradient * expand(scores.weight.detach().nan_to_num(0.0).to(gradient), gradient)
    gradient = torch.where(expand(gradient.flatten(1).isfinite().all(1), gradient), gradient, 0.0)
    backwards = steps * (1 if guidance == 1.0 else 2) if slope else 0
    return Look(final.detach(), images.detach(), scores, gradient, Spent((policy.nfe - before) / len(x), backwards, 1.0))


def check(rewards: Panel, exact: bool, otherwise: str) -> None:
    """Refuse rewards that can't be climbed.

    Args:
        exact: whether each needs a gradient.
        otherwise: what to do about one that has none.

    Raises:
        UserError: a reward with a weight has no gradient and needs one, or compares pictures; or none has a weight.
    """
    if not any(rewards.weights.values()):
        raise UserError("rewards: none has a weight, so there is nothing to optimise noise for; give at least one")
    for alias, reward in rewards.rewards.items():
        spec, climbed = reward.spec, rewards.weights[alias] != 0
        if climbed and spec.scope != "point":
            raise UserError(f"rewards.{alias}: {spec.name} compares pictures with one another, but every noise is judged by itself")
        if climbed and exact and not spec.differentiable:
            raise UserError(f"rewards.{alias}: {spec.name} has no gradient to climb; {otherwise}")
