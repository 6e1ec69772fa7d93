"""DiffusionNFT (arXiv 2509.16117): good and bad pictures push and pull two implicit policies on the forward process.

Pictures come from an old policy by any noise-free solver. Each is a good one with probability r, from its group advantage; it is mixed with
noise, and the policy learns so that its interpolation with the old one explains good pictures and its extrapolation bad ones
(`visalign.matching.negative_aware`). The old policy follows slowly. No likelihood, no stochastic sampler, no guidance.

Differs from the paper, with the authors' code: errors are of the clean sample and normalised by their own size (`space: prediction` is
the paper's form); the loss is times the advantages' clip. Differs from the code: times are drawn systematically, one in each of equal
parts of the schedule, not permuted; two optimizer steps share a picture's times instead of the pictures; the KL's forwards are only taken
where it has a weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from visalign.config import Above, AtLeastZero
from visalign.forward_process import ForwardTrainer, OldSection
from visalign.losses import Loss
from visalign.matching import Space, error, negative_aware, optimality
from visalign.rollout import Noised
from visalign.solvers import Solver
from visalign.trainer import Defaults, Session


class NFT(ForwardTrainer):
    class Config(ForwardTrainer.Config):
        solver: Solver = "dpm2m"
        draws: Literal["current", "old"] = "old"
        old: OldSection = OldSection(
            rate=0.001, most=0.5
        )  # the authors' for GenEval and preference; for OCR flat 75, rate 0.0075, most 0.999
        beta: Above = 1.0  # how far the implicit policies are from the old one
        space: Space = "clean"  # of the errors: of clean samples, each over its own size; or of predictions, plain
        mode: Literal["all", "positive", "negative", "one", "binary"] = "all"  # which advantages count, and how
        kl: AtLeastZero = 1e-4  # weight of mean‖Δprediction‖² against the model before training

    defaults: ClassVar[Defaults] = {"credit": {"std": "global", "clip": 5.0}}

    def __init__(self, session: Session):
        super().__init__(session)
        if self.settings.kl:
            self.policy.keep_reference()

    def loss(self, batch: Noised) -> Loss:
        settings, most = self.settings, self.config.credit.clip
        old = self.predict_as(self.old.weights(), batch)
        reference = self.predict_as(self.policy.reference(), batch) if settings.kl else None
        prediction = self.predict(batch)
        good = optimality(batch.credit, most, settings.mode)
        parts = batch.x, batch.clean, batch.target, batch.time
        terms = negative_aware(self.policy.family.path, *parts, prediction, old, good, settings.beta, settings.space)
        value = most * batch.mean(terms)
        metrics = {"good": batch.mean(good), "old/distance": batch.mean(error(prediction.detach(), old))}
        if reference is not None:
            kl = batch.mean(error(prediction, reference))
            value, metrics["kl"] = value + settings.kl * kl, kl.detach()
        return Loss(value, metrics)
