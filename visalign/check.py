"""`visalign check [CONFIG]`: an executable preflight on the recipe's own model, rewards and trainer; one line per check with its figure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from visalign import build, reward_check, sampling
from visalign.axes import Exploration
from visalign.config import Config
from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.policy import Family, Policy
from visalign.rollout import Condition, Prompts, Rollout
from visalign.scoring import RewardInput
from visalign.trainer import Trainer

STOCK_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}  # pictures are in [0, 1]; in half precision of the mean, as edges move
PER_PROMPT = 4  # pictures, where rewards are measured
REPLAY_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}  # with several timesteps in one forward; at the rollout's shape it is 0


class CheckFailedError(Exception):
    """A check's own verdict; the message holds its figure."""


@dataclass(frozen=True)
class Finding:
    name: str
    passed: bool
    figure: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name:<22} {self.figure}"


@dataclass(frozen=True)
class Subject:
    """What is checked: the recipe as given, a trainer of it with small batches, and a rollout of that trainer."""

    recipe: Config
    trainer: Trainer
    rollout: Rollout


def run(recipe: Config, pictures: int | None = None) -> Iterator[Finding]:
    """Every check in turn, on small batches of the recipe's own model and rewards; the run folder is not touched.

    Args:
        pictures: on so many, at last, every reward is measured; None: not.
    """
    if pictures is not None and pictures < 2:
        raise UserError(f"--rewards {pictures}: expected 2 pictures or more, such as 64")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.trainer(small(recipe, Path(folder)))
        subject = Subject(recipe, trainer, collected(trainer))
        for name, check in CHECKS.items():
            try:
                yield Finding(name, True, check(subject))
            except CheckFailedError as failure:
                yield Finding(name, False, str(failure))
    if pictures:
        yield from measured(recipe, pictures)


def measured(recipe: Config, count: int) -> Iterator[Finding]:
    """What each reward can tell apart on about `count` pictures of the recipe's model; one whose scores are constant, fail, or are higher
    under other prompts fails. The ways of cheating that pay, and the noise that a group's spread stands against, are for the reader."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.trainer(small(recipe, Path(folder)))
        section, session = trainer.config.policy, trainer.session
        prompts = session.train_prompts.draw(max(2, count // PER_PROMPT), PER_PROMPT, recipe.run.seed, 0, balance=recipe.prompts.balance)
        options = {"steps": section.steps, "seed": recipe.run.seed, "guidance": section.guidance, "batch": recipe.eval.batch}
        images = sampling.pictures(trainer.policy, prompts, **options)
        base = RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups)
        found = reward_check.measure(session.rewards, base)
    for alias, said in found["rewards"].items():
        own = said["prompt"]
        paying = [name for name, hack in said["hacks"].items() if not hack["passed"]]
        figure = f"valid {said['valid']:.0%}, spread {said['spread']:.3g} in groups, {said['signal']:.2g} times its noise, "
        figure += "blind to the prompt" if own is None else f"prefers the own prompt in {own:.0%}"
        figure += f"; pays: {', '.join(paying)}" if paying else ""
        yield Finding(f"reward {alias}", said["valid"] > 0 and said["range"] > 0 and (own is None or own >= 0.5), figure)


def small(config: Config, folder: Path) -> Config:
    """The recipe with the least geometry that still has groups: one prompt per process, the smallest group that fits its exploration."""
    whole = build.completed(config, build.algorithm(config).defaults)
    group = Exploration(whole.exploration, whole.policy.steps, config.run.seed).smallest_group
    world = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch and torchrun
    options = config.trainer.options | {"prompts": world, "group_size": group, "micro_batch": 2, "updates": 1}
    if "timesteps" in options:  # of trainers on the forward process
        options["timesteps"] = min(2, options["timesteps"])
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"path": folder, "resume": "never"}),
            "trainer": type(config.trainer).model_validate({"name": config.trainer.name} | options),
            "prompts": config.prompts.model_copy(update={"balance": None}),
            "log": [],
        }
    )


def collected(trainer: Trainer) -> Rollout:
    """A rollout whose advantages are +1, -1: replay and gradients must not depend on a reward's spread."""
    rollout = trainer.collect(trainer.draw(1), 1)
    signs = torch.tensor([1.0, -1.0], device=trainer.device).repeat(len(rollout.prompts) // 2)
    columns = trainer.credit(rollout).shape[1]
    return replace(rollout, advantages=signs[:, None].repeat(1, columns))


class OneBatch(Policy):
    """A policy in the stock pipelines' batch shape: guidance would amplify the rounding by which another shape differs.

    Halves of different lengths stay apart, as there.
    """

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0, *, through_guidance: bool = False) -> Tensor:
        if guidance == 1.0 or condition.negative is None:
            return super().predict(x, sigma, condition, guidance, through_guidance=through_guidance)
        halves = condition.unconditional(), condition.positive()
        if any(value.shape != halves[1][name].shape for name, value in halves[0].items()):
            return super().predict(x, sigma, condition, guidance, through_guidance=through_guidance)
        both = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        unconditional, conditional = self._forward(x.repeat(2, *(1 for _ in x.shape[1:])), sigma.repeat(2), both).chunk(2)
        return self.family.guide(conditional, unconditional, guidance, sigma)


# --- checks ------------------------------------------------------------------------------------------------------------


def stock(subject: Subject) -> str:
    """Our noise-free sample equals the stock pipeline's, from the same noise, with both halves of guidance in one batch as there."""
    trainer = subject.trainer
    section = trainer.config.policy
    if type(trainer.policy.family).stock is Family.stock:  # its exception is also torch's for operators that a device lacks
        return f"skipped: {type(trainer.policy.family).__name__} wraps no stock pipeline"
    policy = OneBatch(trainer.policy.family, section.precision, trainer.policy.name).to(trainer.device)
    known = trainer.session.test_prompts
    prompts = Prompts.of(known.texts[:2], known.metadata[:2])
    ours = sampling.pictures(policy, prompts, steps=section.steps, seed=0, guidance=section.guidance)
    noise = gaussian(policy.family.latent_shape, 0, prompts.noise_ids, 0, device=policy.device)
    theirs = policy.family.stock(prompts.texts, noise, section.steps, section.guidance, prompts.metadata)
    limit = max(STOCK_TOLERANCE[section.precision], STOCK_TOLERANCE[section.dtype])
    difference = (ours - theirs.to(ours)).abs()
    if limit > STOCK_TOLERANCE["fp32"]:
        return _within("mean |Δ|", difference.mean().item(), limit)
    return _within("max |Δ|", difference.max().item(), limit)


def ratio(subject: Subject) -> str:
    """Replay at the rollout's batch shape gives, to the bit, the rollout's log-probabilities; where there are none, its latents."""
    trainer = subject.trainer
    if trainer.deviation == "ratio/max_deviation" and not subject.rollout.trajectory.log_probs.shape[1]:
        return "skipped: no timestep is recorded"
    what = {"ratio/max_deviation": "max |ratio - 1|", "replay/max_deviation": "max |Δ latent|"}[trainer.deviation]
    return _within(what, _deviation(subject, 1), 0.0)


def stacked(subject: Subject) -> str:
    """Replay with all recorded timesteps in one forward: another batch shape, within rounding."""
    columns = subject.rollout.trajectory.log_probs.shape[1]
    if columns <= 1:
        return f"skipped: {'one' if columns else 'no'} recorded timestep"
    if subject.trainer.deviation != "ratio/max_deviation":
        return "skipped: no ratio"
    limit = REPLAY_TOLERANCE[subject.recipe.policy.precision]
    return _within(f"max |ratio - 1| with {columns} timesteps stacked", _deviation(subject, columns), limit)


def gradient(subject: Subject) -> str:
    """Every term of the loss reaches the weights; judged slightly off the start, where a penalty against the start is not 0."""
    trainer, rollout = subject.trainer, subject.rollout
    start = [p.detach().clone() for p in trainer.parameters]
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(1e-3 * torch.randn_like(parameter))
    silent = replace(rollout, advantages=torch.zeros_like(_advantages(rollout)))
    terms = {"policy": rollout} | ({"kl": silent} if getattr(trainer.settings, "kl", 0) else {})
    norms: dict[str, float] = {}
    for name, source in terms.items():
        for batch in next(trainer.minibatches(source, 1)):
            trainer.processes.accelerator.backward(trainer.loss(batch).value)
        norms[name] = float(torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm())
        trainer.optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(trainer.parameters, start, strict=True):
            parameter.copy_(value)
    figure = ", ".join(f"{name} {norm:.2e}" for name, norm in norms.items())
    if not all(0 < norm < float("inf") for norm in norms.values()):
        raise CheckFailedError(f"gradient norm: {figure}; expected finite and above 0")
    return f"gradient norm: {figure}"


def groups(subject: Subject) -> str:
    """The recipe's own geometry: every group whole, of one prompt, and on one process."""
    trainer = subject.trainer
    geometry = type(trainer).Config.model_validate(subject.recipe.trainer.options)
    wanted, count = geometry.group_size, geometry.prompts
    rank, world = trainer.processes.rank, trainer.processes.count
    drawn = trainer.session.train_prompts.draw(count, wanted, trainer.config.run.seed, 0, rank, world)
    sizes = drawn.groups.unique(return_counts=True)[1]
    texts = [len({drawn.texts[int(n)] for n in (drawn.groups == g).nonzero()}) for g in drawn.groups.unique()]
    if not (sizes == wanted).all() or any(n != 1 for n in texts):
        raise CheckFailedError(f"group sizes {sizes.tolist()} with {texts} different prompts; expected {wanted} pictures of one prompt")
    return f"{len(sizes)} of {wanted} pictures on each of {trainer.processes.count} processes"


def rewards(subject: Subject) -> str:
    """Scores lie in the promised range, all succeed, and a second scoring agrees."""
    trainer, rollout = subject.trainer, subject.rollout
    batch = RewardInput(rollout.images, rollout.prompts.texts, rollout.prompts.metadata, groups=rollout.prompts.groups)
    notes: list[str] = []
    with torch.no_grad():
        again = trainer.session.rewards.score(batch).by_name()
    for alias, reward in trainer.session.rewards.rewards.items():
        scores, (low, high) = rollout.rewards[alias], reward.spec.range
        valid = scores[scores.isfinite()]
        if len(valid) < len(scores):
            raise CheckFailedError(f"{alias}: {len(scores) - len(valid)} of {len(scores)} scores failed")
        if not ((valid >= low) & (valid <= high)).all():
            raise CheckFailedError(f"{alias}: {valid.min():.4g} … {valid.max():.4g} lies outside its range [{low:g}, {high:g}]")
        change = (again[alias] - scores).abs().max().item()
        if reward.spec.deterministic and change > 1e-5:
            raise CheckFailedError(f"{alias}: scoring the same pictures again changed a score by {change:.2e}")
        notes.append(f"{alias} {valid.min():.3g} … {valid.max():.3g}, spread {valid.std(correction=0):.2g}, re-scored Δ {change:.0e}")
    return "; ".join(notes)


def resume(subject: Subject) -> str:
    """Save, step, load, step again: the same weights to the bit."""
    trainer, rollout = subject.trainer, subject.rollout
    trainer.learn(rollout, 1)
    trainer.save(1)
    trainer.learn(rollout, 2)
    once = [p.detach().clone() for p in trainer.parameters]
    trainer.load(trainer.config.run.path / "checkpoints" / "step_1")
    trainer.learn(rollout, 2)
    difference = max((a - b).abs().max().item() for a, b in zip(once, trainer.parameters, strict=True))
    return _within("max |Δ weight|", difference, 0.0)


def ranks(subject: Subject) -> str:
    """All processes hold the same weights after an update."""
    trainer = subject.trainer
    total = torch.stack([p.detach().double().sum() for p in trainer.parameters]).sum()
    sums = trainer.processes.gather(total[None])
    return _within(f"{trainer.processes.count} processes, max |Δ sum of weights|", (sums - sums[0]).abs().max().item(), 0.0)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "stock pipeline": stock,
    "replay": ratio,
    "replay, stacked": stacked,
    "gradients": gradient,
    "groups": groups,
    "rewards": rewards,
    "save and resume": resume,
    "ranks agree": ranks,
}


def _advantages(rollout: Rollout) -> Tensor:
    assert rollout.advantages is not None
    return rollout.advantages


def _deviation(subject: Subject, stack: int) -> float:
    """Largest deviation of a replay with `stack` timesteps a forward, no update in between."""
    trainer, rollout = subject.trainer, subject.rollout
    columns, rows = rollout.trajectory.distinct().T.nonzero().unbind(1)
    worst = torch.zeros((), device=trainer.device)
    for batch in rollout.minibatches(rows, columns, trainer.settings.micro_batch, stack):
        worst = torch.maximum(worst, trainer.loss(batch).metrics[trainer.deviation])
    return trainer.processes.max(worst).item()


def _within(what: str, value: float, limit: float) -> str:
    if not value <= limit:
        raise CheckFailedError(f"{what} = {value:.2e}, limit {limit:.0e}")
    return f"{what} = {value:.2e} (limit {limit:.0e})"
