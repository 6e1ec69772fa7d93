"""Diversity-rewarded CFG distillation (arXiv 2410.06084): the student says at once what its guided teacher says with two forwards.

Guidance costs a second forward a step, and makes pictures of one prompt more alike. Flow-GRPO with another anchor, and two more states:

1. anchor: the model before training *with* guidance, at the states that the student itself reaches without any. `kl` weighs the distance.
2. reward: how different the pictures of a prompt are (`diversity`, leave one out, so that centring by groups keeps the signal). Its weight
   is the paper's β, so advantages are not divided by their spread. With weight 0 it is plain distillation. Pictures of a prompt should
   start from noises of their own (`exploration.shared_noise: false`): from one state, whoever is far from the others is so in any
   direction, and no step leads away from all of them.
3. states: also the one after the last stochastic step is distilled, whose own step has no density.

Adapters or weights of two such runs can be interpolated afterwards: `visalign export QUALITY --blend DIVERSE=0.5`.

Differs from the paper, which is about music tokens: the KL of two Gaussians with the same std is a distance of velocities, and here weighs
alike at all noise levels; no value network, groups are the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visalign.config import Above
from visalign.errors import UserError
from visalign.losses import Loss
from visalign.rollout import Minibatch, Rollout, Trajectory
from visalign.trainer import Defaults, Session
from visalign.trainers.flow_grpo import FlowGRPO


class Still(Minibatch):
    """States that are distilled alone."""


class CFGDistillation(FlowGRPO):
    """Flow-GRPO on diversity, held to the guided teacher instead of to its start."""

    class Config(FlowGRPO.Config):
        teacher: float = 3.0  # guidance of the teacher; the student has none
        kl: Above = 1.0  # weight of mean‖v_student - v_teacher‖²
        kl_form: Literal["velocity"] = "velocity"  # pyright: ignore[reportIncompatibleVariableOverride]  # the others need a density

    defaults: ClassVar[Defaults] = {"credit": {"std": "none", "clip": 1e9}}  # cut advantages would cut the weight

    def __init__(self, session: Session):
        super().__init__(session)
        name, guidance = self.policy.name, self.config.policy.guidance
        if guidance != 1.0:
            raise UserError(f"policy.guidance={guidance:g}: the student draws without guidance, which is trainer.teacher's; use 1")
        if self.policy.family.step_distilled:
            raise UserError(f"cfg_distillation: {name} is step-distilled, and its guidance with it; use a base model")
        if self.policy.family.encode([""]).negative is None:
            raise UserError(f"cfg_distillation: {name} has no unconditional half, so there is no guided teacher")

    @torch.no_grad()
    def anchor(self, batch: Minibatch) -> Tensor:
        first = batch.first
        with self.policy.reference():
            said = self.policy.predict(batch.x[first], batch.sigma[first], batch.condition.take(first), self.settings.teacher)
        return said[batch.start]

    def minibatches(self, rollout: Rollout, step: int) -> Iterator[list[Minibatch]]:
        left, columns = last_states(rollout), torch.zeros(len(rollout.prompts), dtype=torch.int64, device=self.device)
        shares = torch.arange(len(rollout.prompts), device=self.device).chunk(self.settings.updates)
        for rows, batches in zip(shares, super().minibatches(rollout, step), strict=True):
            yield [*batches, *(Still(**vars(b)) for b in left.minibatches(rows, columns[rows], self.settings.micro_batch))]

    def loss(self, batch: Minibatch) -> Loss:
        if not isinstance(batch, Still):
            return super().loss(batch)
        distance = self.penalty(batch, self.predict(batch), self.anchor(batch)).mean()
        return Loss(self.settings.kl * distance, {"kl": distance.detach()})


def last_states(rollout: Rollout) -> Rollout:
    """The states (N, ...) after the last recorded steps, as steps without credit that lead to the clean latents."""
    chain = rollout.trajectory
    last = Trajectory(
        latents=torch.stack([chain.latents[:, -1], chain.final], 1),
        before=torch.zeros_like(chain.before[:1]),
        steps=chain.steps[:, -1:] + 1,
        sigmas=chain.sigmas,
        log_probs=torch.full_like(chain.log_probs[:, :1], torch.nan),
        node=torch.arange(len(chain), device=chain.node.device)[:, None].repeat(1, 2),
        final=chain.final,
        nfe=chain.nfe,
    )
    return replace(rollout, trajectory=last, advantages=torch.zeros_like(last.log_probs))
