"""AWM, advantage-weighted matching (arXiv 2509.25050): policy gradients whose log-likelihood is the loss of pretraining.

DDPO's transition likelihood is a matching loss against a noisy target; AWM takes the clean target. So the gradient keeps its direction
with less variance, and pictures may come from any solver. The ratio exp(ℓ - ℓ_old) of `visalign.matching.likelihood`, both at the same
noise and time, goes into PPO's clipped loss.

A negative advantage drives the error up without bound: a penalty on the distance to an older policy that follows closely (`anchor`)
holds it, and clipping hardly ever does at the authors' range of 1. Their advantages are cut at ±5 and scaled to ±1, as here: by the
recipe's credit.clip. Differs from their code: times are drawn systematically for each picture, not once for a micro-batch; the sampler is
an ODE solver of ours (theirs: SA-Solver without noise); the older policy follows the optimizer's steps.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from visalign.config import Above, AtLeastZero
from visalign.forward_process import ForwardTrainer, OldSection
from visalign.losses import Loss, clipped_policy
from visalign.matching import Weighting, error, likelihood
from visalign.rollout import Noised, Rollout
from visalign.snapshots import Snapshot
from visalign.solvers import Solver
from visalign.trainer import Defaults, Session


class AWM(ForwardTrainer):
    class Config(ForwardTrainer.Config):
        solver: Solver = "dpm2m"
        old: OldSection = OldSection(rate=0.001, most=0.3)
        weighting: Weighting = "ghuber"  # of matching errors: -e, -t·e, -t²·e, -t·√e, -(t/p)·e^p
        power: Above = 0.25  # p of ghuber
        clip: Above = 1.0  # of the ratio; 1 and more never clips from below
        anchor: AtLeastZero = 1.0  # weight of mean‖Δprediction‖² against the old policy
        kl: AtLeastZero = 1e-3  # the same against the model before training

    defaults: ClassVar[Defaults] = {"credit": {"std": "global", "clip": 5.0}}

    def __init__(self, session: Session):
        super().__init__(session)
        if self.settings.kl:
            self.policy.keep_reference()
        self.drew = self.old if self.settings.draws == "old" else Snapshot(self.parameters)  # whose pictures these are

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        if self.drew is not self.old:
            self.drew.follow()
        return super().learn(rollout, step)

    def loss(self, batch: Noised) -> Loss:
        settings = self.settings
        old = self.predict_as(self.old.weights(), batch) if settings.anchor else None
        reference = self.predict_as(self.policy.reference(), batch) if settings.kl else None
        once = settings.updates == 1 and self.drew is not self.old  # nothing has moved since the pictures were drawn
        drew = None if once else old if old is not None and self.drew is self.old else self.predict_as(self.drew.weights(), batch)
        prediction = self.predict(batch)
        new = self.likelihood(prediction, batch)
        before = new.detach() if drew is None else self.likelihood(drew, batch)
        loss = clipped_policy(new, before, batch.credit / self.config.credit.clip, settings.clip, settings.clip, batch.weight)
        value, metrics = loss.value, dict(loss.metrics)
        for name, other, weight in (("kl", reference, settings.kl), ("anchor", old, settings.anchor)):
            if other is not None:
                distance = batch.mean(error(prediction, other))
                value, metrics[name] = value + weight * distance, distance.detach()
        return Loss(value, metrics)

    def likelihood(self, prediction: Tensor, batch: Noised) -> Tensor:
        """(U,) what stands for the log-likelihood of each clean sample."""
        sigma = self.policy.family.path.coefficients(batch.time)[1]
        return likelihood(error(prediction, batch.target), sigma, self.settings.weighting, self.settings.power)
