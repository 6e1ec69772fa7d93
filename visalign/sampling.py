"""Denoising chains: one function for rollouts, evaluation and plain sampling, and one transition for rollout and replay alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.noise import gaussian as seeded_noise
from visalign.paths import Path, endpoints
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts, Trajectory
from visalign.schedules import StepPlan, deterministic, tail
from visalign.solvers import Memory, predict_all, solve
from visalign.transitions import TRANSITIONS, Gaussian, Step, kernel, ode


@dataclass(frozen=True)
class Dynamics:
    """A kind of stochastic transition with its noise level: one for all steps, or (T,) for those of a grid (T + 1,)."""

    kind: str
    level: float | Tensor
    grid: Tensor | None = None

    def __call__(self, path: Path, t: Tensor, t_next: Tensor) -> Step:
        level = self.level
        if isinstance(level, Tensor):
            assert self.grid is not None, "levels per step belong to a grid"
            level = level.to(t.device)[(self.grid[:-1, None].to(t) - t).abs().argmin(0)]
        return TRANSITIONS[self.kind](path, t, t_next, level)


def transition(
    policy: Policy,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    condition: Condition,
    guidance: float,
    dynamics: Dynamics | None,
    known: Tensor | None = None,
) -> tuple[Gaussian, Tensor]:
    """The Gaussian over x at t_next given x (N, ...) at t (N,), and the prediction it rests on: the network's, unless it is `known`.

    No dynamics is the ODE's Euler step.
    """
    path = policy.family.path
    prediction = policy.predict(x, t, condition, guidance) if known is None else known
    step = dynamics(path, t, t_next) if dynamics else ode(path, t, t_next, 0.0)
    return kernel(path, x, prediction, t, t_next, step), prediction


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Prompts,
    condition: Condition,
    *,
    steps: int,
    seed: int,
    batch: int,
    guidance: float = 1.0,
    plan: StepPlan | None = None,
    dynamics: Dynamics | None = None,
    keep_predictions: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Denoise N prompts and keep the steps that the plan records.

    All noise is a function of (seed, picture, step): the same pictures whatever the batch. Pictures that share their initial noise share
    the deterministic steps before the first stochastic one too, and what the network says there: see `begin`.

    Args:
        prompts, condition: N rows each.
        steps: T denoising steps on the family's own grid.
        batch: samples per forward; replay at the same size reproduces log-probabilities to the bit.
        plan: which steps are stochastic and recorded, and how the chain ends; None samples the ODE and records nothing.
        dynamics: the transition of stochastic steps.
        keep_predictions: store what the network said at the recorded states, too.
        progress: called with the number of pictures finished since the last call.

    Raises:
        ValueError: the plan branches.
    """
    plan = plan or deterministic(steps)
    if plan.leaves > 1:
        raise ValueError(f"a plan that branches at {plan.splits} is for visalign.branching.tree_rollout")
    sigmas = policy.family.grid(steps).to(policy.device)
    before, count = policy.nfe, len(prompts)
    x, origin, prefix, said = begin(policy, prompts, condition, sigmas, plan, seed, batch, guidance)
    draw = lambda rows, step: seeded_noise(x.shape[1:], seed, prompts.ids[rows], step + 1, device=policy.device)  # noqa: E731
    walk = Walk(policy, sigmas, guidance, plan, dynamics, draw)
    chains: list[Chain] = []
    for rows in torch.arange(count).split(batch):
        chains.append(walk(x[rows], condition.take(rows), rows, prefix, steps, None if said is None else said[rows]))
        if progress:
            progress(len(rows))
    latents = torch.cat([c.states for c in chains])
    node = torch.arange(count, device=policy.device)[:, None].repeat(1, latents.shape[1])
    if plan.recorded and plan.recorded[0] == plan.stochastic.index(True):
        node[:, 0] = origin.to(policy.device)  # until the first draw equal initial noise is one state
    return Trajectory(
        latents=latents,
        before=torch.tensor(plan.before, dtype=torch.int64, device=policy.device),
        steps=torch.tensor(plan.recorded, dtype=torch.int64, device=policy.device).expand(count, -1),
        sigmas=sigmas,
        log_probs=torch.cat([c.log_probs for c in chains]),
        node=node,
        final=torch.cat([c.final for c in chains]),
        nfe=(policy.nfe - before) / count,
        predictions=torch.cat([c.predictions for c in chains]) if keep_predictions else None,
    )


def begin(
    policy: Policy, prompts: Prompts, condition: Condition, sigmas: Tensor, plan: StepPlan, seed: int, batch: int, guidance: float
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Latents (N, ...) at the start of a step, numbers (N,) that are equal where latents are, that step, and the prediction (N, ...) there.

    The first step, of which nothing is said; or, where N pictures share U initial noises, the first stochastic step j, with (j + 1)·U
    forwards instead of (j + 1)·N. The replay shares that state's forward too, in batches of the same size: a network's rounding may depend
    on it, and the old log-probability must be the replay's to the bit.
    """
    noise_ids, origin = prompts.noise_ids.unique(return_inverse=True)
    count, unique = len(prompts), len(noise_ids)
    rows = torch.stack([(origin == n).nonzero()[0, 0] for n in range(unique)])  # who share their noise share their prompt
    noise = seeded_noise(policy.family.latent_shape, seed, noise_ids, 0, device=policy.device)
    pieces = torch.arange(unique).split(batch)
    x = torch.cat([policy.start(noise[r], sigmas[0].expand(len(r)), condition.take(rows[r])) for r in pieces])
    place = origin.to(x.device)
    if unique == count or not any(plan.stochastic):
        return x[place], origin, 0, None
    first = plan.stochastic.index(True)
    if first:
        still = Walk(policy, sigmas, guidance, plan, None, lambda *_: x)
        x = torch.cat([still(x[r], condition.take(rows[r]), r, 0, first).final for r in pieces])
    said = predict_all(policy, x, sigmas[first], condition.take(rows), guidance, batch)
    return x[place], origin, first, said[place]


@dataclass(frozen=True)
class Chain:
    """One batch after some steps: `final` (N, ...), stored `states` and `predictions` (N, K, ...) and `log_probs` (N, S)."""

    final: Tensor
    states: Tensor
    predictions: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Walk:
    """Steps of a batch along the grid; `draw(rows, step)` supplies the noise of stochastic steps."""

    policy: Policy
    sigmas: Tensor
    guidance: float
    plan: StepPlan
    dynamics: Dynamics | None
    draw: Callable[[Tensor, int], Tensor]

    def __call__(self, x: Tensor, condition: Condition, rows: Tensor, first: int, last: int, said: Tensor | None = None) -> Chain:
        """Steps `first` to `last` from x (N, ...); `said` is what the network says of x, where that is known."""
        handover = self.plan.handover
        states: list[Tensor] = []
        predictions: list[Tensor] = []
        log_probs: list[Tensor] = []
        memory: Memory | None = None
        for j in range(first, min(last, handover)):
            recorded = j in self.plan.recorded
            if recorded and len(predictions) == len(states):  # else x is stored already, as the end of the step before
                states.append(x)
            t, t_next = (self.sigmas[k].expand(len(x)) for k in (j, j + 1))
            dynamics = self.dynamics if self.plan.stochastic[j] else None
            known = said if j == first else None
            law, prediction = transition(self.policy, x, t, t_next, condition, self.guidance, dynamics, known)
            if len(predictions) < len(states):
                predictions.append(prediction)
            if j + 1 == handover < last:
                memory = t, endpoints(self.policy.family.path, x, prediction, t)[0]
            x = law.draw(self.draw(rows, j)) if dynamics else law.mean
            if recorded:
                states.append(x)
                log_probs.append(law.log_prob(x))
        if self.plan.finish and handover < last:
            prediction = self.policy.predict(x, self.sigmas[handover].expand(len(x)), condition, self.guidance)
            if len(predictions) < len(states):
                predictions.append(prediction)
            times = tail(self.sigmas, handover, self.plan.finish)
            x = solve(self.policy, x, times, condition, self.guidance, solver="dpm2m", prediction=prediction, previous=memory)
        if len(predictions) < len(states):
            predictions.append(torch.zeros_like(x))
        nothing = x.new_zeros(len(x), 0)
        stack = lambda values: torch.stack(values, 1) if values else nothing  # noqa: E731
        return Chain(x, stack(states), stack(predictions), stack(log_probs))


@torch.no_grad()
def decode(policy: Policy, latents: Tensor, batch: int) -> Tensor:
    """(N, 3, H, W) pictures in [0, 1], or (N, F, 3, H, W) videos."""
    return torch.cat([policy.family.decode(piece) for piece in latents.split(batch)])


@torch.no_grad()
def pictures(
    policy: Policy,
    prompts: Prompts,
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    guidance: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """(N, 3, H, W) pictures in [0, 1], or (N, F, 3, H, W) videos, by the noise-free sampler."""
    condition = policy.family.encode(prompts.texts, prompts.metadata)
    trajectory = rollout(policy, prompts, condition, steps=steps, seed=seed, batch=batch, guidance=guidance, progress=progress)
    return decode(policy, trajectory.final, batch)
