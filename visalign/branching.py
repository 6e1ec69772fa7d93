"""Exploration that shares: trees of denoising chains (BranchGRPO), single stochastic steps (TempFlow-GRPO), and what of a tree to train.

The result is the ordinary `Trajectory` of N pictures, in which a shared state has one `node` number. Unlike the authors' codes, which draw
node by node, all states at one point of the grid go through the network together, and siblings share their parent's forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.paths import endpoints
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts, Trajectory
from visalign.sampling import Dynamics, begin
from visalign.schedules import StepPlan, tail
from visalign.solvers import advance, predict_all, solve
from visalign.transitions import Gaussian, kernel


@torch.no_grad()
def tree_rollout(
    policy: Policy,
    prompts: Prompts,
    condition: Condition,
    *,
    steps: int,
    seed: int,
    batch: int,
    plan: StepPlan,
    dynamics: Dynamics,
    spread: float,
    guidance: float = 1.0,
    keep_predictions: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Denoise N pictures as the leaves of trees (BranchGRPO, arXiv 2509.06040); without branches it is `sampling.rollout`, to the bit.

    A tree has one initial noise, its first leaf's. With two children at steps 0, 3, 6, 9 of 20 its 16 leaves cost 203 forwards, not 320.

    Args:
        prompts, condition: N rows each; `plan.leaves` successive rows of a group are the leaves of one tree.
        spread: s of the noise at branching steps, see `branch_noise`.
        steps, seed, batch, plan, dynamics, guidance, keep_predictions, progress: as in `sampling.rollout`.

    Raises:
        UserError: a group is not made of whole trees.
    """
    count, spent = len(prompts), policy.nfe
    _check_groups(prompts.groups, plan.leaves, "leaves of a tree, the product of its widths")
    forest = Forest(policy, prompts, condition, policy.family.grid(steps).to(policy.device), plan, dynamics, spread, seed, batch, guidance)
    rows = torch.arange(0, count, plan.leaves)
    x, origin, first, said = begin(policy, prompts.take(rows), condition.take(rows), forest.sigmas, plan, seed, batch, guidance)
    states, predictions, log_probs = forest.grow(x, first, said)
    if progress:
        progress(count)
    stack = lambda nodes: torch.stack([some.repeat_interleave(count // len(some), 0) for some in nodes], 1)  # noqa: E731
    node = [torch.arange(len(states[k]), device=policy.device) for k in plan.stored]
    if plan.recorded[0] == plan.stochastic.index(True):
        node[0] = origin.to(policy.device)  # until the first draw equal initial noise is one state
    return Trajectory(
        latents=stack([states[k] for k in plan.stored]),
        before=torch.tensor(plan.before, dtype=torch.int64, device=policy.device),
        steps=torch.tensor(plan.recorded, dtype=torch.int64, device=policy.device).expand(count, -1),
        sigmas=forest.sigmas,
        log_probs=stack([log_probs[k] for k in plan.recorded]),
        node=stack(node),
        final=states[steps],
        nfe=(policy.nfe - spent) / count,
        predictions=stack([predictions[k] for k in plan.stored]) if keep_predictions else None,
    )


@dataclass(frozen=True)
class Forest:
    """Trees of N leaves on their way along the grid; a row of x is a node, and goes by the number of its first leaf."""

    policy: Policy
    prompts: Prompts
    condition: Condition
    sigmas: Tensor
    plan: StepPlan
    dynamics: Dynamics
    spread: float
    seed: int
    batch: int
    guidance: float

    def grow(self, x: Tensor, first: int, said: Tensor | None) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """From the roots to the leaves: what is stored of states and predictions by grid point, and log-probabilities by step."""
        plan, path = self.plan, self.policy.family.path
        states: dict[int, Tensor] = {}
        predictions: dict[int, Tensor] = {}
        log_probs: dict[int, Tensor] = {}
        parent = prediction = x
        for j in range(first, plan.handover):
            parent, prediction = x, self.predict(x, j) if said is None or j > first else said
            if j in plan.stored:
                states[j], predictions[j] = parent, prediction
            if plan.stochastic[j]:
                x, log_probs[j] = self.children(parent, prediction, j)
            else:
                x, _ = advance(path, parent, prediction, self.sigmas[j], self.sigmas[j + 1], "euler", None)
        if plan.finish:
            j = plan.handover
            states[j], predictions[j] = x, self.predict(x, j)
            clean, _ = endpoints(path, parent, prediction, self.sigmas[j - 1])
            memory, times = (self.sigmas[j - 1], clean.repeat_interleave(len(x) // len(clean), 0)), tail(self.sigmas, j, plan.finish)
            known = {"prediction": predictions[j], "previous": memory}
            x = solve(self.policy, x, times, self.condition, self.guidance, solver="dpm2m", **known, batch=self.batch)
        states[len(plan)], predictions[len(plan)] = x, torch.zeros_like(x)
        return states, predictions, log_probs

    def predict(self, x: Tensor, j: int) -> Tensor:
        """What the network says of the nodes x (M, ...) at grid point j."""
        rows = torch.arange(0, len(self.prompts), len(self.prompts) // len(x))
        return predict_all(self.policy, x, self.sigmas[j], self.condition.take(rows), self.guidance, self.batch)

    def children(self, x: Tensor, prediction: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """The children of x (M, ...) at a stochastic step j, (M·width, ...), and their log-probabilities."""
        path, t, t_next = self.policy.family.path, self.sigmas[j], self.sigmas[j + 1]
        width = self.plan.widths[j] if self.plan.widths else 1
        law = kernel(path, x, prediction, t, t_next, self.dynamics(path, t, t_next))
        law = Gaussian(law.mean.repeat_interleave(width, 0), law.std.repeat_interleave(width, 0))
        ids = self.prompts.ids[:: len(self.prompts) // len(law.mean)]
        x = law.draw(branch_noise(x.shape[1:], self.seed, ids, j, width, self.spread, x.device))
        return x, law.log_prob(x)


def branch_noise(
    shape: Sequence[int], seed: int, ids: Tensor, step: int, width: int, spread: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise (M, *shape) of M nodes, `width` successive ones of which are siblings: ξ_b = (ξ_0 + s·η_b)/√(1 + s²), s = `spread`.

    Every ξ_b is standard normal, so each edge keeps its density, and siblings correlate by 1/(1 + s²). BranchGRPO's paper (arXiv
    2509.06040) has this form; its released code multiplies independent noise by 4 and scores it with the unscaled ς, which draws from
    another policy than the ratio speaks of. Only children have noise of their own; a single one's is `sampling.rollout`'s.

    Args:
        ids: (M,) the nodes' pictures.
        spread: 0 makes siblings equal, infinity independent.
    """
    shared = gaussian(shape, seed, ids[::width], step + 1, device=device)
    if width == 1:
        return shared
    angle = math.atan(spread)  # its cosine is 1/√(1 + s²)
    own = gaussian(shape, seed, ids, f"branch/{step + 1}", device=device)
    return math.cos(angle) * shared.repeat_interleave(width, 0) + math.sin(angle) * own


def _check_groups(groups: Tensor, size: int, what: str) -> None:
    """Rows must come in blocks of `size` of one group each."""
    blocks = groups.cpu()[: len(groups) // size * size].reshape(-1, size)
    if len(groups) % size or (blocks != blocks[:, :1]).any():
        found = sorted(set(groups.cpu().unique(return_counts=True)[1].tolist()))
        raise UserError(f"trainer.group_size={found[0]} is no multiple of the {size} {what}; use a multiple of {size}")


def branch_cells(prompts: Prompts, branches: Sequence[int], seeds: int = 1) -> tuple[Prompts, Tensor]:
    """Initial noise and branch step of every picture, for `one_branch_rollout`.

    Groups, all of one size, are dealt out evenly and in order to seeds × branches cells. TempFlow-GRPO (arXiv 2508.04324) has, for each
    step it trains, groups of 24: 4 seeds with 6 members each.

    Returns:
        the prompts, with `noise_ids` that members of a group and seed share, and (N,) int64, each one of `branches`.

    Raises:
        UserError: the members of a group can't be dealt out evenly.
    """
    _check_groups(prompts.groups, seeds * len(branches), f"cells of {seeds} initial noises × {len(branches)} branch steps")
    place = torch.arange(len(prompts))
    per_seed = int((prompts.groups == prompts.groups[0]).sum()) // seeds
    noise_ids = prompts.ids.cpu()[place - place % per_seed]
    return replace(prompts, noise_ids=noise_ids), torch.tensor(branches)[place % per_seed * len(branches) // per_seed]


@torch.no_grad()
def one_branch_rollout(
    policy: Policy,
    prompts: Prompts,
    condition: Condition,
    *,
    steps: int,
    seed: int,
    batch: int,
    branch: Tensor,
    dynamics: Dynamics,
    guidance: float = 1.0,
    keep_predictions: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Denoise N pictures by the ODE with a single stochastic step each: what it is rewarded for is that step (TempFlow-GRPO, 2508.04324).

    Equal initial noise, the stem, shares its ODE up to its last branch, and its branches their forward. Stems and what has left them
    advance together: in all Σ (last branch + 1) forwards for the stems and Σ (T - 1 - branch) for the pictures.

    Args:
        prompts, condition: N rows each; equal `noise_ids` share their prompt.
        branch: (N,) the stochastic step in [0, T), which is the recorded one; `steps` (N, 1) of the trajectory.
        steps, seed, batch, dynamics, guidance, keep_predictions, progress: as in `sampling.rollout`.
    """
    count, spent, path, branch = len(prompts), policy.nfe, policy.family.path, branch.cpu()
    if branch.min() < 0 or branch.max() >= steps:
        raise ValueError(f"branch steps {sorted(set(branch.tolist()))} must lie in [0, {steps})")
    sigmas = policy.family.grid(steps).to(policy.device)
    names, origin = prompts.noise_ids.cpu().unique(return_inverse=True)
    last, owner = (torch.zeros_like(names).scatter_reduce(0, origin, v, "amax") for v in (branch, torch.arange(count)))
    stems, rows = len(names), torch.cat([owner, torch.arange(count)])  # x is the stems, then the pictures
    since, until = torch.cat([torch.zeros_like(last), branch + 1]), torch.cat([last, torch.full_like(branch, steps)])
    x = gaussian(policy.family.latent_shape, seed, torch.cat([names, names[origin]]), 0, device=policy.device)
    said, latents, log_probs = torch.zeros_like(x), x.new_zeros(count, 2, *x.shape[1:]), x.new_zeros(count, 1)
    kept = torch.zeros_like(latents)
    for j, (t, t_next) in enumerate(pairwise(sigmas)):
        now, leaving, left = (chosen.nonzero()[:, 0] for chosen in ((since <= j) & (j <= until), branch == j, branch == j - 1))
        said[now] = predict_all(policy, x[now], t, condition.take(rows[now]), guidance, batch)
        latents[leaving, 0], kept[leaving, 0], kept[left, 1] = x[origin[leaving]], said[origin[leaving]], said[stems + left]
        law = kernel(path, latents[leaving, 0], kept[leaving, 0], t, t_next, dynamics(path, t, t_next))
        latents[leaving, 1] = law.draw(gaussian(x.shape[1:], seed, prompts.ids[leaving], j + 1, device=policy.device))
        log_probs[leaving, 0] = law.log_prob(latents[leaving, 1])
        x[now], _ = advance(path, x[now], said[now], t, t_next, "euler", None)
        x[stems + leaving] = latents[leaving, 1]
    if progress:
        progress(count)
    return Trajectory(
        latents=latents,
        before=torch.zeros(1, dtype=torch.int64, device=policy.device),
        steps=branch[:, None].to(policy.device),
        sigmas=sigmas,
        log_probs=log_probs,
        node=torch.stack([origin * steps + branch, torch.arange(count)], 1).to(policy.device),
        final=x[stems:],
        nfe=(policy.nfe - spent) / count,
        predictions=kept if keep_predictions else None,
    )


def pruned(
    advantages: Tensor,
    trajectory: Trajectory,
    plan: StepPlan,
    *,
    depth: frozenset[int] = frozenset(),
    width: Literal["none", "branch", "extremes"] = "none",
    share: float = 0.5,
) -> Tensor:
    """(N, S) bool, the edges that are kept for training: BranchGRPO's two prunings (arXiv 2509.06040), which save backward passes.

    Depth pruning drops the edges at the steps `depth`. Width pruning drops leaves, each with the edges that are its alone, which are
    those from the last branching step on: "branch" keeps the best `share` of the leaves of each parent at that step, "extremes" the best
    share/2 and the worst share/2 of the leaves of each tree; at least one each. Leaves that tie with the last one kept are kept, too.

    The authors' code ranks the edges instead: beyond the last branching step every edge of a leaf has the same advantage, so that its
    stable sort keeps the earliest steps of a chain and drops no leaf.

    Args:
        advantages: (N, S); a leaf's is that of its last edge.
        depth: steps of the grid (the authors count depths from 1 on, the children's).

    Raises:
        ValueError: the width of a plan without branches is to be pruned.
    """
    steps = trajectory.steps
    kept = ~torch.isin(steps, torch.tensor(sorted(depth), dtype=steps.dtype, device=steps.device))
    if width == "none":
        return kept
    if not plan.splits:
        raise ValueError(f"width pruning {width!r} chooses among the branches of a tree, and this plan has none")
    parent = trajectory.node[:, trajectory.before[plan.recorded.index(plan.splits[-1])]]
    leaf, root = advantages[:, -1], trajectory.node[:, 0]
    chosen = _best(leaf, parent, share) if width == "branch" else _best(leaf, root, share / 2) | _best(-leaf, root, share / 2)
    return kept & (chosen[:, None] | (steps < plan.splits[-1]))


def _best(values: Tensor, groups: Tensor, share: float) -> Tensor:
    """(N,) bool: fewer members of the own group are better than the group's share, rounded and at least 1, has places."""
    same = groups[:, None] == groups
    better = (same & (values > values[:, None])).sum(1)
    return better < (share * same.sum(1)).round().clamp(min=1)


def pruned_depths(step: int, start: frozenset[int], stop: int, every: int = 30) -> frozenset[int]:
    """The steps that depth pruning skips at training step `step`, from 1 on: one earlier every `every`, until the first of them is `stop`.

    BranchGRPO slides from the last steps towards noise, at most to its last branching step.
    """
    shift = min((step - 1) // every, max(0, min(start, default=stop) - stop))
    return frozenset(depth - shift for depth in start)
