"""Flow-GRPO (arXiv 2505.05470): policy gradients through a stochastic sampler of a flow model.

Turns the probability-flow ODE into an SDE with the same marginals, so that each denoising step is a Gaussian policy, then applies PPO's
clipped loss with group-normalised rewards. A point on four axes, each a section of the recipe; the other files of its family are other
points, and any mixture is a recipe:

1. exploration: which steps are stochastic, recorded and trained: all, a window, a tree, one branch; initial noise shared by a group or not.
2. transition: Flow-SDE (Eq. 9), Dance-SDE, CPS, DDIM, DPM++-SDE.
3. credit: the terminal reward's group advantage (Eq. 4), the same at every step, or one of the dense forms.
4. ratio: of densities averaged over latent elements, p^(1/D), with PPO's clip (Eq. 5), plain, de-biased or rescaled.

Differs from the authors' code: the last step is never stochastic; latents are recorded in the dtype that is replayed; the unconditional
half of guidance stays outside the graph; groups live whole on one rank; the KL is in velocity space with an explicit weight.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.axes import Credit, Exploration, Ratio
from visalign.losses import Loss, path_kl, velocity_kl
from visalign.paths import gain
from visalign.rollout import Minibatch, Prompts, Rollout
from visalign.sampling import Dynamics, decode, transition
from visalign.schedules import StepPlan
from visalign.trainer import Session, Trainer
from visalign.transitions import Gaussian


class FlowGRPO(Trainer):
    """Collect with a stochastic sampler, credit by groups, replay every recorded transition under the clipped loss."""

    class Config(Trainer.Config):
        kl: float = 0.0  # weight β of the penalty against the model before training
        kl_form: Literal["velocity", "path", "flow_grpo"] = "flow_grpo"
        # velocity: mean‖Δv‖²; path: κ²‖Δv‖²/2ς², the KL of the transition; flow_grpo: the authors', which drops Δ from the denominator

    def __init__(self, session: Session):
        super().__init__(session)
        config = self.config
        self.exploration = Exploration(config.exploration, config.policy.steps, config.run.seed)
        self.crediting = Credit(config.credit, session.rewards)
        self.set_dynamics(Dynamics(config.transition.kind, config.transition.level))
        self.plan(1)  # a plan that doesn't fit is refused before anything is drawn
        self.crediting.check()
        if self.settings.kl:
            self.policy.keep_reference()

    def set_dynamics(self, dynamics: Dynamics) -> None:
        """Use this transition for stochastic steps from now on."""
        self.dynamics = dynamics
        grid = self.policy.family.grid(self.config.policy.steps).to(self.device)
        self.ratio = Ratio(self.config.ratio, self.policy.family.path, grid, dynamics)

    def plan(self, step: int) -> StepPlan:
        """Which denoising steps of a training step's rollout are stochastic, recorded and trained."""
        return self.exploration.plan(step)

    def step(self, step: int) -> dict[str, float]:
        row = super().step(step)
        if step > 1:
            return row
        return row | {f"gain/{j}": value for j, value in enumerate(self.ratio.gains.tolist()) if math.isfinite(value)}  # said once

    # --- collect, credit -----------------------------------------------------------------------------------------------

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        batch, guidance = self.settings.micro_batch, self.config.policy.guidance
        condition = self.policy.family.encode(prompts.texts)
        trajectory = self.exploration.rollout(
            self.policy,
            prompts,
            condition,
            step=step,
            batch=batch,
            guidance=guidance,
            dynamics=self.dynamics,
            keep_predictions=self.crediting.dense or self.ratio.needs_predictions,
        )
        drawn = self.scored(prompts, condition, trajectory, decode(self.policy, trajectory.final, batch))
        if not self.crediting.dense:
            return replace(drawn, metrics=drawn.metrics | {"reward_calls": 1.0})
        values, calls = self.crediting.values(self.policy, drawn, guidance=guidance, batch=batch, plan=self.plan(step))
        return replace(drawn, values=values, metrics=drawn.metrics | {"reward_calls": 1 + calls})

    def credit(self, rollout: Rollout) -> Tensor:
        return self.crediting.advantages(rollout, self.processes.sum).to(self.device)

    def select(self, rollout: Rollout, step: int) -> Tensor:
        kept = self.crediting.kept(rollout).to(self.device)
        return self.exploration.trained(rollout, step).to(self.device) & kept[:, None]

    # --- loss ----------------------------------------------------------------------------------------------------------

    def loss(self, batch: Minibatch) -> Loss:
        prediction = self.predict(batch)
        loss = self.ratio.loss(batch, self.law(batch, prediction), prediction)
        if not self.settings.kl:
            return loss
        kl = self.penalty(batch, prediction, self.anchor(batch)).mean()
        return replace(loss, value=loss.value + self.settings.kl * kl, metrics=loss.metrics | {"kl": kl.detach()})

    def predict(self, batch: Minibatch) -> Tensor:
        """(B, ...) what the network says at the start of each transition: one forward for each state that transitions leave."""
        first = batch.first
        said = self.policy.predict(batch.x[first], batch.sigma[first], batch.condition.take(first), self.config.policy.guidance)
        return said[batch.start]

    def law(self, batch: Minibatch, prediction: Tensor) -> Gaussian:
        """The Gaussian of each transition whose start the network says `prediction` (B, ...) of: the rollout's own."""
        guidance = self.config.policy.guidance
        return transition(self.policy, batch.x, batch.sigma, batch.sigma_next, batch.condition, guidance, self.dynamics, prediction)[0]

    @torch.no_grad()
    def anchor(self, batch: Minibatch) -> Tensor:
        """(B, ...) what the penalty holds predictions to: those of the model before training."""
        with self.policy.reference():
            return self.predict(batch)

    def penalty(self, batch: Minibatch, prediction: Tensor, reference: Tensor) -> Tensor:
        """(B,) distance of two predictions in the form that `kl_form` names."""
        if self.settings.kl_form == "velocity":
            return velocity_kl(prediction, reference)
        path = self.policy.family.path
        step = self.dynamics(path, batch.sigma, batch.sigma_next)
        kappa = gain(path, step.a, step.c, batch.sigma)
        if self.settings.kl_form == "path":
            return path_kl(kappa, step.std, prediction, reference)
        return path_kl(kappa, step.std / (batch.sigma - batch.sigma_next).double().sqrt(), prediction, reference)
