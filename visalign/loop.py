"""The loop that everything that learns shares: steps, evaluation, checkpoints and a report around one optimizer.

What learns is a policy (`visalign.trainer.Trainer`) or a reward (`trainers/reward_model.py`); the loop knows neither.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from visalign import checkpoint, frugal, report
from visalign.config import Config as Recipe
from visalign.config import OptimizerSection, Section, validate
from visalign.distributed import Processes, placed
from visalign.errors import UserError
from visalign.explain import nearest
from visalign.losses import Loss
from visalign.policy import Policy
from visalign.prompts import PromptSet
from visalign.scoring import Panel, Reward
from visalign.snapshots import Average, overwrite
from visalign.tracking import Tracker

Defaults = Mapping[str, Mapping[str, Any]]  # section of a recipe -> key -> value


class NonFiniteError(RuntimeError):
    """The loss is NaN or infinite; the optimizer has not stepped."""


@dataclass
class Session:
    """What a run of a policy is made of."""

    config: Recipe
    processes: Processes
    policy: Policy
    rewards: Panel
    judges: Panel
    train_prompts: PromptSet
    test_prompts: PromptSet


def optimizer(parameters: Sequence[nn.Parameter], section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW as a recipe has it. Raises UserError if its library isn't there."""
    kind = torch.optim.AdamW if section.kind == "adamw" else frugal.bitsandbytes(f"optimizer.kind={section.kind}").optim.AdamW8bit
    return kind(parameters, lr=section.lr, betas=section.betas, weight_decay=section.weight_decay)


class Learner(Protocol):
    """What learns: `network`, which accelerate may wrap, and its weights by names that the wrapper doesn't change."""

    network: nn.Module

    def named_trainable(self) -> dict[str, nn.Parameter]: ...


class Job(ABC):
    """Whatever a recipe's `trainer.name` names: built by `of`, run to its end by `fit`.

    Its nested `Config` holds its own keys of a recipe's `trainer` section.
    """

    Config: ClassVar[type[Section]] = Section
    defaults: ClassVar[Defaults] = {}  # section -> key -> value where a recipe says nothing
    moves_noise: ClassVar[bool] = False  # the policy's adapter moves the initial noise instead of the weights

    settings: Any  # of the subclass's own Config

    def __init__(self, config: Recipe, processes: Processes):
        self.config, self.processes, self.device = config, processes, processes.device
        self.settings = validate(type(self).Config, config.trainer.options, "trainer")

    @classmethod
    def climbs(cls, settings: Any) -> bool:
        """Whether it follows the gradient of every reward, so that those which have none are refused before anything is loaded."""
        del settings
        return False

    @classmethod
    @abstractmethod
    def of(cls, config: Recipe, processes: Processes, session: Callable[[], Session]) -> Self:
        """Built for a recipe; `session` loads its policy, rewards and prompts."""

    @abstractmethod
    def fit(self) -> Path:
        """Go on from where the run folder is, to the end; returns the run folder, with metrics.jsonl and a report."""


class Loop(Job):
    """Base of all that trains: a subclass says what learns (`learns`, in its `__init__`), and how to take a step and to judge."""

    shown: ClassVar[Mapping[str, str]] = {"loss": "loss"}  # beside the progress bar: name -> key of a step's metrics

    rewards: Mapping[str, Reward] = {}  # whose state belongs into a checkpoint

    def __init__(self, config: Recipe, processes: Processes):
        super().__init__(config, processes)
        if math.isclose(config.optimizer.lr, 0.0):
            raise UserError("optimizer.lr=0 trains nothing")

    def learns(self, learner: Learner, ema: float | None) -> None:
        """Train this learner, with a moving average of its weights if `ema` is its decay."""
        self.learner = learner
        self.processes.share_out(learner.network)
        self.parameters = list(learner.named_trainable().values())
        self.average = Average(self.parameters, ema) if ema is not None else None
        self.optimizer: Any = optimizer(self.parameters, self.config.optimizer)
        learner.network, self.optimizer = self.processes.prepare(learner.network, self.optimizer)

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """One training step; its metrics, among them `seconds` and `images`."""

    @abstractmethod
    def loss(self, batch: Any) -> Loss:
        """Loss of a part of a step's data, averaged over it."""

    @abstractmethod
    def examine(self, step: int, scan: bool) -> dict[str, float]:
        """Metrics `eval/NAME` of the learner as it is now; with `scan`, which is once, those of its start that take longer."""

    def copies(self) -> dict[str, list[Tensor]]:
        """Further values of the trainable weights, in their order, that belong into a checkpoint: name of a file -> tensors."""
        return {}

    def watch(self, batch: Any, loss: Loss) -> None:
        """Told of every loss after its backward pass."""
        del batch, loss

    def grid(self, step: int) -> Path | None:
        """The pictures that show the last evaluation, if there are any."""
        del step

    # --- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to `run.steps`; returns the run folder."""
        run, folder = self.config.run, self.config.run.path
        saved = self.processes.agree(str(checkpoint.to_resume(folder, run.resume) or ""))
        done = self.read(Path(saved))[2]["step"] if saved else 0  # a checkpoint that can't be read is refused at once
        tracker = Tracker(folder, self.config.log, self.config.model_dump(mode="json"), done) if self.processes.main else None
        base = self.judge(0, scan=not saved)  # before the checkpoint is loaded: every grid shows the untrained model beside the trained
        if (best := self.config.eval.keep_best) and f"eval/{best}" not in base:
            known = [name.removeprefix("eval/") for name in base if name.startswith("eval/")]
            raise UserError(f"eval.keep_best: evaluations have no figure {best!r}{nearest(best, known)}")
        if tracker and not done:
            tracker.log(0, base)
        if saved:
            self.load(Path(saved))
        bar = tqdm(
            range(done + 1, run.steps + 1), initial=done, total=run.steps, desc="train", unit="step", disable=not self.processes.main
        )
        for step in bar:
            row = self.step(step)
            bar.set_postfix({name: f"{row[key]:.3g}" for name, key in self.shown.items()})
            judged = step % self.config.eval.every == 0 or step == run.steps
            row |= self.judge(step) if judged else {}
            if tracker:
                tracker.log(step, row)
            if tracker and judged and (grid := self.grid(step)):
                tracker.image(step, "before/after", grid)
            if judged:
                self.keep_best(step, row)
            if step % run.checkpoint_every == 0 or step == run.steps:
                self.save(step)
        if tracker:
            tracker.close()
            report.write(folder)
        self.processes.wait()
        return folder

    def judge(self, step: int, scan: bool = False) -> dict[str, float]:
        """Evaluate the averaged weights on what is held out."""
        with self.averaged():
            return self.examine(step, scan)

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in place of the current ones, if there are any."""
        return self.average.weights() if self.average else nullcontext()

    def update(self, batches: Sequence[Sized]) -> dict[str, Tensor]:
        """One optimizer step on the mean of the batches' losses, over all processes."""
        total = sum(map(len, batches))
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}  # not every batch need have every metric
        for number, batch in enumerate(batches):
            with self.processes.adding(self.learner.network, number == len(batches) - 1):
                loss = self.loss(batch)
                self.processes.accelerator.backward(loss.value * (len(batch) / total))
            self.watch(batch, loss)
            for name, value in (loss.metrics | {"loss": loss.value.detach()}).items():
                previous = sums.get(name, value.new_zeros(()))
                sums[name] = torch.maximum(previous, value) if name.endswith("max_deviation") else previous + value * len(batch)
                counts[name] = counts.get(name, 0) + len(batch)
        most, mean = self.processes.max, self.processes.mean
        sums = {name: most(value) if name.endswith("max_deviation") else mean(value / counts[name]) for name, value in sums.items()}
        if not sums["loss"].isfinite():
            raise NonFiniteError(
                f"the loss is {sums['loss'].item()}; the weights are as before this step (checkpoints: {self.config.run.path})"
            )
        sums["grad_norm"] = self.processes.clip(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return sums

    def set_learning_rate(self, step: int) -> float:
        """That of a step, in every group of the optimizer."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def learning_rate(self, step: int) -> float:
        """A function of the absolute step alone, so that a resumed run does not change course."""
        optimizer = self.config.optimizer
        if step <= optimizer.warm_up:
            return optimizer.lr * step / optimizer.warm_up
        if optimizer.decay_steps is None:
            return optimizer.lr
        done = min(1.0, (step - 1) / optimizer.decay_steps)
        return optimizer.lr + (optimizer.final_lr - optimizer.lr) * done

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write a checkpoint; only the main process writes and the others wait, unless each has a share of the weights."""
        if self.processes.main or self.processes.sharded:
            self._write(self.config.run.path / "checkpoints", step, self.config.run.keep_checkpoints, {})
        self.processes.wait()

    def keep_best(self, step: int, row: dict[str, float]) -> None:
        """Write a checkpoint as RUN/best where the figure that `eval.keep_best` names is higher than ever before."""
        name, folder = self.config.eval.keep_best, self.config.run.path / "best"
        if name is None or not (self.processes.main or self.processes.sharded):
            return
        score, known = row[f"eval/{name}"], checkpoint.newest(folder, step - 1)
        if math.isfinite(score) and (known is None or score > checkpoint.load(known, [])[2]["score"]):
            self._write(folder, step, 1, {"score": score})

    def _write(self, folder: Path, step: int, keep: int, more: dict[str, Any]) -> None:
        """A checkpoint of a step in `folder`, where the newest `keep` stay, with `more` in its state."""
        names = list(self.learner.named_trainable())
        tensors: dict[str, dict[str, Tensor]] = {"trainable": {name: p.data for name, p in zip(names, self.parameters, strict=True)}}
        if self.average:
            tensors["average"] = dict(zip(names, self.average.values, strict=True))
        tensors |= {stem: dict(zip(names, values, strict=True)) for stem, values in self.copies().items()}
        tensors["rewards"] = {f"{a}/{n}": v for a, r in self.rewards.items() for n, v in r.state_dict().items()}
        updates = self.average.updates if self.average else 0
        state = {"updates": updates, "seed": self.config.run.seed, "processes": self.processes.count} | more
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        writers = checkpoint.ALONE
        if self.processes.sharded:
            writers = checkpoint.Writers(self.processes.rank, self.processes.count, self.processes.wait)
        checkpoint.save(folder, step, tensors, optimizer.state_dict(), state, writers)
        if self.processes.main:
            checkpoint.prune(folder, keep)

    def read(self, folder: Path) -> tuple[dict[str, checkpoint.Tensors], dict[str, Any], dict[str, Any]]:
        """(tensors, optimizer, state) of a checkpoint."""
        return checkpoint.load(folder, ["trainable", "rewards", *(["average"] if self.average else []), *self.copies()])

    def load(self, folder: Path) -> int:
        """Go on from a checkpoint: weights, average, optimizer, rewards; the number of steps done."""
        tensors, optimizer, state = self.read(folder)
        names = list(self.learner.named_trainable())
        if set(names) != set(tensors["trainable"]):
            raise UserError(f"checkpoint {folder} holds other weights than this recipe trains; was policy.lora or policy.model changed?")
        with torch.no_grad():
            overwrite(self.parameters, [placed(tensors["trainable"][n], p) for n, p in zip(names, self.parameters, strict=True)])
            if self.average:
                self.average.values = [placed(tensors["average"][n], p) for n, p in zip(names, self.parameters, strict=True)]
                self.average.updates = state["updates"]
            for stem, values in self.copies().items():
                for name, value in zip(names, values, strict=True):
                    value.copy_(placed(tensors[stem][name], value))
        for number, kept in optimizer["state"].items():
            optimizer["state"][number] = {key: placed(value, self.parameters[number]) for key, value in kept.items()}
        self.optimizer.load_state_dict(optimizer)
        for alias, reward in self.rewards.items():
            own = {n.partition("/")[2]: v for n, v in tensors["rewards"].items() if n.startswith(f"{alias}/")}
            reward.load_state_dict(own)
        return int(state["step"])
