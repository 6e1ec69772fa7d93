"""Flow-GRPO (arXiv 2505.05470): policy gradients through a stochastic sampler of a flow model.

Turns the probability-flow ODE into an SDE with the same marginals, so that each denoising step is a Gaussian policy, then applies PPO's
clipped loss with group-normalised terminal rewards. A point on four axes, each a section of the recipe:

1. exploration: all steps stochastic, or a random window of them (Flow-GRPO-Fast); initial noise shared by a group or not.
2. transition: Flow-SDE (Eq. 9), Dance-SDE, CPS, DDIM, DPM++-SDE.
3. credit: the terminal reward's group advantage (Eq. 4), the same at every step.
4. ratio: of densities averaged over latent elements, p^(1/D), with PPO's clip (Eq. 5).

Differs from the authors' code: the last step is never stochastic; latents are recorded in the dtype that is replayed; the unconditional
half of guidance stays outside the graph; groups live whole on one rank; the KL is in velocity space with an explicit weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visalign import credit as credits
from visalign.config import ExplorationSection
from visalign.errors import UserError
from visalign.losses import Loss, clipped_policy, path_kl, velocity_kl
from visalign.paths import gain
from visalign.rollout import Minibatch, Prompts, Rollout
from visalign.sampling import Dynamics, decode, rollout, transition
from visalign.schedules import StepPlan, all_steps, window
from visalign.scoring import RewardInput
from visalign.trainer import Session, Trainer


class FlowGRPO(Trainer):
    """Collect with a stochastic sampler, credit by groups, replay every recorded transition under the clipped loss."""

    class Config(Trainer.Config):
        kl: float = 0.0  # weight β of the penalty against the model before training
        kl_form: Literal["velocity", "path", "flow_grpo"] = "flow_grpo"
        # velocity: mean‖Δv‖²; path: κ²‖Δv‖²/2ς², the KL of the transition; flow_grpo: the authors', which drops Δ from the denominator

    def __init__(self, session: Session):
        super().__init__(session)
        transition = self.config.transition
        self.dynamics = Dynamics(transition.kind, transition.level)
        self.plan(1)  # a window that doesn't fit is refused before anything is drawn
        if self.settings.kl:
            self.policy.keep_reference()

    def plan(self, step: int) -> StepPlan:
        """Which denoising steps of a training step's rollout are stochastic, recorded and trained."""
        return step_plan(self.config.exploration, self.config.policy.steps, self.config.run.seed, step)

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        condition = self.policy.family.encode(prompts.texts)
        trajectory = rollout(
            self.policy,
            prompts,
            condition,
            steps=self.config.policy.steps,
            seed=self.config.run.seed,
            batch=self.settings.micro_batch,
            guidance=self.config.policy.guidance,
            plan=self.plan(step),
            dynamics=self.dynamics,
        )
        images = decode(self.policy, trajectory.final, self.settings.micro_batch)
        with torch.no_grad():
            scores = self.session.rewards.score(RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups))
        return Rollout(prompts, condition, trajectory, images, scores.by_name(), metrics=self._describe(scores.by_name(), prompts.groups))

    def _describe(self, rewards: dict[str, Tensor], groups: Tensor) -> dict[str, float]:
        """reward/NAME, spread/NAME, zero_spread/NAME and the share of invalid scores, over all processes."""
        metrics: dict[str, Tensor] = {}
        for name, values in rewards.items():
            spread = credits.spread(values.cpu(), groups)
            metrics["reward/mean" if name == "total" else f"reward/{name}"] = values.nanmean().cpu()
            metrics[f"spread/{name}"], metrics[f"zero_spread/{name}"] = spread["std"], spread["zero_fraction"]
        metrics["reward/invalid"] = (~rewards["total"].isfinite()).float().mean().cpu()
        stacked = self.processes.mean(torch.stack([v.float() for v in metrics.values()]).to(self.device))
        return dict(zip(metrics, stacked.tolist(), strict=True))

    def credit(self, rollout: Rollout) -> Tensor:
        section, rewards = self.config.credit, dict(rollout.rewards)
        total = rewards.pop("total")
        groups = rollout.prompts.groups.to(total.device)
        if section.aggregation == "gdpo":
            floors = {alias: reward.spec.noise_std for alias, reward in self.session.rewards.rewards.items()}
            weights = self.session.rewards.weights
            advantages = credits.gdpo_advantages(rewards, weights, groups, floors, clip=section.clip, moments=self.processes.sum)
        else:
            advantages = credits.group_advantages(
                total, groups, std=section.std, epsilon=section.epsilon, clip=section.clip, moments=self.processes.sum
            )
        return credits.per_step(advantages, rollout.trajectory.log_probs.shape[1]).to(self.device)

    def loss(self, batch: Minibatch) -> Loss:
        guidance = self.config.policy.guidance
        law, prediction = transition(self.policy, batch.x, batch.sigma, batch.sigma_next, batch.condition, guidance, self.dynamics)
        loss = clipped_policy(law.log_prob(batch.x_next), batch.log_prob, batch.advantage, *self.config.ratio.bounds)
        if not self.settings.kl:
            return loss
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.predict(batch.x, batch.sigma, batch.condition, guidance)
        kl = self.penalty(batch, prediction, reference).mean()
        return Loss(loss.value + self.settings.kl * kl, loss.metrics | {"kl": kl.detach()})

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


def step_plan(exploration: ExplorationSection, steps: int, seed: int, step: int) -> StepPlan:
    """The plan that an `exploration` section means at a training step."""
    if exploration.kind == "all":
        return all_steps(steps)
    low, high = exploration.range or (0, max(exploration.size, steps // 2))
    try:
        return window(steps, exploration.size, low, high, seed, step)
    except ValueError as error:
        raise UserError(f"exploration: {error} (policy.steps={steps})") from None
