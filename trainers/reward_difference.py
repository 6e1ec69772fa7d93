"""PRDP (arXiv 2402.08714): a policy whose log-ratios to its start predict by how much one picture's reward exceeds another's.

The best policy for reward less `kl` × KL of the path has log p/p_ref(path) = reward/`kl` + a constant of the prompt. So for each pair of a
group's pictures `kl`·(r̂_a - r̂_b) is regressed on r_a - r_b, r̂ being the sum over steps of log p_θ/p_ref of the transition (Eq. 14). Every
step's log-ratio is clipped to `ratio.clip` around that of the policy that a rollout's updates began with (Eq. 20), and the larger of the
two errors counts (Eq. 18). What differs from Flow-GRPO:

1. loss: a regression instead of a ratio; its error can be 0, where a policy gradient stays noise. A pair's residual needs all transitions
   of both pictures, so an update has two passes: one without a graph for all log-ratios, whose small table (N, S) gives the loss and its
   exact derivatives; one that replays the transitions, micro-batch by micro-batch, with these as weights. Memory doesn't grow with the
   number of steps. Before a rollout's first update the first pass is the rollout itself.
2. updates: `passes` (the paper's K) per rollout, each over all of it; π_old is the policy before the first of them.
3. `offline: R`: every R steps the reference draws pictures that all of them train on; π_old is still that of a step's start. They are a
   function of the seed, so that a run that resumes draws them again.
4. credit: raw differences (std: none), of the reward, or of what each step earned (see `RewardDifference`).

**β.** `kl` is the weight of the whole path's KL in nats, in the unit of the reward: the same number as Flow-GRPO's `kl` with kl_form: path,
and the same optimum. The paper's listing averages log-ratios over steps and, as its clip ranges tell, over latent elements, as we do within
a transition. Its β is therefore `kl`·D·S for D latent elements and S recorded steps: 3e-5 there is 4e-11 here (D = 16,384, S = 50).

**When the error can be 0.** The expected reward of a path depends on its initial noise, too, of which r̂ says nothing. Differences cancel it
where a group shares its noise, or the transition forgets it (DDIM of level 1 from α = 0 on, with any grid; Flow-SDE with a = √2 for many
steps). Elsewhere a part of the error stays; it biases nothing where the policy drew the pictures, but it does where the reference did.

Differs from the paper's listing: pairs of equal rewards count, too; only valid members form pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visalign.config import Above, Positive
from visalign.errors import UserError
from visalign.losses import Loss, ratio_metrics, reward_difference
from visalign.rollout import Minibatch, Prompts, Rollout
from visalign.trainer import Defaults, Session
from visalign.trainers.flow_grpo import FlowGRPO

ANSWERS: dict[
    str, Callable[[int], Tensor]
] = {  # credit.kind -> (S) -> (C, S): the steps whose implicit rewards add up to each of its C columns, as they do at the optimum
    "terminal": lambda steps: torch.ones(1, steps),  # the reward: all steps
    "gain": torch.eye,  # V(after) - V(before): the step itself
    "residual": lambda steps: torch.ones(steps, steps).triu(),  # reward - V(before): the step and all later ones
}


class RewardDifference(FlowGRPO):
    """Regress differences of implicit rewards on those of rewards.

    Dense credit: at the optimum `kl`·log p/p_ref of a step is V(after) - V(before), where V = `kl`·log E_ref[exp(reward/`kl`)] of a state.
    `credit.kind: gain` takes a completion's reward for V and regresses step by step: less variance than whole paths have, and the
    completions' bias. `residual` regresses all that is left of a path on the reward less V(before), a baseline that biases nothing.
    """

    defaults: ClassVar[Defaults] = {"credit": {"std": "none", "clip": 1e9}}  # a clipped reward would have another optimum

    class Config(FlowGRPO.Config):
        kl: Above = 0.01  # β in nats of the path, in the unit of the reward
        kl_form: Literal["velocity", "path", "flow_grpo"] = "path"
        passes: Positive = 1  # optimizer steps over every rollout, all around one π_old
        offline: Positive | None = None  # training steps that one rollout of the reference serves; null: the policy draws, at every step

    def __init__(self, session: Session):
        super().__init__(session)
        self._check()
        self.whole = Loss(torch.zeros((), device=self.device))  # of the update at hand: what its first pass has found
        self.fresh = False  # whether the weights are still those that drew the rollout
        self.kept: tuple[int, Rollout] | None = None  # offline: the reference's rollout and the step that it began with

    def _check(self) -> None:
        config, settings = self.config, self.settings
        own = settings.prompts // self.processes.count
        for key, value, wanted in (
            ("trainer.kl_form", settings.kl_form, ("path",)),
            ("credit.kind", config.credit.kind, tuple(ANSWERS)),
            ("ratio.kind", config.ratio.kind, ("plain",)),
            ("ratio.weight", config.ratio.weight, ("none",)),
            ("exploration.prune.width", config.exploration.prune.width, ("none",)),
            ("exploration.prune.depth", config.exploration.prune.depth, ([],)),
        ):
            if value not in wanted:
                raise UserError(f"{key}={value}: reward_difference needs the density of whole paths; use {' or '.join(map(str, wanted))}")
        learning = [alias for alias, reward in self.rewards.items() if reward.spec.trainable]
        if learning and (settings.offline or 1) > 1:
            raise UserError(
                f"trainer.offline={settings.offline}: rewards.{learning[0]} learns, so old scores are not its own; use 1 or null"
            )
        if own % settings.updates:
            raise UserError(f"trainer.updates={settings.updates} must divide the {own} prompts of a process: pairs are of one prompt")

    # --- collect -------------------------------------------------------------------------------------------------------

    def drawn_at(self, step: int) -> int:
        """The training step whose prompts and noise this one has."""
        return step - (step - 1) % (self.settings.offline or 1)

    def draw(self, step: int) -> Prompts:
        return super().draw(self.drawn_at(step))

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        if self.settings.offline is None:
            return super().collect(prompts, step)
        first = self.drawn_at(step)
        if self.kept is not None and self.kept[0] == first:
            return self.kept[1]
        with self.policy.reference():
            rollout = super().collect(prompts, first)
        free = replace(rollout.trajectory, nfe=0.0)  # what the next steps pay for it
        self.kept = first, replace(rollout, trajectory=free, metrics=rollout.metrics | {"reward_calls": 0.0})
        return rollout

    def select(self, rollout: Rollout, step: int) -> Tensor:
        """(N, S) bool: whole paths; an edge of a tree belongs to all that share it, and costs one forward."""
        return self.crediting.kept(rollout).to(self.device)[:, None].expand_as(rollout.trajectory.steps)

    # --- learn ---------------------------------------------------------------------------------------------------------

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        self.fresh = self.settings.offline is None
        return super().learn(rollout, step)

    def minibatches(self, rollout: Rollout, step: int) -> Iterator[list[Minibatch]]:
        """For each update the transitions, the derivative of its loss by their log-probabilities in the place of their advantage."""
        chosen, path = self.select(rollout, step), rollout.trajectory
        offline, drawn = self.settings.offline is not None, path.log_probs
        everything = self.transitions(rollout, chosen, torch.arange(len(path), device=self.device))
        old = self.log_probs(rollout, everything) if offline else drawn
        reference = drawn if offline else self.reference_log_probs(rollout, everything)
        first = self.fresh or offline
        self.fresh = False
        for _ in range(self.settings.passes):
            for rows in torch.arange(len(path), device=self.device).chunk(self.settings.updates):
                batches = self.transitions(rollout, chosen, rows) if self.settings.updates > 1 else everything
                now = old if first else self.log_probs(rollout, batches)
                first = False
                slope = self.regress(rollout, now - reference, old - reference, rows) * sum(map(len, batches))
                yield [replace(b, log_prob=old[b.row, b.column], advantage=slope[b.row, b.column]) for b in batches]

    def transitions(self, rollout: Rollout, chosen: Tensor, rows: Tensor) -> list[Minibatch]:
        """All chosen transitions of these rows, as they were drawn."""
        columns, places = chosen[rows].T.nonzero().unbind(1)
        shape = self.settings.micro_batch, self.settings.stacked_timesteps, self.policy.precision != "fp32"
        return list(rollout.minibatches(rows[places], columns, *shape))

    @torch.no_grad()
    def log_probs(self, rollout: Rollout, batches: list[Minibatch]) -> Tensor:
        """(N, S) of the policy as it is; the rollout's own where nothing is replayed."""
        table = rollout.trajectory.log_probs.clone()
        for batch in batches:
            table[batch.row, batch.column] = self.law(batch, self.predict(batch)).log_prob(batch.x_next)
        return table

    def reference_log_probs(self, rollout: Rollout, batches: list[Minibatch]) -> Tensor:
        """(N, S), once per rollout."""
        with self.policy.reference():
            return self.log_probs(rollout, batches)

    def regress(self, rollout: Rollout, log_ratio: Tensor, old: Tensor, rows: Tensor) -> Tensor:
        """(N, S) the derivative of these rows' loss by each log-ratio, 0 elsewhere; the loss itself is kept for `loss`."""
        table = log_ratio.double().requires_grad_()
        credit, weight, answers = self.targets(rollout)
        low, high = (side.expand(len(rollout.prompts), -1) for side in self.ratio.bounds)
        steps = rollout.trajectory.steps[rows]
        found = reward_difference(
            table[rows],
            old[rows],
            credit[rows],
            weight[rows],
            rollout.prompts.groups.to(self.device)[rows],
            answers,
            beta=self.settings.kl * math.prod(self.policy.family.latent_shape),
            clip_low=low[rows].gather(1, steps),
            clip_high=high[rows].gather(1, steps),
        )
        (slope,) = torch.autograd.grad(found.value, table)
        sign = -1 if self.settings.offline else 1  # KL(reference ‖ policy) where the reference drew
        path = sign * math.prod(self.policy.family.latent_shape) * log_ratio[rows].sum(1).mean()
        metrics = {name: value.float() for name, value in found.metrics.items()} | {"kl/path": path.float()}
        self.whole = Loss(found.value.detach().float(), metrics)
        return slope.float()

    def targets(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """(credit (N, C), how much each counts (N, C), answers (C, S)) of `reward_difference`."""
        assert rollout.advantages is not None, "credit comes before minibatches"
        kind, before = self.config.credit.kind, rollout.trajectory.before
        valid = rollout.rewards["total"].to(self.device).isfinite()[:, None]
        if rollout.values is not None:
            states = rollout.values.to(self.device).isfinite()
            valid = states[:, before] & (states[:, before + 1] if kind == "gain" else valid)
        weight = (valid & self.crediting.kept(rollout).to(self.device)[:, None]).float()
        if rollout.weights is not None:
            weight = weight * rollout.weights.to(weight)[:, None]
        answers = ANSWERS[kind](rollout.trajectory.log_probs.shape[1]).to(self.device)
        return rollout.advantages[:, : len(answers)], weight, answers

    def credit(self, rollout: Rollout) -> Tensor:
        return super().credit(replace(rollout, weights=None))  # weights are for pairs; they don't make a reward smaller

    # --- loss ----------------------------------------------------------------------------------------------------------

    def loss(self, batch: Minibatch) -> Loss:
        """The value of the update's whole loss, with the gradient that these transitions contribute to it."""
        log_prob = self.law(batch, self.predict(batch)).log_prob(batch.x_next)
        with torch.no_grad():
            moved = log_prob - batch.log_prob
            low, high = (side[batch.step] for side in self.ratio.bounds)
            above, below = moved > high, moved < -low
            metrics = ratio_metrics(moved, moved, above, below)
        linear = (batch.advantage * (log_prob - log_prob.detach())).mean()
        return Loss(self.whole.value + linear, self.whole.metrics | metrics, moved, above | below)
