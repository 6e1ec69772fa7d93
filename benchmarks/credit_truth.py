"""Toy worlds in which the value of a state is known: what `benchmarks.credit` holds every credit against.

V(x) = E[r(clean) | x] under the stochastic policy itself: in closed form in the Gaussian world, by nested Monte Carlo in the mixture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.families.toy import Toy
from visalign.paths import mean_weights
from visalign.policy import Policy
from visalign.rollout import Trajectory
from visalign.sampling import Dynamics, Walk
from visalign.schedules import StepPlan, all_steps
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

STEPS = 10
DYNAMICS = Dynamics("flow_sde", 0.7)
CHAIN = StepPlan(all_steps(STEPS).stochastic, ())  # the policy whose values are the truth: all steps stochastic but the last
CONTINUATIONS = 128  # from each state of the mixture, half of them for each of two independent values
PATHS = 200_000  # of the mixture's exact gradient


class Bump(Reward):
    """exp(-‖x - target‖²/2w²) of the point that a toy picture holds: never negative, and its mean under a Gaussian has a closed form."""

    def __init__(self, target: tuple[float, float], width: float):
        self.spec = RewardSpec("bump", differentiable=True, range=(0.0, 1.0))
        self.target, self.width = target, width

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(self.mean(Toy.points(batch.images)))

    def mean(self, point: Tensor, variance: Tensor | float = 0.0) -> Tensor:
        """E[r] (N,) over N(point (N, 2), variance·I)."""
        spread = self.width**2 + variance
        return self.width**2 / spread * (-(point - point.new_tensor(self.target)).square().sum(-1) / (2 * spread)).exp()


REWARDS = {"gaussian": Bump((1.8, 0.3), 0.6), "mixture": Bump((2.0, 0.0), 0.8)}


def outcome(family: Toy, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the Gaussian world the clean point given the state x at grid point k is N(slope[k]·x + offset[k], variance[k]·I) under `CHAIN`.

    Every step is affine, x' = push·x + carry + ς·ε; composed from the end backwards. `shift` is (T, 2); (T + 1,), (T + 1, 2), (T + 1,).
    """
    grid = family.grid(STEPS).double()
    t, t_next = grid[:-1], grid[1:]
    step, noisy = DYNAMICS(family.path, t, t_next), torch.tensor(CHAIN.stochastic)
    gamma, kappa = mean_weights(family.path, step.a, torch.where(noisy, step.c, t_next), t)
    base, origin = copy.deepcopy(family.toy).double().base, torch.zeros(STEPS, 2, dtype=torch.float64)
    at_origin = base(origin, t)
    push = gamma + kappa * (base(origin + 1, t) - at_origin)[:, 0]
    carry, noise = kappa[:, None] * (at_origin + shift.double()), torch.where(noisy, step.std, 0.0).square()
    slope, offset, variance = [push.new_ones(())], [carry.new_zeros(2)], [push.new_zeros(())]
    for k in reversed(range(STEPS)):
        offset.append(slope[-1] * carry[k] + offset[-1])
        variance.append(slope[-1].square() * noise[k] + variance[-1])
        slope.append(slope[-1] * push[k])
    return torch.stack(slope[::-1]), torch.stack(offset[::-1]), torch.stack(variance[::-1])


@dataclass(frozen=True)
class World:
    """A toy policy with its reward and the truth about both."""

    name: str
    policy: Policy
    reward: Bump

    @classmethod
    def of(cls, name: str) -> World:
        return cls(name, Policy(Toy(name, STEPS), name=f"toy:{name}"), REWARDS[name])

    @property
    def family(self) -> Toy:
        assert isinstance(self.policy.family, Toy)
        return self.policy.family

    def onward(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Clean points (N, 2) by `CHAIN` from states x (N, 2) at grid point k, with fresh noise."""
        draw = lambda rows, step: torch.randn(len(rows), 2, generator=generator)  # noqa: E731
        walk = Walk(self.policy, self.family.grid(STEPS), 1.0, CHAIN, DYNAMICS, draw)
        return walk(x, self.family.encode([""] * len(x)), torch.arange(len(x)), k, STEPS).final

    def closed(self, x: Tensor, k: Tensor) -> Tensor:
        """V(x) (M,) of states x (M, 2) at grid points k (M,); the Gaussian world."""
        slope, offset, variance = outcome(self.family, self.family.toy.shift.detach())
        return self.reward.mean(slope[k, None] * x + offset[k], variance[k])

    @torch.no_grad()
    def nested(self, x: Tensor, k: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(M, count) rewards of `count` continuations of each state x (M, 2) at grid points k (M,): their mean estimates V(x)."""
        found = x.new_zeros(len(x), count)
        for point in k.unique().tolist():
            now = k == point
            found[now] = self.reward.mean(self.onward(x[now].repeat_interleave(count, 0), point, generator)).view(-1, count)
        return found

    def values(self, trajectory: Trajectory) -> Tensor:
        """(2, N, K): V of every stored state, twice and with independent errors; the exact one twice where there is a closed form."""
        if self.name == "gaussian":
            found = self.closed(trajectory.latents.flatten(0, 1), trajectory.at.flatten()).view_as(trajectory.node)
            return torch.stack([found, found])
        owner = trajectory.owner()
        fresh = owner == torch.arange(len(owner))[:, None]
        drawn = self.nested(trajectory.latents[fresh], trajectory.at[fresh], CONTINUATIONS, torch.Generator().manual_seed(1))
        halves = drawn.double().view(len(drawn), 2, -1).mean(-1)
        found = torch.zeros(2, *owner.shape, dtype=torch.float64)
        found[:, fresh] = halves.T
        return found.gather(1, owner.expand(2, -1, -1))

    def gradient(self) -> Tensor:
        """(T - 1, 2) of E[r] with respect to the free vectors of the stochastic steps, which are all but the last."""
        if self.name != "gaussian":
            return self.pathwise(PATHS)
        shift = self.family.toy.shift.detach().clone().requires_grad_()
        slope, offset, variance = outcome(self.family, shift)
        mean = self.reward.mean(offset[0], variance[0] + slope[0].square())  # the initial noise is N(0, I)
        return torch.autograd.grad(mean, shift)[0][:-1].double()

    def pathwise(self, paths: int) -> Tensor:
        """`gradient` by derivatives along paths: unbiased, of small variance, and open to toy rewards alone."""
        generator, found = torch.Generator().manual_seed(2), torch.zeros(STEPS, 2, dtype=torch.float64)
        for _ in range(10):
            start = torch.randn(paths // 10, 2, generator=generator)
            mean = self.reward.mean(self.onward(start, 0, generator)).mean()
            found += torch.autograd.grad(mean, self.family.toy.shift)[0] / 10
        return found[:-1]
