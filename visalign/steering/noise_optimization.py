"""Noise optimisation (ReNO, arXiv 2406.04312): better pictures of a few-step generator by gradient ascent on its initial noise alone.

    ε ← ε + step(∇_ε [Σ w_k r_k(g(ε, c), c) - K(ε)]),   best of all ε seen, by the rewards alone

Differs from the authors' code: many pictures at once, each with its own gradient, clipping and best; texts are encoded once; K may look at
more of the noise than its length (`visalign.whiteness`); a Langevin step that keeps N(0, I) by itself; and rewards without a gradient are
climbed by antithetic pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign import findings
from visalign.climbing import Spent, check, look
from visalign.config import Above, AtLeastZero, Fraction, Positive, Section
from visalign.guiding import Method
from visalign.noise import gaussian, seed_for
from visalign.paths import expand
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts
from visalign.scoring import Panel
from visalign.tasks import Task
from visalign.whiteness import describe, length_energy, whiteness_energy


class Settings(Section):
    """How a noise is optimised; the defaults are ReNO's."""

    iterations: Positive = 50  # noises looked at; the first is the plain sample's
    method: Literal["sgd", "adam", "langevin"] = "sgd"
    lr: Above = 5.0  # sgd, adam: step size
    momentum: Fraction = 0.9  # sgd: Nesterov's
    max_grad_norm: Above | None = 0.1  # each picture's gradient is cut to this length; null: never
    length: AtLeastZero = 0.01  # sgd, adam: weight of `whiteness.length_energy`
    whiteness: AtLeastZero = 0.0  # sgd, adam: weight of `whiteness.whiteness_energy`
    refresh: Fraction = 0.1  # langevin: share of the noise's variance that is drawn anew in every iteration
    temperature: Above = 1.0  # langevin: its law tends to N(0, I)·exp(r/temperature)
    gradient: Literal["exact", "antithetic"] = "exact"  # antithetic: estimated from scores, for any generator and reward
    pairs: Positive = 4  # antithetic: each costs two samples and two scores
    radius: Fraction = 0.2  # antithetic: how far a pair lies off the noise, as the std of its share


@dataclass(frozen=True)
class Found:
    """N noises with what came of them.

    Attributes:
        iteration: (N,) int64, when each was seen.
        noise, latents: (N, ...), the latter clean.
        images: (N, 3, H, W) in [0, 1].
        scores: reward name -> (N,), with "total"; NaN where a score failed.
    """

    iteration: Tensor
    noise: Tensor
    latents: Tensor
    images: Tensor
    scores: dict[str, Tensor]

    def better(self, other: Found) -> Found:
        """Picture by picture the one with the higher total; a failed score loses."""
        mine, theirs = (torch.where(f.scores["total"].isnan(), -math.inf, f.scores["total"]) for f in (self, other))
        pick = lambda a, b: torch.where(expand(theirs > mine, a), b, a)  # noqa: E731
        return Found(
            pick(self.iteration, other.iteration),
            pick(self.noise, other.noise),
            pick(self.latents, other.latents),
            pick(self.images, other.images),
            {name: pick(score, other.scores[name]) for name, score in self.scores.items()},
        )


@dataclass(frozen=True)
class State:
    """Where N searches are after an iteration.

    Attributes:
        iteration: from 0.
        now: this iteration's noises.
        best: of all so far, by the rewards alone.
        figures: name -> (N,): `visalign.whiteness.describe` of this iteration's noise, and `gradient`, the length of the reward's gradient
            before it is cut (NaN in the last iteration, which needs none).
        spent: so far.
    """

    iteration: int
    now: Found
    best: Found
    figures: dict[str, Tensor]
    spent: Spent


class Search:
    """A search over the initial noise, ready for any prompts.

    Args:
        policy: a few-step generator; its weights get no gradient if they don't ask for one.
        rewards: what is climbed; each scores a picture by itself.
        settings: see `Settings`.
        steps, guidance, seed: of the sampler; the first iteration is `visalign.sampling.pictures` with the same ones.

    Raises:
        UserError: a reward with a weight has no gradient and an exact one is asked for, or compares pictures; or none has a weight.
    """

    def __init__(self, policy: Policy, rewards: Panel, settings: Settings, *, steps: int, guidance: float = 1.0, seed: int = 0):
        check(rewards, settings.gradient == "exact", "use gradient=antithetic, which needs scores alone, or weight 0")
        self.policy, self.rewards, self.settings = policy, rewards, settings
        self.steps, self.guidance, self.seed = steps, guidance, seed

    def __call__(self, prompts: Prompts) -> Iterator[State]:
        """The states after every iteration; stop at any, its `best` is the result. Pictures don't depend on their batch neighbours."""
        settings = self.settings
        condition = self.policy.family.encode(prompts.texts, prompts.metadata)
        x = gaussian(self.policy.family.latent_shape, self.seed, prompts.noise_ids, 0, device=self.policy.device)
        ascent = self._ascent(x)
        best, spent = None, Spent()
        for iteration in range(settings.iterations):
            climbs = iteration + 1 < settings.iterations
            now, gradient, paid = self._look(x, prompts, condition, iteration, climbs and settings.gradient == "exact")
            best, spent = best.better(now) if best else now, spent + paid
            if climbs and settings.gradient == "antithetic":
                gradient, seen, paid = self._estimate(x, prompts, condition, iteration)
                best, spent = best.better(seen), spent + paid
            steepness = gradient.flatten(1).norm(dim=1) if climbs else torch.full_like(now.scores["total"], math.nan)
            yield State(iteration, now, best, describe(x) | {"gradient": steepness}, spent)
            if climbs:
                x = self._move(x, gradient, prompts, iteration, ascent)

    # --- looking -------------------------------------------------------------------------------------------------------

    def _look(self, x: Tensor, prompts: Prompts, condition: Condition, iteration: int, exact: bool) -> tuple[Found, Tensor, Spent]:
        """What comes of noises (N, ...), their gradient (0 where none is asked for), and what it cost."""
        chain = {"steps": self.steps, "guidance": self.guidance, "slope": exact}
        seen = look(self.policy, self.rewards, x, prompts, condition, **chain)
        scores = {name: values.detach().to(x.device) for name, values in seen.scores.by_name().items()}
        when = torch.full((len(x),), iteration, device=x.device)
        return Found(when, x.detach().clone(), seen.latents, seen.images, scores), seen.gradient, seen.spent

    def _estimate(self, x: Tensor, prompts: Prompts, condition: Condition, iteration: int) -> tuple[Tensor, Found, Spent]:
        """Σ (r(ε⁺) - r(ε⁻))·u / (2 ϱ K) over K pairs ε± = √(1 - ϱ²)·ε ± ϱ·u with u ~ N(0, I), (N, ...), and the best of the pairs.

        An antithetic evolution strategy (arXiv 1703.03864), but with pairs that are noise of the right length, and so may be the result.
        """
        settings, radius = self.settings, self.settings.radius
        gradient, best, spent = torch.zeros_like(x), None, Spent()
        for pair in range(settings.pairs):
            way = gaussian(x.shape[1:], self.seed, prompts.ids, f"way/{iteration}/{pair}", device=x.device)
            totals: list[Tensor] = []
            for sign in (1, -1):
                found, _, paid = self._look(math.sqrt(1 - radius**2) * x + sign * radius * way, prompts, condition, iteration, exact=False)
                best, spent = best.better(found) if best else found, spent + paid
                totals.append(found.scores["total"])
            slope = ((totals[0] - totals[1]) / (2 * radius)).nan_to_num(0.0)
            gradient += expand(slope, way) * way / settings.pairs
        assert best is not None
        return gradient, best, spent

    # --- moving --------------------------------------------------------------------------------------------------------

    def _ascent(self, x: Tensor) -> torch.optim.Optimizer | None:
        """torch's own optimizer, whose steps are elementwise; None for Langevin's."""
        settings = self.settings
        if settings.method == "adam":
            return torch.optim.Adam([x], settings.lr, eps=1e-2)  # the authors' epsilon
        if settings.method == "sgd":
            return torch.optim.SGD([x], settings.lr, settings.momentum, nesterov=settings.momentum > 0)
        return None

    def _move(self, x: Tensor, gradient: Tensor, prompts: Prompts, iteration: int, ascent: torch.optim.Optimizer | None) -> Tensor:
        """The next noises (N, ...)."""
        settings = self.settings
        if ascent is None:
            fresh = gaussian(x.shape[1:], self.seed, prompts.ids, f"langevin/{iteration}", device=x.device)
            return langevin(x, clipped(gradient, settings.max_grad_norm) / settings.temperature, fresh, settings.refresh)
        x.grad = clipped(self._pull(x, iteration) - gradient, settings.max_grad_norm)
        ascent.step()
        return x

    def _pull(self, x: Tensor, iteration: int) -> Tensor:
        """Gradient (N, ...) of the regularisers."""
        settings = self.settings
        with torch.enable_grad():
            noise = x.detach().clone().requires_grad_()
            energy = settings.length * length_energy(noise)
            if settings.whiteness:
                energy = energy + settings.whiteness * whiteness_energy(noise, seed_for(self.seed, "shuffles", iteration))
            return torch.autograd.grad(energy.sum(), noise)[0]


def clipped(gradient: Tensor, longest: float | None) -> Tensor:
    """Rows (N, ...) of a length of at most `longest`; None leaves them."""
    if longest is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1)
    return gradient * expand((longest / norm.clamp_min(1e-30)).clamp_max(1.0), gradient)


def langevin(x: Tensor, drift: Tensor, fresh: Tensor, refresh: float) -> Tensor:
    """√(1 - γ)·x + (1 - √(1 - γ))·drift + √γ·fresh, (N, ...): preconditioned Crank-Nicolson's step (arXiv 1202.0709), with γ = `refresh`.

    Without a drift N(0, I) stays N(0, I) to the letter, and with a constant one N(drift, I), whatever γ: no energy has to hold the noise in
    place. With ∇r/τ its law tends to N(0, I)·exp(r/τ) as γ → 0. ORIGEN (arXiv 2503.22194) has γ·η in place of 1 - √(1 - γ) ≈ γ/2.
    """
    keep = math.sqrt(1 - refresh)
    return keep * x + (1 - keep) * drift + math.sqrt(refresh) * fresh


class NoiseOptimization(Method):
    """ε ← ε + step(∇_ε [r(g(ε)) - K(ε)]) from the plain sample's noise, for generators of one or a few steps; the best picture seen."""

    class Config(Settings):
        iterations: Positive | None = None  # pyright: ignore[reportIncompatibleVariableOverride] -- null: what the budget pays, 50 without one

    @property
    def needs_gradient(self) -> bool:
        return self.settings.gradient == "exact"

    def run(self, task: Task) -> Iterator[findings.State]:
        assert task.panel is not None
        settings = Settings(**(self.settings.model_dump() | {"iterations": self.iterations(task)}))
        searches = [
            Search(task.policy, task.panel, settings, steps=task.steps, guidance=task.guidance, seed=task.seed)(task.prompts.take(rows))
            for rows in task.rows().split(task.batch)
        ]
        found = lambda parts: findings.Found.join([findings.Found(p.latents, p.images, p.scores) for p in parts])  # noqa: E731
        for states in zip(*searches, strict=True):
            now = found([s.now for s in states])
            spent = [(s.spent, len(s.now.noise)) for s in states]
            task.backwards = round(sum(s.nfe_backward * n for s, n in spent))
            task.scored = round(sum(s.reward_calls * n for s, n in spent))
            task.keep(found([s.best for s in states]))
            yield task.state(states[0].iteration + 1, settings.iterations, now.latents, **now.figures)

    def iterations(self, task: Task) -> int:
        """As many as are asked for, or the budget pays for: each but the last takes a gradient."""
        settings = self.settings
        exact = 2 + (task.steps > 1)  # a backward counts two forwards, and checkpointing takes one more
        forwards, calls = (exact, 0) if self.needs_gradient else (2 * settings.pairs, 2 * settings.pairs)
        more = task.affordable((1 + forwards) * task.evaluation, 1 + calls, 49, besides=(task.evaluation, 1))
        return 1 + (more if settings.iterations is None else min(more, settings.iterations - 1))
