"""Rewards into advantages: who did better than the other members of its group, and by how much.

Groups are integer ids, never prompt texts, and may have any sizes in any order, but each lives whole on one rank. Standard deviations are
of the population (ddof 0). A NaN reward is an invalid member: it enters no statistic and has advantage 0. All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor

ZERO_SPREAD = 1e-8  # the std below which a group's rewards count as equal

Moments = Callable[[Tensor], Tensor]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    std: Literal["group", "global", "none"],
    epsilon: float = 1e-4,
    clip: float = 5.0,
    moments: Moments | None = None,
) -> Tensor:
    """GRPO's advantage (reward - group mean)/(std + epsilon), in [-clip, clip]: (N,) float32.

    Members of a group whose spread is below `ZERO_SPREAD`, or that has fewer than two valid members, get 0.

    Args:
        rewards: (N,) in any unit; NaN where invalid.
        groups: (N,) int64.
        std: "group" divides by the group's own std, "global" by that of all valid rewards of the epoch about their overall mean
            (Flow-GRPO's definition: it includes the differences between prompts), "none" by nothing (the unbiased gradient).
        moments: sums a (3,) float64 tensor (count, sum, sum of squares) over ranks, for "global".
    """
    table = _Groups(rewards.isfinite(), groups)
    centred, spread = table.centred(rewards)
    if std == "group":
        centred = centred / (spread + epsilon)
    elif std == "global":
        centred = centred / (_overall_std(rewards, table.valid, moments) + epsilon)
    return torch.where(table.valid & (spread > ZERO_SPREAD), centred, 0.0).clamp(-clip, clip).float()


def gdpo_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    noise_floor: Mapping[str, float] | None = None,
    *,
    epsilon: float = 1e-6,
    clip: float = 5.0,
    moments: Moments | None = None,
) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward is normalised within its group before the weighted sum, in [-clip, clip]: (N,) float32.

    So no reward outweighs another by its unit, and patterns with equal raw sums stay apart. The sum is divided by its std over the epoch;
    its mean is 0 already. A sample counts only if every weighted reward of it is valid.

    Args:
        rewards: name -> (N,).
        weights: name -> weight; 0 leaves a reward out.
        groups: (N,) int64.
        noise_floor: name -> the scorer's re-scoring noise: a group's spread below it is not blown up to 1.
        moments: as in `group_advantages`.

    Raises:
        ValueError: no reward has a weight, or a weight names no reward.
    """
    used = [name for name, weight in weights.items() if weight]
    if not used or not set(used) <= set(rewards):
        raise ValueError(f"weights {dict(weights)} must name at least one reward of {sorted(rewards)}, and no other")
    valid = torch.stack([rewards[name].isfinite() for name in used]).all(0)
    table = _Groups(valid, groups)
    total = torch.zeros(len(groups), dtype=torch.float64, device=groups.device)
    for name in used:
        centred, spread = table.centred(rewards[name])
        floor = max(epsilon, (noise_floor or {}).get(name, 0.0))
        total += weights[name] * torch.where(spread > ZERO_SPREAD, centred / spread.clamp(min=floor), 0.0)
    total = total / _overall_std(total, valid, moments).clamp(min=epsilon)
    return torch.where(valid, total, 0.0).clamp(-clip, clip).float()


def spread(rewards: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """How much signal the groups carry, from rewards (N,) and groups (N,).

    Returns:
        "std": mean std within the groups of at least two valid members; "zero_fraction": the fraction of all groups without signal, by zero
        spread or too few valid members. Both () float32.
    """
    table = _Groups(rewards.isfinite(), groups)
    std = table.std(rewards)
    comparable = table.count >= 2
    mean = (std * comparable).sum() / comparable.sum().clamp(min=1)
    return {"std": mean.float(), "zero_fraction": (~comparable | (std <= ZERO_SPREAD)).float().mean()}


def per_step(advantages: Tensor, steps: int) -> Tensor:
    """Terminal credit: every one of `steps` recorded steps gets the advantage (N,) of its sample: (N, steps)."""
    return advantages.unsqueeze(1).repeat(1, steps)


class _Groups:
    """Sums over the valid members of G groups.

    Attributes:
        valid: (N,) bool.
        count: (G,) float64 valid members.
    """

    def __init__(self, valid: Tensor, groups: Tensor):
        names, self._index = cast(tuple[Tensor, Tensor], torch.unique(groups, return_inverse=True))  # pyright: ignore[reportUnknownMemberType]
        self._size = len(names)
        self.valid = valid
        self.count = self._sum(torch.ones_like(valid, dtype=torch.float64))

    def centred(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(value - group mean, group std), each (N,) float64."""
        deviation = self._deviation(values)
        return deviation, self._std(deviation)[self._index]

    def std(self, values: Tensor) -> Tensor:
        """(G,) float64."""
        return self._std(self._deviation(values))

    def _deviation(self, values: Tensor) -> Tensor:
        mean = self._sum(values.double()) / self.count.clamp(min=1)
        return values.double() - mean[self._index]

    def _std(self, deviation: Tensor) -> Tensor:
        return (self._sum(deviation.square()) / self.count.clamp(min=1)).sqrt()

    def _sum(self, values: Tensor) -> Tensor:
        zero = torch.zeros(self._size, dtype=torch.float64, device=values.device)
        return zero.index_add(0, self._index, torch.where(self.valid, values, 0.0))


def _overall_std(values: Tensor, valid: Tensor, moments: Moments | None) -> Tensor:
    """Population std () of the valid values of all ranks; 0 if there are none."""
    kept = torch.where(valid, values.double(), 0.0)
    sums = torch.stack([valid.double().sum(), kept.sum(), kept.square().sum()])
    count, total, square = (sums if moments is None else moments(sums)).unbind()
    count = count.clamp(min=1)
    return (square / count - (total / count).square()).clamp(min=0).sqrt()
