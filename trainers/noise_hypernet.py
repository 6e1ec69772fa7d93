"""HyperNoise (arXiv 2508.09968): a network that learns what noise optimisation finds, and moves the initial noise in one forward.

    x̂ = ε + f(ε, c),   L = E[-R(g(x̂, c)) + β·½‖f(ε, c)‖²/d]

f is an adapter on the generator itself (`visalign.shifted_noise`), 0 in the beginning; the generator g stays as it was, and with it its
pictures' manifold: the paper finds that the same rewards melt pictures when they train g. One forward more, whatever the number of steps.

½E‖f‖² stands for KL(law of x̂ ‖ N(0, I)). By Stein's lemma the two differ by E[tr J - log|det(I + J)|] with J = ∂f/∂ε, which is at most
d·(-log(1 - L) - L) for a Lipschitz constant L < 1 of f: of second order, so that ½‖f‖² is the KL where f hardly depends on the noise, and
else no bound of it from either side. The paper's formula has the sum over the d latent elements, its code their mean, which is β = 1
here; the formula is β = d.

Collect → credit → loss: a collection moves and draws; credit is the reward's gradient by the moved noise, a number for every latent
element; the loss moves f along it. So the graphs of reward, decoder and generator are gone before that of f is built, and only f, which
learns, is ever synchronised.

Differs from the authors' code: AdamW, and every picture has a noise of its own (theirs share one in a micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visalign.climbing import Look, check, look
from visalign.config import AtLeastZero, Positive
from visalign.errors import UserError
from visalign.losses import Loss
from visalign.noise import gaussian
from visalign.paths import expand
from visalign.rollout import Minibatch, Prompts, Rollout, Trajectory
from visalign.shifted_noise import ShiftedNoise
from visalign.trainer import Session, Trainer
from visalign.whiteness import describe


@dataclass(frozen=True)
class Moved(Rollout):
    """A rollout whose only recorded step leads from the noise to the moved noise.

    Attributes:
        slopes: (N, ...) the reward's gradient by the moved noise; 0 where it or the score failed.
    """

    slopes: Tensor | None = None


class NoiseHypernet(Trainer):
    """Move, draw, differentiate the reward by the moved noise, and learn to move further that way."""

    class Config(Trainer.Config):
        group_size: Positive = 1  # pictures per prompt; nothing compares them
        kl: AtLeastZero = 1.0  # weight β of ½·mean f² over latent elements

    moves_noise: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    deviation: ClassVar[str] = "replay/max_deviation"

    @classmethod
    def climbs(cls, settings: Config) -> bool:
        return True

    def __init__(self, session: Session):
        super().__init__(session)
        check(session.rewards, exact=True, otherwise="use one that has, such as clip_score, or weight 0")
        if self.settings.stacked_timesteps > 1 or self.settings.updates > 1:
            raise UserError("trainer.stacked_timesteps, trainer.updates: a gradient by the noise is for one step and one update; use 1")
        assert isinstance(self.policy, ShiftedNoise)
        self.mover = self.policy
        self.sigmas = self.policy.family.grid(self.config.policy.steps).to(self.device)

    def collect(self, prompts: Prompts, step: int) -> Moved:
        before, condition = self.policy.nfe, self.policy.family.encode(prompts.texts, prompts.metadata)
        noise = gaussian(self.policy.family.latent_shape, self.config.run.seed, prompts.noise_ids, 0, device=self.device)
        moved: list[Tensor] = []
        looks: list[Look] = []
        for rows in torch.arange(len(prompts)).split(self.settings.micro_batch):
            asked, chain = condition.take(rows), {"steps": self.config.policy.steps, "guidance": self.config.policy.guidance}
            with torch.no_grad():
                moved.append(self.mover.start(noise[rows], self.sigmas[0].expand(len(rows)), asked))
            with self.mover.reference():
                looks.append(look(self.mover, self.session.rewards, moved[-1], prompts.take(rows), asked, **chain, slope=True))
        x, scores = torch.cat(moved), [seen.scores for seen in looks]
        rewards = {name: torch.cat([said.by_name()[name].detach() for said in scores]) for name in scores[0].by_name()}
        described = self._describe_rewards(rewards, prompts.groups) | self._describe_noise(noise, x)
        return Moved(
            prompts,
            condition,
            trajectory(noise, x, torch.cat([seen.latents for seen in looks]), self.sigmas, (self.policy.nfe - before) / len(prompts)),
            torch.cat([seen.images for seen in looks]),
            rewards,
            errors={alias: list(dict.fromkeys(text for said in scores for text in said.errors[alias])) for alias in scores[0].errors},
            metrics=described | {"nfe_backward": 1 + looks[0].spent.nfe_backward},
            slopes=torch.cat([seen.gradient for seen in looks]),
        )

    def _describe_noise(self, noise: Tensor, moved: Tensor) -> dict[str, float]:
        """noise/NAME of the moved noise, means over all processes of figures that are 0 for fresh noise, and the shift's size."""
        found = {name: values.mean() for name, values in describe(moved).items()} | {"shift": (moved - noise).square().mean().sqrt()}
        values = self.processes.mean(torch.stack(list(found.values()))).tolist()
        return {f"noise/{name}": value for name, value in zip(found, values, strict=True)}

    def credit(self, rollout: Rollout) -> Tensor:
        """(N, 1, ...): what a reward would gain by every latent element of the moved noise."""
        assert isinstance(rollout, Moved)
        assert rollout.slopes is not None
        return rollout.slopes[:, None]

    def loss(self, batch: Minibatch) -> Loss:
        shift = self.mover.shift(batch.x, batch.sigma, batch.condition)
        worth = batch.advantage if batch.advantage.ndim > 1 else expand(batch.advantage, shift)
        gained = (worth * shift).flatten(1).sum(1)
        energy = shift.square().flatten(1).mean(1) / 2
        deviation = (batch.x + shift - batch.x_next).detach().abs().max()
        metrics = {"kl": energy.mean().detach(), "replay/max_deviation": deviation}
        return Loss((self.settings.kl * energy - gained).mean(), metrics)


def trajectory(noise: Tensor, moved: Tensor, final: Tensor, sigmas: Tensor, nfe: float) -> Trajectory:
    """The way from the noise (N, ...) to the moved noise as one recorded step; it has no density."""
    count, device = len(noise), noise.device
    return Trajectory(
        latents=torch.stack([noise, moved], 1),
        before=torch.zeros(1, dtype=torch.int64, device=device),
        steps=torch.zeros(count, 1, dtype=torch.int64, device=device),
        sigmas=sigmas,
        log_probs=torch.full((count, 1), torch.nan, device=device),
        node=torch.arange(count, device=device)[:, None].repeat(1, 2),
        final=final,
        nfe=nfe,
    )
