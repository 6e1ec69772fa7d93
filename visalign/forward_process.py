"""What trainers on the forward process share: clean pictures by any solver, times, noise and mixtures, an older policy.

Unlike a policy gradient over sampling steps these need no stochastic sampler, no record of the chain and no log-probabilities: a step draws
clean latents, credits them, and mixes each with noise at a few times of its own. Guidance is for drawing alone: what learns is the
conditional prediction.

Times are drawn systematically: the shares of the schedule that a sample's n times take are (k + u)/n for k < n with one u per sample, so
that they cover the schedule evenly; their order differs from sample to sample. All noise is a function of (seed, picture, step, draw).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from visalign.axes import Credit
from visalign.config import Fraction, Positive, Section
from visalign.errors import UserError
from visalign.losses import Loss
from visalign.noise import gaussian
from visalign.paths import mix, prediction_from
from visalign.policy import Policy
from visalign.rollout import Condition, Noised, Prompts, Rollout, Trajectory
from visalign.sampling import decode
from visalign.snapshots import Snapshot
from visalign.solvers import Solver, solve
from visalign.trainer import Session, Trainer

UNUSED = ("exploration", "transition", "ratio")  # sections that speak of stochastic steps
FINE = 1000  # points of the schedule between which continuous times lie


class OldSection(Section):
    """An older policy: every so many training steps old ← d·old + (1 - d)·current, with d = rate·(updates - flat) within [0, most]."""

    every: Positive | None = 1  # training steps; null: never, it stays the untrained model
    flat: Annotated[int, Field(ge=0)] = 0  # optimizer steps for which it is a copy
    rate: Fraction = 0.0  # growth of d per optimizer step after that
    most: Fraction = 0.0  # largest d

    def decay(self, updates: int) -> float:
        """d after so many optimizer steps."""
        return min(self.rate * max(0, updates - self.flat), self.most)


@dataclass(frozen=True)
class Units:
    """What a step trains: U samples, or U pairs of them.

    Attributes:
        rows: (U, 1) or (U, 2) int64, of a rollout.
        credit: (U,) float32.
        weight: (U,) float32 of each in the mean.
    """

    rows: Tensor
    credit: Tensor
    weight: Tensor


class ForwardTrainer(Trainer):
    """Base of trainers on the forward process: a subclass in `trainers/NAME.py` implements `loss`, and may choose what is trained."""

    class Config(Trainer.Config):
        timesteps: Positive = 2  # times at which each sample is trained, per step; `updates` optimizer steps share them
        times: Literal["grid", "uniform", "logit_normal"] = "grid"  # grid: the sampler's own points; else anywhere on its schedule
        span: tuple[Fraction, Fraction] = (0.0, 1.0)  # share of the schedule that is trained, from noise (0) to data (1)
        solver: Solver = "euler"  # that draws pictures, with policy.steps steps
        draws: Literal["current", "old"] = "current"  # whose pictures a step trains on
        old: OldSection = OldSection()

    invalid_for_distilled: ClassVar[bool] = True

    def __init__(self, session: Session):
        super().__init__(session)
        config, name = self.config, self.config.trainer.name
        for section in UNUSED:
            if getattr(config, section) != type(getattr(config, section))():
                raise UserError(f"{section}: {name} trains on the forward process, which has no stochastic steps; leave this section out")
        if config.credit.kind != "terminal":
            raise UserError(f"credit.kind={config.credit.kind} credits the steps of a sampler; {name} has none: use credit.kind=terminal")
        low, high = self.settings.span
        if low >= high or (self.settings.times == "grid" and round(low * config.policy.steps) == round(high * config.policy.steps)):
            raise UserError(f"trainer.span=[{low:g}, {high:g}] holds no time; widen it (policy.steps={config.policy.steps})")
        self.crediting = Credit(config.credit, session.rewards)
        self.crediting.check()
        self.old = Snapshot(self.parameters)

    def check_batches(self, own: int) -> None:
        if self.settings.updates > own * self.settings.timesteps:
            raise UserError(f"trainer.updates={self.settings.updates}: a process has only {own} pictures × {self.settings.timesteps} times")

    def copies(self) -> dict[str, list[Tensor]]:
        return super().copies() | {"old": self.old.values}

    # --- collect, credit -----------------------------------------------------------------------------------------------

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        del step
        condition = self.policy.family.encode(prompts.texts, prompts.metadata)
        trajectory = self.drawn(prompts, condition)
        return self.scored(prompts, condition, trajectory, decode(self.policy, trajectory.final, self.settings.micro_batch))

    def drawn(self, prompts: Prompts, condition: Condition) -> Trajectory:
        """Clean latents by the weights that draw, without noise."""
        section, settings = self.config.policy, self.settings
        common = {"steps": section.steps, "guidance": section.guidance, "seed": self.config.run.seed}
        with self.old.weights() if settings.draws == "old" else nullcontext():
            return draw(self.policy, prompts, condition, batch=settings.micro_batch, solver=settings.solver, **common)

    def credit(self, rollout: Rollout) -> Tensor:
        """(N, 1)."""
        groups = rollout.prompts.groups.to(rollout.rewards["total"].device)
        found = self.crediting.terminal(rollout, groups, self.processes.sum)
        return (found if rollout.weights is None else found * rollout.weights.to(found))[:, None].to(self.device)

    # --- learn -----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Noised) -> Loss:
        """Loss of some noised latents, averaged over them."""

    def units(self, rollout: Rollout) -> Units:
        """What is trained: here every sample that credit keeps."""
        assert rollout.advantages is not None
        rows = self.crediting.kept(rollout).nonzero()
        credit = rollout.advantages[rows[:, 0], 0]
        return Units(rows, credit, torch.ones_like(credit))

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        row = super().learn(rollout, step)
        if "loss" not in row:  # nothing to learn from, on no process
            return row | {"loss": math.nan, "skipped": 1.0}
        old = self.settings.old
        if old.every and step % old.every == 0:
            self.old.follow(old.decay(step * self.settings.updates))
        return row

    def describe(self, rollout: Rollout) -> dict[str, float]:
        assert rollout.advantages is not None
        return {"credit/size": self.processes.mean(rollout.advantages.abs().mean()).item()}

    def watch(self, batch: Noised, loss: Loss) -> None:
        del batch, loss  # there are no sampling steps to tell apart

    def minibatches(self, rollout: Rollout, step: int) -> Iterator[list[Noised]]:
        """For each update the micro-batches it averages: every sample or pair at each of its times, update by update.

        Processes may have differently many: weights make it the mean over all of them, and a process with none takes part with weight 0.
        """
        settings, found = self.settings, self.units(rollout)
        count = len(found.rows)
        shares = torch.arange(count * settings.timesteps).tensor_split(settings.updates)  # of all times, draw by draw
        own = torch.tensor([float(len(share)) for share in shares], device=self.device)
        scale = (own * self.processes.count / self.processes.sum(own)).tolist()
        size = max(1, settings.micro_batch * settings.stacked_timesteps // found.rows.shape[1])
        for share, factor in zip(shares, scale, strict=True):
            if math.isnan(factor):  # no process has any
                continue
            if len(share):
                yield [self.noised(rollout, found, piece % count, piece // count, step, factor) for piece in share.split(size)]
            else:
                nothing = Units(found.rows.new_zeros(1, found.rows.shape[1]), *torch.zeros(2, 1, device=self.device))
                yield [self.noised(rollout, nothing, torch.zeros(1).long(), torch.zeros(1).long(), step, 0.0)]

    def noised(self, rollout: Rollout, found: Units, chosen: Tensor, draws: Tensor, step: int, factor: float) -> Noised:
        """The units `chosen` (U,) mixed with their noise at their `draws`-th (U,) times; a pair shares the first member's."""
        path, seed, device = self.policy.family.path, self.config.run.seed, self.device
        rows = found.rows.cpu()[chosen]
        ids, members, shape = rollout.prompts.ids[rows[:, 0]], rows.shape[1], self.policy.family.latent_shape
        noise = torch.empty(len(rows), *shape)
        for number in draws.unique().tolist():
            noise[draws == number] = gaussian(shape, seed, ids[draws == number], f"forward/{step}/{number}")
        noise = noise.to(device).repeat(members, *(1 for _ in shape))
        time = self.times(ids, step)[torch.arange(len(rows)), draws].to(device).repeat(members)
        rows = rows.T.flatten()
        clean = rollout.trajectory.final[rows.to(device)].float()
        return Noised(
            x=mix(path, clean, noise, time),
            clean=clean,
            target=prediction_from(path, clean, noise, time),
            time=time,
            condition=rollout.condition.take(rows),
            credit=found.credit[chosen.to(found.credit.device)],
            weight=found.weight[chosen.to(found.weight.device)] * factor,
        )

    def times(self, ids: Tensor, step: int) -> Tensor:
        """(U, timesteps) float32 times of the model's path at which the pictures `ids` (U,) are trained."""
        settings, count = self.settings, self.settings.timesteps
        place, turn = (
            torch.special.ndtr(gaussian((2,), self.config.run.seed, ids, f"times/{step}").double()).clamp(max=1 - 1e-9).T[:, :, None]
        )
        share = ((torch.arange(count) + (turn * count).floor()) % count + place) / count
        low, high = settings.span
        steps = self.config.policy.steps if settings.times == "grid" else FINE
        if settings.times == "grid":
            first, last = round(low * steps), round(high * steps)
            return self.policy.family.grid(steps)[(first + share * (last - first)).floor().long()]
        share = low + (high - low) * share
        at = (share if settings.times == "uniform" else torch.special.ndtri(share).sigmoid()) * steps
        below, grid = at.floor().long().clamp(0, steps - 1), self.policy.family.grid(steps).double()
        return torch.lerp(grid[below], grid[below + 1], at - below).float()

    # --- what the network says -------------------------------------------------------------------------------------------

    def predict(self, batch: Noised) -> Tensor:
        """(B, ...) the policy's conditional prediction."""
        return self.policy.predict(batch.x, batch.time, batch.condition)

    @torch.no_grad()
    def predict_as(self, weights: AbstractContextManager[None], batch: Noised) -> Tensor:
        """(B, ...) that of other weights, such as `self.old.weights()`."""
        with weights:
            return self.predict(batch)


@torch.no_grad()
def draw(
    policy: Policy, prompts: Prompts, condition: Condition, *, steps: int, seed: int, batch: int, guidance: float, solver: Solver
) -> Trajectory:
    """Clean latents of N prompts by a noise-free solver, of whose way nothing is kept; noise is a function of (seed, picture)."""
    sigmas, before = policy.family.grid(steps).to(policy.device), policy.nfe
    x = gaussian(policy.family.latent_shape, seed, prompts.noise_ids, 0, device=policy.device)
    rows = torch.arange(len(prompts)).split(batch)
    final = torch.cat([solve(policy, x[own], sigmas, condition.take(own), guidance, solver=solver) for own in rows])
    return unrecorded(final, sigmas, (policy.nfe - before) / len(prompts))


def unrecorded(final: Tensor, sigmas: Tensor, nfe: float) -> Trajectory:
    """Clean latents (N, ...) as a trajectory of which no step is recorded."""
    nothing = torch.zeros(len(final), 0, device=final.device)
    whole = nothing.long()
    return Trajectory(nothing, whole[0], whole, sigmas, nothing, whole, final, nfe)
