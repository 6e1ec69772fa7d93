"""RPO (Miao et al. 2024, arXiv 2407.12164): a subject learned from a few pictures of it, held against what the untrained model draws.

Every picture that the untrained model draws for a prompt is paired with one of the subject's. Which of the two is better is a
probability, σ of the difference of their rewards for that prompt: published, the λ-harmonic mean (`lambda_harmonic`) of likeness and
prompt-following, with λ = 0 for these labels. The loss is the cross entropy of Diffusion-DPO's margin with it, plus the matching error of
the subject's picture. The validation reward, with λ between 0.3 and 0.7, decides which weights are kept (`eval.keep_best`).

Differs from the authors' code: labels are probabilities, not coins thrown with them; the two pictures share their noise and time, as in
Diffusion-DPO (theirs draws both anew); pictures are drawn every step, not four per prompt once; beta can be chosen (theirs has none,
which is 2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.config import Above, AtLeastZero, Positive
from visalign.errors import UserError
from visalign.forward_process import Units, unrecorded
from visalign.references import References
from visalign.rollout import Prompts, Rollout
from visalign.sampling import decode
from visalign.scoring import RewardInput
from visalign.trainer import Session
from visalign.trainers.preference import Preference


class RPO(Preference):
    class Config(Preference.Config):
        times: Literal["grid", "uniform", "logit_normal"] = "uniform"
        draws: Literal["current", "old"] = "old"
        beta: Above = 2.0
        imitate: AtLeastZero = 1.0
        sharpness: Above = 1.0  # of the labels: σ(sharpness · difference of the rewards)
        references: str | None = None  # pictures of the subject: a folder, a .jsonl of prompts and images, toybox:STYLE
        count: Positive = 8  # of them for each of their prompts, at most
        subject: str | list[str] | None = None  # prompts of the subject's pictures; null: that of the picture they are held against

    def __init__(self, session: Session):
        super().__init__(session)
        settings, encode = self.settings, self.policy.family.encode_images
        if settings.references is None:
            raise UserError(
                "trainer.references: none given; name the subject's pictures: a folder, a .jsonl of prompts and images, or toybox:STYLE"
            )
        if settings.subject == []:
            raise UserError("trainer.subject: an empty list; name prompts of the subject's pictures, or null for the drawn ones'")
        if settings.pairs is not None:
            raise UserError("trainer.pairs: rpo makes its pairs itself; use trainer.name=preference, or leave them out")
        self.check_given()
        self.references = References("rpo", settings.references, settings.count, lambda images: (encode(images.to(self.device)),))

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        """2·N rows: the drawn pictures, then for each the subject's picture that it is held against."""
        del step
        count, batch, turns = len(prompts), self.settings.micro_batch, prompts.ids.tolist()
        subject = [self.settings.subject] if isinstance(self.settings.subject, str) else self.settings.subject or []
        titles = [subject[turn % len(subject)] for turn in turns] if subject else prompts.texts
        condition = self.policy.family.encode([*prompts.texts, *titles], [*prompts.metadata] * 2)
        trajectory = self.drawn(prompts, condition.take(slice(0, count)))
        drawn = self.scored(prompts, condition, trajectory, decode(self.policy, trajectory.final, batch))
        known = self.references.prepare(titles, [{} if subject else record for record in prompts.metadata])
        latents = torch.stack([own[turn // max(1, len(subject)) % len(own)] for (own,), turn in zip(known, turns, strict=True)])
        images = decode(self.policy, latents, batch)
        with torch.no_grad():
            scores = self.session.rewards.score(RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups)).by_name()
        return replace(
            drawn,
            prompts=prompts.take(torch.arange(2 * count) % count),
            trajectory=unrecorded(torch.cat([trajectory.final, latents]), trajectory.sigmas, trajectory.nfe / 2),
            images=torch.cat([drawn.images, images]),
            rewards={alias: torch.cat([values, scores[alias].to(values)]) for alias, values in drawn.rewards.items()},
            weights=None,
        )

    def credit(self, rollout: Rollout) -> Tensor:
        """(2·N, 1) rewards; 0 where one failed."""
        return rollout.rewards["total"].nan_to_num(0.0)[:, None].to(self.device)

    def units(self, rollout: Rollout) -> Units:
        drawn, shown = rollout.rewards["total"].to(self.device).chunk(2)
        valid = (drawn.isfinite() & shown.isfinite()).nonzero()[:, 0]
        label = (self.settings.sharpness * (shown - drawn)[valid]).sigmoid()
        return Units(torch.stack([valid + len(drawn), valid], 1), label, torch.ones_like(label))
