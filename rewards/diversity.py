"""Diversity: how different the pictures of one prompt are from one another. Pay for it only beside a reward for quality: noise is diverse.

Three measures: leave-one-out distance (the pair reward of arXiv 2410.06084, averaged over a picture's pairs), Vendi score (arXiv
2210.02410), and PVS, the tonal spread of DivGenBench (arXiv 2512.24146), which needs no model. A measure of a set has no gradient between
its members, and group-normalised advantages of equal scores are 0; so each picture is credited with what the set loses without it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.monitors import effective_number, tones
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.vision import load_vision_encoder


class Diversity(Reward):
    """Of a group S of pictures, differentiable; groups of one are invalid.

        distance: set = mean over pairs of 1 - cos,   member i = mean_j≠i of 1 - cos(e_i, e_j)
        vendi:    set = V(S), effective number of pictures,  member i = V(S) - V(S without i)
        tonal:    set = PVS(S),                       member i = PVS(S) - PVS(S without i)

    Args:
        measure: which of these.
        score: "member", or "set", the same number for a whole group: for evaluation, or as a loss.
        checkpoint: see `visalign.vision.load_vision_encoder`; CLIP's picture tower works as well. Not loaded for "tonal".
        features: "image", what a picture shows as a whole, or "patches", what it shows at each place: then the same things elsewhere are
            diverse, too, and a picture need not show what it shouldn't to be different.

    Components, each (N,): `member` and `set`. A picture that is not finite is invalid and left out of its group.
    """

    spec = RewardSpec(
        "diversity", scope="group", differentiable=True, needs=frozenset({"groups"}), licence="Apache-2.0", model_id="facebook/dinov2-base"
    )

    def __init__(
        self,
        measure: Literal["distance", "vendi", "tonal"] = "distance",
        score: Literal["member", "set"] = "member",
        checkpoint: str = spec.model_id,
        features: Literal["image", "patches"] = "image",
    ):
        self.measure, self.form, self.features = measure, score, features
        self.encoder = None if measure == "tonal" else load_vision_encoder(checkpoint)

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; embeddings "diversity" (N, D) of whole pictures, where there is an encoder."""
        assert batch.groups is not None, "the panel refuses a batch without groups"
        seen = None if self.encoder is None else self.encoder.encode(batch.images)
        features = tones(batch.images) if seen is None else seen.image if self.features == "image" else seen.patches.flatten(1)
        sound = features.isfinite().all(1)
        member, whole = features.new_full((2, len(batch)), math.nan).unbind()
        for group in batch.groups.unique().tolist():
            rows = ((batch.groups.to(sound.device) == group) & sound).nonzero()[:, 0]
            if len(rows) > 1:
                own, together = self._measure(features[rows])
                member, whole = member.index_put((rows,), own), whole.index_put((rows,), together.expand(len(rows)))
        return RewardOutput.of(
            member if self.form == "member" else whole,
            components={"member": member, "set": whole},
            embeddings={} if seen is None else {"diversity": seen.image.detach()},
        )

    def _measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) of one group -> (n,) of members, () of the set."""
        if self.measure == "distance":
            return leave_one_out(features), leave_one_out(features).mean()
        whole = self._of_set(features)
        rest = [self._of_set(torch.cat([features[:n], features[n + 1 :]])) for n in range(len(features))]
        return whole - torch.stack(rest), whole

    def _of_set(self, features: Tensor) -> Tensor:
        if self.measure == "vendi":
            return effective_number(features).float()
        return features.std(0, correction=0).sum()


def leave_one_out(features: Tensor) -> Tensor:
    """(n, D), n > 1 -> (n,): mean over the others of 1 - cosine, in [0, 2]."""
    unit = F.normalize(features, dim=1)
    return 1 - ((unit @ unit.T).sum(1) - unit.square().sum(1)) / (len(unit) - 1)
