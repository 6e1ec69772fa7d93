"""Feynman-Kac steering (arXiv 2501.06848): particles are weighed by their rewards on the way, and drawn anew from the heavy ones.

Sequential Monte Carlo for the tilted law p(x)·exp(λ r(x)), p the stochastic sampler's. A potential G at some points of the chain looks at
the clean estimate; whatever it is, the last one makes up for all before it, so that many particles follow the tilted law exactly. Differs
from the authors' code: resampling is systematic, which adds less variance than multinomial; the stochastic step is any of
`visalign.transitions`, so that flow models have one too; and λ may be in units of the scores' own spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.config import Above, Fraction, Positive
from visalign.findings import State, Stochastic
from visalign.guiding import Method
from visalign.tasks import Task

Potential = Literal["difference", "max", "sum", "current"]


class FeynmanKac(Method):
    """K particles per picture; the best is the result, or with `pick=sample` one drawn by its weight, which follows the tilted law."""

    class Config(Stochastic):
        particles: Positive | None = None  # K; null: what the budget pays for, 4 without one
        strength: Above = 10.0  # λ
        unit: Literal["score", "spread"] = "score"  # of 1/λ: the score's own, or the std of a picture's first scores
        potential: Potential = "difference"  # λ times: r - r before; the lineage's highest r; the sum of its r; r
        at: tuple[Fraction, ...] = (0.2, 0.4, 0.6, 0.8)  # shares of the steps after which particles are weighed; the end always is
        ess: Fraction = 1.0  # draw anew only where the effective sample size is below this share of K
        resampling: Literal["systematic", "multinomial"] = "systematic"
        pick: Literal["best", "sample"] = "best"

    def run(self, task: Task) -> Iterator[State]:
        points = sorted({min(max(round(share * task.steps), 1), task.steps - 1) for share in self.settings.at} - {0})
        cost = task.evaluation, len(points) + 1
        most = task.affordable(*cost, self.settings.particles or 4)
        count, number = min(self.settings.particles or most, most), 0
        if count < 2:
            yield from self.fresh(task, 0, task.evaluations(1, 1))
            return
        repeats = task.budget.ends and self.settings.pick == "best"
        while number == 0 or (repeats and task.affordable(*cost) >= count):
            yield from self.swarm(task, count, points, number)
            number += 1

    def swarm(self, task: Task, count: int, points: list[int], number: int) -> Iterator[State]:
        """One run of K particles for each picture."""
        rows, settings, x = task.rows(count), self.settings, task.starts(count, number)
        particles = Particles.fresh(len(task), count)
        first = torch.arange(len(task)) * count
        for step in range(task.steps):
            said, figures = task.predict(x, step, rows), {}
            clean = task.clean(x, said, step)
            if step in points:
                found = task.look(clean, rows)
                particles = particles.weighed(found.total.cpu().view(-1, count), settings.strength, settings.unit, settings.potential)
                chance = task.chance(f"resample/{number}/{step}", count)
                place, particles = particles.drawn(chance, settings.ess, settings.resampling)
                x, said, clean = x[place], said[place], clean[place]
                figures = found.figures | {"ess": particles.ess.mean().item()}
            if step:
                yield task.state(step, task.steps, clean[first + particles.log_weights.argmax(1)], **figures)
            if step + 1 < task.steps:
                x = task.law(x, said, step, settings).draw(task.draw(f"particles/{number}/{step}", count))
            else:
                x = task.euler(x, said, step)
        found = task.look(x, rows)
        ended = particles.weighed(found.total.cpu().view(-1, count), settings.strength, settings.unit, "last")
        best = found.total.cpu().view(-1, count).argmax(1) if settings.pick == "best" else ended.one(task.chance(f"pick/{number}", 1))
        chosen = found.take(first + best)
        task.keep(chosen)
        yield task.state(task.steps, task.steps, chosen, **found.figures, ess=ended.effective.mean().item())


@dataclass(frozen=True)
class Particles:
    """Weights of K particles for each of N pictures, and what their lineages have been paid, in float64 on the CPU.

    Attributes:
        log_weights: (N, K), since particles were last drawn anew.
        paid: (N, K) log of the product of a lineage's potentials so far.
        highest, total: (N, K) of a lineage's rewards: the highest, their sum.
        scale: (N, 1) what λ is divided by; NaN before the first rewards.
        ess: (N,) effective sample sizes when they were last weighed, before being drawn.
    """

    log_weights: Tensor
    paid: Tensor
    highest: Tensor
    total: Tensor
    scale: Tensor
    ess: Tensor

    @classmethod
    def fresh(cls, pictures: int, count: int) -> Particles:
        """Before the first step: equal weights."""
        zero = torch.zeros(pictures, count, dtype=torch.float64)
        whole = torch.full((pictures,), float(count), dtype=torch.float64)
        return cls(zero, zero, zero - math.inf, zero, zero[:, :1] + math.nan, whole)

    def weighed(self, rewards: Tensor, strength: float, unit: str, potential: Potential | Literal["last"]) -> Particles:
        """After rewards (N, K); -inf is a failure, of no weight while others have any. "last" pays what is missing to exp(λ r)."""
        failed, r = rewards.isinf(), rewards.double().nan_to_num(neginf=0.0)
        scale = torch.where(self.scale.isnan(), spread(r, ~failed) if unit == "spread" else torch.ones_like(self.scale), self.scale)
        highest, total, tilt = torch.maximum(self.highest, r), self.total + r, strength / scale
        due = tilt * r - self.paid
        pays = {"difference": due, "max": tilt * highest, "sum": tilt * total, "current": tilt * r, "last": due}[potential]
        pays = torch.where(failed, 0.0, pays)
        dead = failed & ~failed.all(1, keepdim=True)
        weights = torch.where(dead, -math.inf, self.log_weights + pays)
        return Particles(weights, self.paid + pays, highest, total, scale, self.ess)

    @property
    def shares(self) -> Tensor:
        """(N, K) normalised weights; equal where all particles failed."""
        return self.log_weights.softmax(1).nan_to_num(1 / self.log_weights.shape[1])

    @property
    def effective(self) -> Tensor:
        """(N,) effective sample size 1/Σw², from 1 to K."""
        return 1 / self.shares.square().sum(1)

    def drawn(self, chance: Tensor, least: float, how: str) -> tuple[Tensor, Particles]:
        """Rows (N·K,) that go on, and their weights, pictures drawing anew whose effective sample size is below `least`·K."""
        count, ess = chance.shape[1], self.effective
        anew = (ess < least * count * (1 - 1e-9))[:, None]
        still = torch.arange(count).expand_as(chance)
        place = torch.where(anew, resample(self.shares, chance, how), still)
        weights = torch.where(anew, 0.0, self.log_weights)
        paid, highest, total = (values.gather(1, place) for values in (self.paid, self.highest, self.total))
        rows = place + torch.arange(len(place))[:, None] * count
        return rows.flatten(), Particles(weights, paid, highest, total, self.scale, ess)

    def one(self, chance: Tensor) -> Tensor:
        """(N,) one particle each, drawn by its weight with `chance` (N, 1)."""
        return resample(self.shares, chance, "multinomial")[:, 0]


def spread(rewards: Tensor, valid: Tensor) -> Tensor:
    """(N, 1) std of each picture's valid rewards (N, K); 1 where they don't differ."""
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = (rewards * valid).sum(1, keepdim=True) / count
    std = (((rewards - mean) * valid).square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(std > 1e-8, std, 1.0)


def resample(shares: Tensor, chance: Tensor, how: str) -> Tensor:
    """(N, C) particles, each k expected C·shares[:, k] times, from uniform numbers (N, C); systematic uses the first of each row alone."""
    count = chance.shape[1]
    if how == "systematic":
        chance = (chance[:, :1] + torch.arange(count)) / count
    edges = shares.cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], chance.to(edges), right=True).clamp(max=shares.shape[1] - 1)
