"""Diffusion-DPO (arXiv 2311.12908): of two pictures the policy learns to explain the preferred one better than its reference does.

Both are mixed with the same noise at the same time; the margin between what the policy gains on each over the reference
(`visalign.matching.preference_margin`) goes through a sigmoid. Pairs are

1. the best and the worst of each group that a step draws and the rewards rank (online DPO), by the current policy or by the reference
   (`draws: old`); or
2. the rows of a pairs file (`pairs`, see `visalign.preferences`), encoded by the model's VAE. The recipe's rewards label rows that have
   no label, and score all, as the model's VAE shows them.

The reference is the untrained model, or the current policy as it was every `old.every` steps: 1, with many updates a step and
`draws: old`, is the authors' code of Flow-GRPO in its online form. Ties are dropped.

Logged: `accuracy`, how often the implicit reward agrees; `gain/first` and `gain/second`, how much better than the reference each is
explained: often both fall, and what matters is that the second falls further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visalign import credit as credits
from visalign import preferences
from visalign.config import Above, AtLeastZero, Positive
from visalign.errors import UserError
from visalign.forward_process import ForwardTrainer, OldSection, Units, unrecorded
from visalign.losses import Loss, bradley_terry
from visalign.matching import error, preference_margin
from visalign.preferences import Pair
from visalign.rollout import Noised, Prompts, Rollout
from visalign.sampling import decode
from visalign.trainer import Session


class Preference(ForwardTrainer):
    class Config(ForwardTrainer.Config):
        timesteps: Positive = 1
        times: Literal["grid", "uniform", "logit_normal"] = "logit_normal"
        old: OldSection = OldSection(every=None)  # the reference
        beta: Above = 5000.0  # per mean over latent elements
        imitate: AtLeastZero = 0.0  # weight of the matching error of the first of each pair, beside the comparison
        pairs: Path | None = None  # a pairs file, trainer.prompts rows a step; null: ranked groups

    shown: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "loss": "loss"}

    def __init__(self, session: Session):
        super().__init__(session)
        self.pairs: list[Pair] = []
        if self.settings.pairs is not None:
            self.check_given()
            if self.settings.group_size != 2:
                raise UserError(f"trainer.group_size={self.settings.group_size}: a pair of trainer.pairs is a group of 2")
            self.pairs = [pair for pair in preferences.read(self.settings.pairs) if pair.better != "tie"]
            if not self.pairs:
                raise UserError(f"{self.settings.pairs}: every pair is a tie, nothing to learn from")

    def check_given(self) -> None:
        """Refuse rewards that would learn from given pictures as if the policy had drawn them."""
        for alias, reward in self.rewards.items():
            if reward.spec.trainable:
                raise UserError(f"rewards.{alias}: {reward.spec.name} learns from what the policy draws, and these pictures are given")

    def collect(self, prompts: Prompts, step: int) -> Rollout:
        return self.given(step) if self.pairs else super().collect(prompts, step)

    def given(self, step: int) -> Rollout:
        """The pictures of a step's pairs, two rows each; the total reward of labelled ones is 1 for the better and 0 for the other."""
        count, family = self.settings.prompts, self.policy.family
        own = self.processes.shard(count, "trainer.prompts")
        rows = preferences.drawn(self.pairs, count, self.config.run.seed, step)[own]
        latents = torch.cat([family.encode_images(picture[None].to(self.device)) for pair in rows for picture in pair.load()])
        ids = 2 * ((step - 1) * count + own.start) + torch.arange(len(latents))
        prompts = Prompts(
            [pair.prompt for pair in rows for _ in range(2)], [pair.metadata for pair in rows for _ in range(2)], ids // 2, ids, ids
        )
        condition = family.encode(prompts.texts, prompts.metadata)
        trajectory = unrecorded(latents, family.grid(self.config.policy.steps).to(self.device), 0.0)
        found = self.scored(prompts, condition, trajectory, decode(self.policy, latents, self.settings.micro_batch))
        total = found.rewards["total"]
        said = torch.tensor([pair.better == side if pair.better in (0, 1) else torch.nan for pair in rows for side in range(2)])
        labelled = torch.where(said.isnan().to(total.device), total, said.to(total))
        return replace(found, rewards=found.rewards | {"total": labelled})

    def units(self, rollout: Rollout) -> Units:
        assert rollout.advantages is not None
        score = torch.where(rollout.rewards["total"].isfinite().to(self.device), rollout.advantages[:, 0], torch.nan)
        rows = ranked(score, rollout.prompts.groups.to(self.device))
        return Units(rows, *torch.ones(2, len(rows), device=self.device))

    def loss(self, batch: Noised) -> Loss:
        """-log σ of the margin; `batch.credit` is the probability that the first of a pair is the preferred one."""
        reference = error(self.predict_as(self.old.weights(), batch), batch.target)
        errors = error(self.predict(batch), batch.target)
        margin = preference_margin(errors, reference, self.settings.beta)
        terms = batch.credit * bradley_terry(margin) + (1 - batch.credit) * bradley_terry(-margin)
        imitated = batch.mean(errors.chunk(2)[0])
        first, second = (reference - errors.detach()).chunk(2)
        right = (margin * (batch.credit - 0.5)).sign() / 2 + 0.5  # before the first update nobody is preferred: one half
        said = {"accuracy": right, "margin": margin, "gain/first": first, "gain/second": second}
        value = batch.mean(terms) + self.settings.imitate * imitated
        return Loss(value, {name: batch.mean(values.detach()) for name, values in said.items()})


def ranked(scores: Tensor, groups: Tensor) -> Tensor:
    """(P, 2) int64: rows of the best and of the worst of each group, from scores (N,), NaN where invalid.

    Groups without two that differ are left out.
    """
    order = groups.argsort(stable=True)
    sorted_groups, valid = groups[order], scores.isfinite()
    sides = torch.where(valid, scores, -torch.inf)[order], torch.where(valid, scores, torch.inf)[order]
    rows = torch.stack(
        [order[credits.extremes(side, sorted_groups, *count)] for side, count in zip(sides, ((1, 0), (0, 1)), strict=True)], 1
    )
    best, worst = (scores[column].nan_to_num(0.0) for column in rows.T)
    return rows[best > worst]
