"""Denoising chains: one function for rollouts, evaluation and plain sampling, and one transition for rollout and replay alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.noise import gaussian as seeded_noise
from visalign.paths import Path
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts, Trajectory
from visalign.schedules import StepPlan, deterministic
from visalign.transitions import TRANSITIONS, Gaussian, Step, kernel, ode


@dataclass(frozen=True)
class Dynamics:
    """A kind of stochastic transition with its noise level."""

    kind: str
    level: float

    def __call__(self, path: Path, t: Tensor, t_next: Tensor) -> Step:
        return TRANSITIONS[self.kind](path, t, t_next, self.level)


def transition(
    policy: Policy, x: Tensor, t: Tensor, t_next: Tensor, condition: Condition, guidance: float, dynamics: Dynamics | None
) -> tuple[Gaussian, Tensor]:
    """The Gaussian over x at t_next given x (N, ...) at t (N,), and the prediction it rests on; no dynamics is the ODE's Euler step."""
    path = policy.family.path
    prediction = policy.predict(x, t, condition, guidance)
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
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Denoise N prompts and keep the steps that the plan records.

    All noise is a function of (seed, picture, step): the same pictures whatever the batch. Pictures that share their initial noise share
    the deterministic steps before the first stochastic one too, which are then computed once.

    Args:
        prompts, condition: N rows each.
        steps: T denoising steps on the family's own grid.
        batch: samples per forward; replay at the same size reproduces log-probabilities to the bit.
        plan: which steps are stochastic and recorded; None samples the ODE and records nothing.
        dynamics: the transition of stochastic steps.
        progress: called with the number of pictures finished since the last call.
    """
    plan = plan or deterministic(steps)
    sigmas = policy.family.grid(steps).to(policy.device)
    before, count = policy.nfe, len(prompts)
    noise_ids, origin = prompts.noise_ids.unique(return_inverse=True)
    prefix = plan.stochastic.index(True) if len(noise_ids) < count and any(plan.stochastic) else 0
    x = seeded_noise(policy.family.latent_shape, seed, noise_ids, 0, device=policy.device)
    if prefix:
        rows = torch.stack([(origin == n).nonzero()[0, 0] for n in range(len(noise_ids))])
        still = Walk(policy, sigmas, guidance, plan, None, lambda *_: x)
        x = torch.cat([still(x[r], condition.take(rows[r]), r, 0, prefix).final for r in torch.arange(len(x)).split(batch)])
    x = x[origin.to(x.device)]
    draw = lambda rows, step: seeded_noise(x.shape[1:], seed, prompts.ids[rows], step + 1, device=policy.device)  # noqa: E731
    walk = Walk(policy, sigmas, guidance, plan, dynamics, draw)
    chains: list[Chain] = []
    for rows in torch.arange(count).split(batch):
        chains.append(walk(x[rows], condition.take(rows), rows, prefix, steps))
        if progress:
            progress(len(rows))
    recorded = list(plan.recorded)
    node = torch.arange(count).unsqueeze(1).expand(count, len(recorded) + 1) if recorded else torch.zeros(count, 1, dtype=torch.int64)
    return Trajectory(
        latents=torch.cat([c.states for c in chains]),
        steps=torch.tensor(recorded, dtype=torch.int64, device=policy.device),
        sigmas=sigmas,
        log_probs=torch.cat([c.log_probs for c in chains]),
        node=node,
        final=torch.cat([c.final for c in chains]),
        nfe=(policy.nfe - before) / count,
    )


@dataclass(frozen=True)
class Chain:
    """One batch after some steps: `final` (N, ...), recorded `states` (N, S + 1, ...) and `log_probs` (N, S)."""

    final: Tensor
    states: Tensor
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

    def __call__(self, x: Tensor, condition: Condition, rows: Tensor, first: int, last: int) -> Chain:
        states, log_probs = [x], []
        for j in range(first, last):
            t, t_next = (self.sigmas[k].expand(len(x)) for k in (j, j + 1))
            dynamics = self.dynamics if self.plan.stochastic[j] else None
            law, _ = transition(self.policy, x, t, t_next, condition, self.guidance, dynamics)
            x = law.draw(self.draw(rows, j)) if dynamics else law.mean
            if j in self.plan.recorded:
                states.append(x)
                log_probs.append(law.log_prob(x))
            elif j < self.plan.recorded.start:
                states = [x]
        empty = x.new_zeros(len(x), 0)
        return Chain(x, torch.stack(states, 1) if log_probs else x[:, None][:, :1], torch.stack(log_probs, 1) if log_probs else empty)


@torch.no_grad()
def decode(policy: Policy, latents: Tensor, batch: int) -> Tensor:
    """(N, 3, H, W) pictures in [0, 1]."""
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
    """(N, 3, H, W) pictures in [0, 1] by the noise-free sampler."""
    condition = policy.family.encode(prompts.texts)
    trajectory = rollout(policy, prompts, condition, steps=steps, seed=seed, batch=batch, guidance=guidance, progress=progress)
    return decode(policy, trajectory.final, batch)
