"""The axes of the Flow-GRPO family: what the sections `exploration`, `credit` and `ratio` of a recipe mean.

Each is a class around its section that knows nothing of the others; what can't be combined is refused when a trainer is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from visalign import credit as credits
from visalign import schedules
from visalign.branching import branch_cells, one_branch_rollout, pruned, pruned_depths, tree_rollout
from visalign.config import CreditSection, ExplorationSection, RatioSection
from visalign.errors import UserError
from visalign.explain import nearest
from visalign.losses import Loss, clipped_policy, guard_log_ratio, noise_weights
from visalign.paths import Path, gain, noise_gap
from visalign.policy import Policy
from visalign.rollout import Condition, Minibatch, Prompts, Rollout, Trajectory
from visalign.sampling import Dynamics, decode, rollout
from visalign.schedules import StepPlan
from visalign.scoring import Panel, RewardInput
from visalign.solvers import complete
from visalign.transitions import Gaussian, kernel


@dataclass(frozen=True)
class Exploration:
    """Which of T denoising steps are stochastic, recorded and trained, and how a rollout goes through them."""

    section: ExplorationSection
    steps: int
    seed: int

    def plan(self, step: int) -> StepPlan:
        """The plan of a training step: a function of (seed, step), the same on all ranks."""
        section, steps = self.section, self.steps
        try:
            if section.kind == "all":
                return schedules.all_steps(steps)
            if section.kind == "window":
                moves = {"rule": section.rule, "every": section.every, "stride": section.stride}
                found = schedules.window(steps, section.size, *self.span(), self.seed, step, **moves)
                return found if section.finish is None else schedules.flash(found, section.finish)
            if section.kind == "one_branch":
                low, high = self.span()
                return schedules.span(steps, low, high - low)  # the steps at which a path may branch
            if section.interval:
                return schedules.mixed_tree(steps, section.branches, section.width, size=section.size, interval=section.interval)
            return schedules.tree(steps, section.branches, section.width)
        except ValueError as error:
            raise UserError(f"exploration: {error} (policy.steps={steps})") from None

    def span(self) -> tuple[int, int]:
        """[low, high) of windows and branch steps: by default the first half, or all but the last step for a window that travels."""
        travels = self.section.kind == "window" and self.section.rule in ("progressive", "exp_decay")
        half = max(self.section.size, self.steps // 2)
        return self.section.range or (0, self.steps - 1 if travels else half)

    @property
    def smallest_group(self) -> int:
        """Members of the smallest group that fits and whose members can be compared."""
        if self.section.kind == "tree":
            return self.plan(1).leaves
        if self.section.kind == "one_branch":
            return 2 * self.section.seeds * len(range(*self.span()))
        return 2

    def rollout(
        self,
        policy: Policy,
        prompts: Prompts,
        condition: Condition,
        *,
        step: int,
        batch: int,
        guidance: float,
        dynamics: Dynamics,
        keep_predictions: bool,
    ) -> Trajectory:
        """Denoise the prompts of a training step."""
        section, plan = self.section, self.plan(step)
        common = {"steps": self.steps, "seed": self.seed, "batch": batch, "guidance": guidance, "dynamics": dynamics}
        if section.kind == "tree":
            return tree_rollout(policy, prompts, condition, plan=plan, spread=section.spread, keep_predictions=keep_predictions, **common)
        if section.kind == "one_branch":
            prompts, branch = branch_cells(prompts, range(*self.span()), section.seeds)
            return one_branch_rollout(policy, prompts, condition, branch=branch, keep_predictions=keep_predictions, **common)
        return rollout(policy, prompts, condition, plan=plan, keep_predictions=keep_predictions, **common)

    def trained(self, rollout: Rollout, step: int) -> Tensor:
        """(N, S) bool: every recorded transition once, less what a tree prunes."""
        chosen, prune = rollout.trajectory.distinct(), self.section.prune
        if self.section.kind != "tree":
            return chosen
        assert rollout.advantages is not None
        depths = frozenset(prune.depth)
        if prune.every:
            depths = pruned_depths(step, depths, prune.stop, prune.every)
        return chosen & pruned(rollout.advantages, rollout.trajectory, self.plan(step), depth=depths, width=prune.width, share=prune.share)


@dataclass(frozen=True)
class Credit:
    """Which reward each recorded step answers for."""

    section: CreditSection
    panel: Panel

    @property
    def dense(self) -> bool:
        """Whether intermediate states must be completed and scored."""
        return self.section.kind in ("gain", "value", "residual")

    def check(self) -> None:
        """Refuse rewards that this credit is not defined for."""
        if self.section.aggregation == "gdpo" and (self.dense or self.section.kind == "tree"):
            raise UserError(
                f"credit.aggregation=gdpo normalises terminal rewards; credit.kind={self.section.kind} needs credit.aggregation=sum"
            )
        if unknown := sorted(set(self.section.noise_floor) - set(self.panel.rewards)):
            raise UserError(f"credit.noise_floor.{unknown[0]}: no such reward{nearest(unknown[0], list(self.panel.rewards))}")
        if self.section.kind != "value":
            return
        for alias, reward in self.panel.rewards.items():
            if reward.spec.range[0] < 0 or self.panel.weights[alias] < 0:
                raise UserError(
                    f"credit.kind=value needs rewards that are never negative; {alias} lies in {list(reward.spec.range)} with weight "
                    f"{self.panel.weights[alias]:g}: use credit.kind=gain, or another reward"
                )

    @torch.no_grad()
    def values(self, policy: Policy, drawn: Rollout, *, guidance: float, batch: int, plan: StepPlan) -> tuple[Tensor, float]:
        """(N, K) the reward of the picture that each stored state leads to, and the number of pictures scored for it per sample.

        A state that several samples share is completed and scored once. Where Euler steps alone follow the last state, its completion
        is the sample itself, already scored; a residual has the sample there in any case.
        """
        section, trajectory = self.section, drawn.trajectory
        steps = 1 if section.kind == "value" else section.completion
        straight = section.solver == "euler" and plan.finish is None and not any(plan.stochastic[plan.recorded[-1] + 1 :])
        known = section.kind == "residual" or (steps is None and straight)
        options = {"batch": batch, "steps": steps, "solver": section.solver, "reuse_final": known}
        latents = complete(policy, trajectory, drawn.condition, guidance, **options)
        owner = trajectory.owner()
        fresh = owner == torch.arange(len(owner), device=owner.device)[:, None]
        if known:
            fresh[:, -1] = False
        rows, columns = fresh.nonzero().unbind(1)
        total = drawn.rewards["total"]
        found = torch.full(fresh.shape, torch.nan, device=total.device)
        for row, column in zip(rows.split(batch), columns.split(batch), strict=True):
            prompts = drawn.prompts.take(row.cpu())
            pictures = decode(policy, latents[row, column], batch)
            scored = self.panel.score(RewardInput(pictures, prompts.texts, prompts.metadata, groups=prompts.groups))
            found[row, column] = scored.by_name()["total"].to(found)
        found = found.gather(0, owner.to(found.device))
        if known:
            found[:, -1] = total
        return found, len(rows) / len(owner)

    def advantages(self, drawn: Rollout, moments: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, S): one number per sample and recorded step, times the sample's weight where a reward gives one.

        The weight comes after all normalisation, which would divide it out again. Samples that share a step of a tree answer for it
        together: there it is their mean.
        """
        found = self._advantages(drawn, moments)
        if drawn.weights is None:
            return found
        owner = drawn.trajectory.owner()[:, drawn.trajectory.before + 1].to(found.device)
        weights = drawn.weights.to(found)[:, None].expand_as(found)
        return found * torch.zeros_like(found).scatter_reduce(0, owner, weights, "mean", include_self=False).gather(0, owner)

    def _advantages(self, drawn: Rollout, moments: Callable[[Tensor], Tensor]) -> Tensor:
        section, trajectory, total = self.section, drawn.trajectory, drawn.rewards["total"]
        groups, before = drawn.prompts.groups.to(total.device), trajectory.before.to(total.device)
        scale = {"epsilon": section.epsilon, "clip": section.clip}
        if section.kind in ("gain", "residual"):
            values = self._values(drawn)
            signal = credits.gains(values, before) if section.kind == "gain" else credits.residuals(total, values, before)
            return credits.step_advantages(signal, groups, std=section.std, floor=section.floor, moments=moments, **scale)
        if section.kind == "value":
            instant = self._values(drawn)[:, before + 1]
            anchor, few, steps = section.anchor, section.anchor_steps, trajectory.steps.to(total.device)
            return credits.value_advantages(instant, groups, gamma=section.discount, anchor=anchor, anchor_steps=few, steps=steps, **scale)
        if section.kind == "tree":
            return credits.tree_advantages(total, trajectory.node.to(total.device), before, groups, **scale)
        if section.kind == "own_branch":
            groups = credits.branch_cells(groups, trajectory.steps[:, 0].to(total.device), trajectory.node[:, 0].to(total.device))
        return credits.per_step(self.terminal(drawn, groups, moments), trajectory.log_probs.shape[1])

    def terminal(self, drawn: Rollout, groups: Tensor, moments: Callable[[Tensor], Tensor]) -> Tensor:
        """(N,) the advantage of each sample's own reward within `groups` (N,), before its weight."""
        section, rewards = self.section, dict(drawn.rewards)
        total = rewards.pop("total")
        if section.aggregation == "gdpo":
            floors = {alias: section.noise_floor.get(alias, reward.spec.noise_std) for alias, reward in self.panel.rewards.items()}
            return credits.gdpo_advantages(rewards, self.panel.weights, groups, floors, clip=section.clip, moments=moments)
        return credits.group_advantages(total, groups, std=section.std, moments=moments, epsilon=section.epsilon, clip=section.clip)

    def kept(self, drawn: Rollout) -> Tensor:
        """(N,) bool: the samples that are trained at all."""
        assert drawn.advantages is not None
        groups = drawn.prompts.groups.to(drawn.advantages.device)
        if self.section.keep is None:
            return torch.ones_like(groups, dtype=torch.bool)
        return credits.extremes(drawn.advantages.mean(1), groups, *self.section.keep)

    def _values(self, drawn: Rollout) -> Tensor:
        assert drawn.values is not None, "dense credit needs the values of the states"
        return drawn.values


@dataclass(frozen=True)
class Ratio:
    """How far a policy has moved on a transition, and how its loss is clipped and weighted.

    Attributes:
        section: of the recipe.
        path: the model's.
        sigmas: (T + 1,) the grid.
        dynamics: of stochastic steps.

    Raises:
        UserError: these dynamics are not defined on the path.
    """

    section: RatioSection
    path: Path
    sigmas: Tensor
    dynamics: Dynamics

    def __post_init__(self) -> None:
        try:
            self.dynamics(self.path, self.sigmas[:1], self.sigmas[1:2])
        except ValueError as error:
            raise UserError(f"transition.kind={self.dynamics.kind}: {error}") from None

    @property
    def needs_predictions(self) -> bool:
        return self.section.kind == "guard"

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(low, high): the clip range of every denoising step, (T,) each."""
        wide = [self.section.bounds if (own := self.section.clip_steps.get(n)) is None else (own, own) for n in range(len(self.sigmas) - 1)]
        low, high = torch.tensor(wide, device=self.sigmas.device).unbind(1)
        return low, high

    @cached_property
    def weights(self) -> Tensor | None:
        """(T,) weight of each denoising step's loss; the last step, which is never trained, has 0."""
        kind, now, after = self.section.weight, self.sigmas[:-2], self.sigmas[1:-1]
        if kind == "none":
            return None
        step = self.dynamics(self.path, now, after)
        if kind == "noise":
            found = noise_weights(step.std)
        elif kind == "inverse_gap":
            found = 1 / noise_gap(self.path, now, after)
        else:
            scale = {"plain": 1 / step.std, "guard": torch.ones_like(step.std), "cps": 2 * step.std}[self.section.kind]
            found = 1 / (gain(self.path, step.a, step.c, now).abs() * scale)  # of this ratio's gradient, κ·mean(ε⊙∇prediction)·scale
            found = found / found.mean()
        return torch.nn.functional.pad(found.float(), (0, 1))

    @cached_property
    def gains(self) -> Tensor:
        """(T - 1,) float64 |κ|/ς: by how many stds of a step's noise its mean moves if the prediction moves by 1, last step left out."""
        now, after = self.sigmas[:-2], self.sigmas[1:-1]
        step = self.dynamics(self.path, now, after)
        return gain(self.path, step.a, step.c, now).abs() / step.std

    def loss(self, batch: Minibatch, law: Gaussian, prediction: Tensor) -> Loss:
        """The clipped policy loss of a minibatch whose transitions now have the density `law`."""
        step = self.dynamics(self.path, batch.sigma, batch.sigma_next)
        new, before, temperature = law.log_prob(batch.x_next), batch.log_prob, torch.ones_like(batch.log_prob)
        if self.section.kind == "guard":
            assert batch.prediction is not None, "the rollout must keep its predictions"
            old = kernel(self.path, batch.x, batch.prediction, batch.sigma, batch.sigma_next, step)
            kappa = gain(self.path, step.a, step.c, batch.sigma)
            new = guard_log_ratio((batch.x_next - old.mean) / old.std, prediction - batch.prediction, kappa)
            before = torch.zeros_like(new)
        elif self.section.kind == "cps":
            temperature = 2 * step.std.square().to(temperature)
        low, high = (side[batch.step] for side in self.bounds)
        weight = None if self.weights is None else self.weights[batch.step]
        return clipped_policy(new, before, batch.advantage, low, high, weight, temperature)
