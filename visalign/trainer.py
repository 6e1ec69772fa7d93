"""A step of every algorithm that trains a policy: collect → credit → loss; `visalign.loop` is what goes on around it."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from visalign import credit as credits
from visalign import rewarding
from visalign.config import Config as Recipe
from visalign.config import Fraction, Positive, Section
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.evaluation import Examiner
from visalign.loop import Defaults, Loop, NonFiniteError, Session
from visalign.losses import Loss, per_step_statistics, per_step_summary
from visalign.noise import seed_for
from visalign.patience import Patience
from visalign.rollout import Condition, Prompts, Rollout, Trajectory
from visalign.scoring import RewardInput

__all__ = ["Defaults", "NonFiniteError", "Session", "Trainer"]


class Trainer(Loop):
    """Base of all algorithms: a subclass in `trainers/NAME.py` implements `collect`, `credit` and `loss`.

    Its nested `Config` holds its own keys of a recipe's `trainer` section.
    """

    class Config(Section):
        prompts: Positive = 12  # per step, over all processes; one step draws prompts × group_size pictures
        group_size: Positive = 8  # pictures per prompt
        micro_batch: Positive = 48  # latents per forward, in rollout and training alike (so that the ratio is exactly 1)
        stacked_timesteps: Positive = 1  # timesteps of a micro-batch that share a forward
        updates: Positive = 1  # optimizer steps per rollout
        min_valid: Fraction = 0.5  # share of a step's pictures that must have valid scores; a step with fewer is skipped
        patience: Positive = 3  # steps in a row with fewer; the last of them ends the run

    invalid_for_distilled: ClassVar[bool] = False
    compares: ClassVar[bool] = True  # the members of a group with one another: a group of one would teach nothing
    deviation: ClassVar[str] = "ratio/max_deviation"  # metric of a loss: how far a replay is from what the rollout drew
    shown: ClassVar[Mapping[str, str]] = {"reward": "reward/mean", "loss": "loss"}

    def __init__(self, session: Session):
        super().__init__(session.config, session.processes)
        self.session, self.policy, self.rewards = session, session.policy, session.rewards.rewards
        self._check_geometry()
        self.learns(self.policy, self.config.policy.ema)
        self.by_step = torch.zeros(0)  # sums over the transitions of each denoising step, within one training step
        self.patience = Patience(session.rewards, self.processes, self.settings.min_valid, self.settings.patience)
        self.examiner = Examiner(self.config, self.policy, session.judges, session.test_prompts, self.processes)

    @classmethod
    def of(cls, config: Recipe, processes: Processes, session: Callable[[], Session]) -> Self:
        return cls(session())

    # --- what an algorithm is ------------------------------------------------------------------------------------------

    @abstractmethod
    def collect(self, prompts: Prompts, step: int) -> Rollout:
        """Draw and score pictures for the prompts of one step."""

    @abstractmethod
    def credit(self, rollout: Rollout) -> Tensor:
        """Advantages (N, S): one number per sample and recorded step."""

    @abstractmethod
    def loss(self, batch: Any) -> Loss:
        """Loss of some transitions (`Minibatch`), or of some noised latents (`Noised`), averaged over them."""

    # --- a step --------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        """One collection and its updates; the metrics of the step. Per picture `nfe` are the rollout's forwards, `nfe_credit` those of
        completions, `nfe_train` those of the replay, and `nfe_backward` its backward passes: one for each state that transitions leave."""
        started, nfe = time.perf_counter(), self.policy.nfe
        torch.manual_seed(seed_for(self.config.run.seed, self.processes.rank, step))
        rollout = self.collect(self.draw(step), step)
        skipped = self.patience.lost(rollout, step, self.config.run.path, self.save)
        rollout = replace(rollout, advantages=self.credit(rollout))
        count, collected = len(rollout.prompts), self.policy.nfe
        learns = {"loss": math.nan, "skipped": 1.0} if skipped else self.learn(rollout, step)
        metrics = learns if skipped else learns | rewarding.update(self.session.rewards, rollout, self.processes)
        spent = {"seconds": time.perf_counter() - started, "images": count * self.processes.count, "nfe": rollout.trajectory.nfe}
        spent |= {"nfe_credit": (collected - nfe) / count - rollout.trajectory.nfe, "nfe_train": (self.policy.nfe - collected) / count}
        return metrics | rollout.metrics | spent

    def draw(self, step: int) -> Prompts:
        """This process's prompts of a step: whole groups."""
        settings, run = self.settings, self.config.run
        world = {"rank": self.processes.rank, "world": self.processes.count}
        options = {"balance": self.config.prompts.balance, "shared_noise": self.config.exploration.shared_noise}
        return self.session.train_prompts.draw(settings.prompts, settings.group_size, run.seed, step - 1, **world, **options)

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Every update of a rollout: replay, loss, gradient, optimizer, average."""
        totals: dict[str, Tensor] = {}
        self.by_step = torch.zeros(4, self.config.policy.steps, dtype=torch.float64, device=self.device)
        rate, trained, updates = self.set_learning_rate(step), 0, 0
        for batches in self.minibatches(rollout, step):
            metrics = self.update(batches)
            trained += sum(batch.forwards for batch in batches)
            if updates:  # only before the first update does the ratio measure how exact the replay is
                metrics.pop("ratio/max_deviation", None)
            updates += 1
            for name, value in metrics.items():
                totals[name] = totals.get(name, value.new_zeros(())) + value
        means = {name: value / (1 if name == "ratio/max_deviation" else updates) for name, value in totals.items()}
        metrics = {name: value.item() for name, value in means.items()} | self.describe(rollout)
        return metrics | {"lr": rate, "nfe_backward": trained / len(rollout.prompts)}

    def describe(self, rollout: Rollout) -> dict[str, float]:
        """For every denoising step that was trained: its ratio, its clip fraction and the mean size of its credit."""
        steps = rollout.trajectory.steps
        assert rollout.advantages is not None
        size = rollout.advantages.abs().double().flatten(2).mean(2) if rollout.advantages.ndim > 2 else rollout.advantages.abs().double()
        table = torch.zeros(2, self.config.policy.steps, dtype=torch.float64, device=self.device)
        table.index_add_(1, steps.flatten(), torch.stack([size, torch.ones_like(size)]).flatten(1))
        credit, count = self.processes.sum(table)
        found = per_step_summary(self.processes.sum(self.by_step)) | {"credit/size": credit / count}
        return {f"{name}/{j}": value for name, values in found.items() for j, value in enumerate(values.tolist()) if math.isfinite(value)}

    def watch(self, batch: Any, loss: Loss) -> None:
        if loss.log_ratio is not None and loss.clipped is not None:
            self.by_step += per_step_statistics(loss.log_ratio, loss.clipped, batch.step, self.by_step.shape[1])

    def select(self, rollout: Rollout, step: int) -> Tensor:
        """(N, S) bool: the transitions to train. Here all of them, each edge of a tree once."""
        return rollout.trajectory.distinct()

    def minibatches(self, rollout: Rollout, step: int) -> Iterator[list[Any]]:
        """For each update the micro-batches it averages: the chosen transitions, timestep by timestep."""
        shape = self.settings.micro_batch, self.settings.stacked_timesteps, self.policy.precision != "fp32"
        chosen = self.select(rollout, step).to(self.device)
        for share in torch.arange(len(rollout.prompts), device=self.device).chunk(self.settings.updates):
            columns, rows = chosen[share].T.nonzero().unbind(1)
            yield list(rollout.minibatches(share[rows], columns, *shape))

    def examine(self, step: int, scan: bool) -> dict[str, float]:
        return self.examiner(step, scan)

    def grid(self, step: int) -> Path:
        return self.examiner.grid_path(step)

    # --- what algorithms share -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scored(self, prompts: Prompts, condition: Condition, trajectory: Trajectory, images: Tensor) -> Rollout:
        """The rollout of these pictures (N, 3, H, W) with the rewards that they get, and what these have to say about themselves."""
        scores = self.session.rewards.score(RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups))
        rewards = scores.by_name()
        metrics = self._describe_rewards(rewards, prompts.groups)
        said = {"weights": scores.weight, "errors": scores.errors, "metrics": metrics}
        return Rollout(prompts, condition, trajectory, images, rewards, **said)

    def _describe_rewards(self, rewards: dict[str, Tensor], groups: Tensor) -> dict[str, float]:
        """reward/NAME, spread/NAME, zero_spread/NAME and the share of invalid scores, over all processes."""
        metrics: dict[str, Tensor] = {}
        for name, values in rewards.items():
            metrics["reward/mean" if name == "total" else f"reward/{name}"] = values.nanmean().cpu()
            if self.settings.group_size > 1:
                spread = credits.spread(values.cpu(), groups)
                metrics[f"spread/{name}"], metrics[f"zero_spread/{name}"] = spread["std"], spread["zero_fraction"]
        metrics["reward/invalid"] = (~rewards["total"].isfinite()).float().mean().cpu()
        stacked = self.processes.mean(torch.stack([v.float() for v in metrics.values()]).to(self.device))
        return dict(zip(metrics, stacked.tolist(), strict=True))

    def _check_geometry(self) -> None:
        settings, world = self.settings, self.processes.count
        if settings.prompts % world:
            raise UserError(
                f"trainer.prompts={settings.prompts} can't be split into whole groups over {world} processes; use a multiple of {world}"
            )
        own = settings.prompts // world * settings.group_size
        if settings.group_size < 2 and self.compares:
            raise UserError("trainer.group_size=1: a group of one has nothing to be compared with; use 2 or more")
        self.check_batches(own)
        if self.policy.family.step_distilled and self.invalid_for_distilled:
            raise UserError(
                f"{self.config.trainer.name} trains on the forward process, which is invalid for the step-distilled {self.policy.name}"
            )

    def check_batches(self, own: int) -> None:
        """Refuse a geometry that doesn't split a process's `own` pictures into equal micro-batches: a replay needs the rollout's shape."""
        settings = self.settings
        if own % (settings.updates * min(settings.micro_batch, own)):
            raise UserError(
                f"trainer.micro_batch={settings.micro_batch} × trainer.updates={settings.updates} must divide the "
                f"{own} pictures of a process (trainer.prompts × trainer.group_size / processes)"
            )
