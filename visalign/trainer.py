"""The training loop that every algorithm shares: collect → credit → loss, with evaluation, checkpoints and a report around it."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from visalign import checkpoint, report, rewarding
from visalign.config import Config as Recipe
from visalign.config import Fraction, Positive, Section
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.evaluation import Examiner
from visalign.explain import explain
from visalign.losses import Loss, per_step_statistics, per_step_summary
from visalign.noise import seed_for
from visalign.patience import Patience
from visalign.policy import Average, Policy
from visalign.prompts import PromptSet
from visalign.rollout import Minibatch, Prompts, Rollout
from visalign.scoring import Panel
from visalign.tracking import Tracker

Defaults = Mapping[str, Mapping[str, Any]]  # section of a recipe -> key -> value


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite; the optimizer has not stepped."""


@dataclass
class Session:
    """What a run is made of."""

    config: Recipe
    processes: Processes
    policy: Policy
    rewards: Panel
    judges: Panel
    train_prompts: PromptSet
    test_prompts: PromptSet


class Trainer(ABC):
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

    settings: Any  # of the subclass's own Config
    invalid_for_distilled: ClassVar[bool] = False
    defaults: ClassVar[Defaults] = {}  # section -> key -> value where a recipe says nothing

    def __init__(self, session: Session):
        self.session, self.config, self.processes = session, session.config, session.processes
        self.policy, self.device = session.policy, session.processes.device
        try:
            self.settings = type(self).Config.model_validate(self.config.trainer.options)
        except ValidationError as error:
            raise UserError(explain(error, type(self).Config, "trainer")) from None
        self._check_geometry()
        self.parameters = self.policy.trainable()
        self.average = Average(self.parameters, self.config.policy.ema) if self.config.policy.ema is not None else None
        adam = self.config.optimizer
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=adam.lr, betas=adam.betas, weight_decay=adam.weight_decay)
        self.policy.network, self.optimizer = self.processes.accelerator.prepare(self.policy.network, self.optimizer)
        self.by_step = torch.zeros(0)  # sums over the transitions of each denoising step, within one training step
        self.patience = Patience(session.rewards, self.processes, self.settings.min_valid, self.settings.patience)
        self.examiner = Examiner(self.config, self.policy, session.judges, session.test_prompts, self.processes)

    # --- what an algorithm is ------------------------------------------------------------------------------------------

    @abstractmethod
    def collect(self, prompts: Prompts, step: int) -> Rollout:
        """Draw and score pictures for the prompts of one step."""

    @abstractmethod
    def credit(self, rollout: Rollout) -> Tensor:
        """Advantages (N, S): one number per sample and recorded step."""

    @abstractmethod
    def loss(self, batch: Minibatch) -> Loss:
        """Loss of some transitions, averaged over them."""

    # --- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to `run.steps`; returns the run folder."""
        run, folder = self.config.run, self.config.run.path
        saved = self.processes.agree(str(checkpoint.to_resume(folder, run.resume) or ""))
        done = self.read(Path(saved))[2]["step"] if saved else 0  # a checkpoint that can't be read is refused at once
        tracker = Tracker(folder, self.config.log, self.config.model_dump(mode="json"), done) if self.processes.main else None
        base = self.judge(0, scan=not saved)  # before the checkpoint is loaded: every grid shows the untrained model beside the trained
        if tracker and not done:
            tracker.log(0, base)
        if saved:
            self.load(Path(saved))
        bar = tqdm(range(done + 1, run.steps + 1), "train", run.steps, initial=done, unit="step", disable=not self.processes.main)
        for step in bar:
            row = self.step(step)
            bar.set_postfix(reward=f"{row['reward/mean']:.3f}", loss=f"{row['loss']:.2e}")
            judged = step % self.config.eval.every == 0 or step == run.steps
            row |= self.judge(step) if judged else {}
            if tracker:
                tracker.log(step, row)
            if tracker and judged:
                tracker.image(step, "before/after", self.examiner.grid_path(step))
            if step % run.checkpoint_every == 0 or step == run.steps:
                self.save(step)
        if tracker:
            tracker.close()
            report.write(folder)
        self.processes.wait()
        return folder

    def judge(self, step: int, scan: bool = False) -> dict[str, float]:
        """Evaluate the averaged weights on the test prompts."""
        with self.average.weights() if self.average else nullcontext():
            return self.examiner(step, scan)

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
        rate, trained = self.learning_rate(step), 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for number, batches in enumerate(self.minibatches(rollout, step)):
            metrics = self.update(batches)
            trained += sum(len(batch.first) for batch in batches)
            if number:  # only before the first update does the ratio measure how exact the replay is
                metrics.pop("ratio/max_deviation", None)
            for name, value in metrics.items():
                share = 1 if name == "ratio/max_deviation" else self.settings.updates
                totals[name] = totals.get(name, value.new_zeros(())) + value / share
        metrics = {name: value.item() for name, value in totals.items()} | self._describe_steps(rollout)
        return metrics | {"lr": rate, "nfe_backward": trained / len(rollout.prompts)}

    def _describe_steps(self, rollout: Rollout) -> dict[str, float]:
        """For every denoising step that was trained: its ratio, its clip fraction and the mean size of its credit."""
        steps = rollout.trajectory.steps
        assert rollout.advantages is not None
        table = torch.zeros(2, self.config.policy.steps, dtype=torch.float64, device=self.device)
        table.index_add_(1, steps.flatten(), torch.stack([rollout.advantages.abs().double(), torch.ones_like(steps).double()]).flatten(1))
        credit, count = self.processes.sum(table)
        found = per_step_summary(self.processes.sum(self.by_step)) | {"credit/size": credit / count}
        return {f"{name}/{j}": value for name, values in found.items() for j, value in enumerate(values.tolist()) if math.isfinite(value)}

    def update(self, batches: list[Minibatch]) -> dict[str, Tensor]:
        """One optimizer step on the mean of the batches' losses, over all processes."""
        total = sum(map(len, batches))
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last, share = number == len(batches) - 1, len(batch) / total
            with nullcontext() if last else self.processes.accelerator.no_sync(self.policy.network):
                loss = self.loss(batch)
                self.processes.accelerator.backward(loss.value * share)
            if loss.log_ratio is not None and loss.clipped is not None:
                self.by_step += per_step_statistics(loss.log_ratio, loss.clipped, batch.step, self.by_step.shape[1])
            for name, value in (loss.metrics | {"loss": loss.value.detach()}).items():
                previous = sums.get(name, value.new_zeros(()))
                sums[name] = torch.maximum(previous, value) if name == "ratio/max_deviation" else previous + value * share
        sums = {n: self.processes.max(v) if n == "ratio/max_deviation" else self.processes.mean(v) for n, v in sums.items()}
        if not sums["loss"].isfinite():
            kept = f"the weights are as before this step (checkpoints: {self.config.run.path})"
            raise NonFiniteError(f"the loss is {sums['loss'].item()}; {kept}")
        norm: Any = self.processes.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        sums["grad_norm"] = torch.as_tensor(norm).detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return sums

    def select(self, rollout: Rollout, step: int) -> Tensor:
        """(N, S) bool: the transitions to train. Here all of them, each edge of a tree once."""
        return rollout.trajectory.distinct()

    def minibatches(self, rollout: Rollout, step: int) -> Iterator[list[Minibatch]]:
        """For each update the micro-batches it averages: the chosen transitions, timestep by timestep."""
        shape = self.settings.micro_batch, self.settings.stacked_timesteps, self.policy.precision != "fp32"
        chosen = self.select(rollout, step).to(self.device)
        for share in torch.arange(len(rollout.prompts), device=self.device).chunk(self.settings.updates):
            columns, rows = chosen[share].T.nonzero().unbind(1)
            yield list(rollout.minibatches(share[rows], columns, *shape))

    def learning_rate(self, step: int) -> float:
        """A function of the absolute step alone, so that a resumed run does not change course."""
        optimizer = self.config.optimizer
        if step <= optimizer.warm_up:
            return optimizer.lr * step / optimizer.warm_up
        if optimizer.decay_steps is None:
            return optimizer.lr
        done = min(1.0, (step - 1) / optimizer.decay_steps)
        return optimizer.lr + (optimizer.final_lr - optimizer.lr) * done

    # --- around the loop -----------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write a checkpoint; only the main process writes, the others wait."""
        if self.processes.main:
            names = list(self.policy.named_trainable())
            tensors: dict[str, dict[str, Tensor]] = {"trainable": {name: p.data for name, p in zip(names, self.parameters, strict=True)}}
            if self.average:
                tensors["average"] = dict(zip(names, self.average.values, strict=True))
            tensors["rewards"] = {f"{a}/{n}": v for a, r in self.session.rewards.rewards.items() for n, v in r.state_dict().items()}
            updates = self.average.updates if self.average else 0
            state = {"updates": updates, "seed": self.config.run.seed, "processes": self.processes.count}
            folder = self.config.run.path / "checkpoints"
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            checkpoint.save(folder, step, tensors, optimizer.state_dict(), state)
            checkpoint.prune(folder, self.config.run.keep_checkpoints)
        self.processes.wait()

    def read(self, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
        """(tensors, optimizer, state) of a checkpoint."""
        return checkpoint.load(folder, ["trainable", "rewards", *(["average"] if self.average else [])])

    def load(self, folder: Path) -> int:
        """Go on from a checkpoint: weights, average, optimizer, rewards; the number of steps done."""
        tensors, optimizer, state = self.read(folder)
        names = list(self.policy.named_trainable())
        if set(names) != set(tensors["trainable"]):
            raise UserError(f"checkpoint {folder} holds other weights than this recipe trains; was policy.lora or policy.model changed?")
        with torch.no_grad():
            for name, parameter in zip(names, self.parameters, strict=True):
                parameter.copy_(tensors["trainable"][name])
            if self.average:
                self.average.values = [tensors["average"][name].to(self.device) for name in names]
                self.average.updates = state["updates"]
        self.optimizer.load_state_dict(optimizer)
        for alias, reward in self.session.rewards.rewards.items():
            own = {n.partition("/")[2]: v for n, v in tensors["rewards"].items() if n.startswith(f"{alias}/")}
            reward.load_state_dict(own)
        return int(state["step"])

    def _check_geometry(self) -> None:
        settings, world = self.settings, self.processes.count
        if settings.prompts % world:
            raise UserError(
                f"trainer.prompts={settings.prompts} can't be split into whole groups over {world} processes; use a multiple of {world}"
            )
        own = settings.prompts // world * settings.group_size
        if settings.group_size < 2:
            raise UserError("trainer.group_size=1: a group of one has nothing to be compared with; use 2 or more")
        if own % (settings.updates * min(settings.micro_batch, own)):
            raise UserError(
                f"trainer.micro_batch={settings.micro_batch} × trainer.updates={settings.updates} must divide the "
                f"{own} pictures of a process (trainer.prompts × trainer.group_size / processes)"
            )
        if self.policy.family.step_distilled and self.invalid_for_distilled:
            raise UserError(
                f"{self.config.trainer.name} trains on the forward process, which is invalid for the step-distilled {self.policy.name}"
            )
        if math.isclose(self.config.optimizer.lr, 0.0):
            raise UserError("optimizer.lr=0 trains nothing")
