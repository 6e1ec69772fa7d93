"""Rewards into advantages: who did better than the other members of its group, by how much, and which step earned it.

Groups are integer ids, never prompt texts, and may have any sizes in any order, but each lives whole on one rank. Standard deviations are
of the population (ddof 0), also where the papers have n - 1. A NaN reward is an invalid member: it enters no statistic and has advantage 0.
All arithmetic is in float64.

N samples, S recorded steps in the order of sampling, K stored states: step s goes from the state of column `before[s]` to the next.
"""

from __future__ import annotations

import math
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
    return step_advantages(rewards, groups, std=std, epsilon=epsilon, clip=clip, moments=moments)


def step_advantages(
    signal: Tensor,
    groups: Tensor,
    *,
    std: Literal["group", "global", "none"],
    epsilon: float = 1e-4,
    clip: float = 5.0,
    floor: float = 0.0,
    moments: Moments | None = None,
) -> Tensor:
    """`group_advantages` of every column of a dense signal by itself (DenseGRPO, arXiv 2601.20218): (N, S) float32.

    Args:
        signal: (N, S), such as `gains`; NaN where invalid, which leaves the sample's other steps valid.
        groups: (N,) int64.
        std: as in `group_advantages`; "global" is over the epoch but within a column.
        floor: the least std to divide by, in the unit of the signal. Many steps change little, with a binary reward nothing at all; without
            a floor the scorer's noise there would be blown up to ±1. The paper has none.
        moments: as in `group_advantages`, of (3, S).
    """
    table = _Groups(signal.isfinite(), groups)
    centred, spread = table.centred(signal)
    if std == "group":
        centred = centred / (spread.clamp(min=floor) + epsilon)
    elif std == "global":
        centred = centred / (_overall_std(signal, table.valid, moments).clamp(min=floor) + epsilon)
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

    So no reward outweighs another by its unit, and patterns with equal raw sums stay apart. The sum, of mean 0, is divided by the std over
    the epoch that it has without floors: its own would blow up what they held down. A sample counts only if every weighted reward is valid.

    Args:
        rewards, weights: name -> (N,), and name -> weight; 0 leaves a reward out.
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
    total, bare = torch.zeros(2, len(groups), dtype=torch.float64, device=groups.device)
    for name in used:
        centred, spread = table.centred(rewards[name])
        floor = (noise_floor or {}).get(name, 0.0)
        share = weights[name] * torch.where(spread > ZERO_SPREAD, centred / spread.clamp(min=epsilon), 0.0)
        bare += share
        total += share * (spread / floor).clamp(max=1.0) if floor else share
    return torch.where(valid, total / _overall_std(bare, valid, moments).clamp(min=epsilon), 0.0).clamp(-clip, clip).float()


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


def gains(values: Tensor, before: Tensor) -> Tensor:
    """DenseGRPO's reward of a step (arXiv 2601.20218), ΔR = R(state after) - R(state before): (N, S) float32.

    From rewards (N, K) of the stored states' completions and `before` (S,). Over consecutive steps they sum to R(last) - R(first).
    """
    return (values[:, before + 1].double() - values[:, before].double()).float()


def residuals(rewards: Tensor, values: Tensor, before: Tensor) -> Tensor:
    """The terminal reward less what the state before a step promised, R - R(state before): (N, S) float32.

    A baseline free of the step's noise: the expected gradient stays the terminal reward's, whatever the bias of the completions.
    """
    return (rewards.double()[:, None] - values.double()[:, before]).float()


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """VGPO's value of a step (arXiv 2512.12387, Eq. 10), Q_s = R_s + γ·Q_{s+1}: (N, S) float32.

    The paper counts steps down, Q_t = Σ_{k ≤ t} γ^{t-k} R_k, so it too sums the present and the future, which is what a step can change. A
    gap between recorded steps counts as one step. A NaN invalidates its own step and those before.

    Args:
        rewards: (N, S) instant rewards: of the one-step estimate from the state after each step (Eq. 9).
        gamma: γ in [0, 1].
    """
    value = torch.zeros_like(rewards[:, 0], dtype=torch.float64)
    found: list[Tensor] = []
    for column in reversed(rewards.double().unbind(1)):
        value = column + gamma * value
        found.append(value)
    return torch.stack(found[::-1], 1).float()


def temporal_weights(values: Tensor) -> Tensor:
    """VGPO's weight of a step (arXiv 2512.12387, Eq. 11), ω = Q / mean of Q over the sample's valid steps, of Q (N, S) ≥ 0: (N, S) float32.

    Over which set the paper averages is not known. Per sample the weights have mean 1 and no unit, so that a good sample isn't counted
    twice, by its advantage and by its weight. Where the mean is 0 they are 1.
    """
    mean = values.double().nanmean(1, keepdim=True)
    return torch.where(mean > 0, values / mean, 1.0).float()


def value_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    gamma: float,
    anchor: float,
    anchor_steps: int,
    steps: Tensor | None = None,
    epsilon: float = 1e-4,
    clip: float = 5.0,
) -> Tensor:
    """VGPO (arXiv 2512.12387, Eq. 13): ω·[(Q - group mean)/(group std + ε) + k·Q], in [-clip, clip]: (N, S) float32.

    The paper scales its absolute term by α = k·std(Q) and divides by std + ε. That is k·Q but for ε, which would silence it as soon as
    std ≪ ε, just where it is there to speak; ours is k·Q whatever the spread, in groups of one valid member, too.

    Args:
        rewards: (N, S) instant rewards as in `discounted`, of a reward that can't be negative, or neither ω nor the anchor has a meaning:
            check its range beforehand, since no number is looked at here.
        groups: (N,) int64.
        gamma: of `discounted`.
        anchor: k ≥ 0; unlike the rest it depends on the unit and the zero of the reward.
        anchor_steps: the absolute term is there on denoising steps 0 … anchor_steps - 1 (the paper: 5).
        steps: (N, S) or (S,) int64, which denoising steps the columns are; None: 0 … S - 1.
    """
    values = discounted(rewards, gamma).double()
    valid = values.isfinite()
    relative = step_advantages(values, groups, std="group", epsilon=epsilon, clip=math.inf)
    early = (torch.arange(values.shape[1], device=values.device) if steps is None else steps) < anchor_steps
    weighted = temporal_weights(values) * (relative + torch.where(early, anchor * values, 0.0))
    return torch.where(valid, weighted, 0.0).clamp(-clip, clip).float()


def tree_advantages(rewards: Tensor, node: Tensor, before: Tensor, trees: Tensor, *, epsilon: float = 1e-4, clip: float = 5.0) -> Tensor:
    """BranchGRPO (arXiv 2509.06040): an edge's advantage is its child's among the nodes of the child's depth and tree: (N, S) float32.

    A node is worth the mean of its valid leaves and counts once in its depth's mean and std, however many leaves it has. Chains give
    `group_advantages` with std="group". An edge keeps its advantage in the row of an invalid leaf, since other leaves answer for it.

    Args:
        rewards: (N,) of the leaves, NaN where invalid.
        node: (N, K) int64; in one column equal numbers are one state.
        before: (S,) int64.
        trees: (N,) int64, the tree of each leaf.
    """
    children = node[:, before + 1]
    depth = torch.arange(children.shape[1], device=node.device)
    leaves = rewards[:, None].expand_as(children).flatten()
    table = _Groups(leaves.isfinite(), (children * len(depth) + depth).flatten())
    values = table.mean(leaves)
    cells = torch.zeros_like(values, dtype=torch.int64).scatter(0, table.index, (trees[:, None] * len(depth) + depth).flatten())
    return group_advantages(values, cells, std="group", epsilon=epsilon, clip=clip)[table.index].view_as(children)


def branch_cells(groups: Tensor, steps: Tensor, nodes: Tensor) -> Tensor:
    """TempFlow-GRPO's groups (arXiv 2508.04324): samples that left one deterministic path at the same step, (N,) int64.

    Equal in prompt, branch step and initial noise (int64 `groups`, `steps` and `nodes`, (N,) each): the terminal reward differs by that
    step's noise alone. Without shared initial noise every sample is a cell of its own, with nothing to be compared with.
    """
    return cast(Tensor, torch.unique(torch.stack([groups, steps, nodes], 1), dim=0, return_inverse=True)[1])  # pyright: ignore[reportUnknownMemberType]


def extremes(advantages: Tensor, groups: Tensor, best: int, worst: int) -> Tensor:
    """DanceGRPO's best-of-n (arXiv 2505.07818): the `best` highest and `worst` lowest of each group's advantages (N,), as (N,) bool.

    Ties are broken by position, later rows above earlier ones, so that every group of one size keeps equally many.
    """
    table = _Groups(torch.ones_like(groups, dtype=torch.bool), groups)
    order = advantages.argsort(stable=True)
    order = order[table.index[order].argsort(stable=True)]  # by group, and by advantage within
    size = table.count.long()
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device)) - (size.cumsum(0) - size)[table.index]
    return (rank < worst) | (rank >= size[table.index] - best)


class _Groups:
    """Sums over the valid members of G groups, for each of the trailing axes `...` by itself.

    Attributes:
        valid: (N, ...) bool.
        index: (N,) int64 in [0, G), the group of each member.
        count: (G, ...) float64 valid members.
    """

    def __init__(self, valid: Tensor, groups: Tensor):
        names, self.index = cast(tuple[Tensor, Tensor], torch.unique(groups, return_inverse=True))  # pyright: ignore[reportUnknownMemberType]
        self._size = len(names)
        self.valid = valid
        self.count = self._sum(torch.ones_like(valid, dtype=torch.float64))

    def centred(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(value - group mean, group std), each (N, ...) float64."""
        deviation = self._deviation(values)
        return deviation, self._std(deviation)[self.index]

    def std(self, values: Tensor) -> Tensor:
        """(G, ...) float64."""
        return self._std(self._deviation(values))

    def mean(self, values: Tensor) -> Tensor:
        """(G, ...) float64; NaN for a group without valid members."""
        return self._sum(values.double()) / self.count

    def _deviation(self, values: Tensor) -> Tensor:
        mean = self._sum(values.double()) / self.count.clamp(min=1)
        return values.double() - mean[self.index]

    def _std(self, deviation: Tensor) -> Tensor:
        return (self._sum(deviation.square()) / self.count.clamp(min=1)).sqrt()

    def _sum(self, values: Tensor) -> Tensor:
        zero = torch.zeros(self._size, *values.shape[1:], dtype=torch.float64, device=values.device)
        return zero.index_add(0, self.index, torch.where(self.valid, values, 0.0))


def _overall_std(values: Tensor, valid: Tensor, moments: Moments | None) -> Tensor:
    """Population std (...) of the valid values (N, ...) of all ranks; 0 if there are none."""
    kept = torch.where(valid, values.double(), 0.0)
    sums = torch.stack([valid.double().sum(0), kept.sum(0), kept.square().sum(0)])
    count, total, square = (sums if moments is None else moments(sums)).unbind()
    count = count.clamp(min=1)
    return (square / count - (total / count).square()).clamp(min=0).sqrt()
