"""CLIP score: the cosine of picture and prompt, optionally measured along the way from a neutral text to the prompt.

Rows are multiplied pairwise; a full N × N similarity and its diagonal cost N times more and have been a source of wrong scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.features import load_dual_encoder
from visalign.preprocess import Aspect, checked_aspect
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class ClipScore(Reward):
    """scale · cos(image, prompt), differentiable (Radford et al. 2021, arXiv 2103.00020; as a score: Hessel et al. 2021, arXiv 2104.08718).

    With `baseline`, scale · goal_baseline(...) takes its place (Rocamonde et al. 2023, arXiv 2310.12921, definition 1).

    Args:
        checkpoint: see `visalign.features.load_dual_encoder`; open_clip, CLIP and SigLIP checkpoints work.
        scale: factor on the score; conventions in use: 1 (cosine), 2.5 (Hessel, who also clips at 0), 100/30 (Flow-GRPO).
        baseline: neutral description, such as "a picture"; None for the plain cosine.
        baseline_weight: α in [0, 1]; 0 ignores the baseline, 1 measures along the line from baseline to prompt alone.
        aspect: "crop", "letterbox" or "stretch" for pictures that are not square; None for the checkpoint's own.

    Raises:
        UserError: a bad option, or a checkpoint that cannot be loaded.
    """

    spec = RewardSpec(
        name="clip_score",
        differentiable=True,
        needs=frozenset({"prompt"}),
        range=(-1.0, 1.0),
        licence="MIT",
        model_id="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        scale: float = 1.0,
        baseline: str | None = None,
        baseline_weight: float = 0.5,
        aspect: Aspect | None = None,
    ):
        if not scale > 0:
            raise UserError(f"clip_score: scale must be above 0, got {scale}")
        if not 0 <= baseline_weight <= 1:
            raise UserError(f"clip_score: baseline_weight must be in [0, 1], got {baseline_weight}")
        self.encoder = load_dual_encoder(checkpoint)
        self.aspect: Aspect | None = checked_aspect(aspect)
        self.scale, self.baseline, self.baseline_weight = scale, baseline, baseline_weight
        self.spec = replace(self.spec, range=(-scale, scale))

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in [-scale, scale]; embeddings "clip" (N, D)."""
        image, text = self.encoder.encode_images(batch.images, self.aspect), self.encoder.encode_texts(batch.prompts)
        cosine = score = (image * text).sum(-1)
        if self.baseline is not None:
            score = goal_baseline(image, text, self.encoder.encode_texts([self.baseline]), self.baseline_weight)
        return RewardOutput.of(self.scale * score, components={"cosine": cosine}, embeddings={"clip": image})

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        self.encoder.encode_texts(prompts)


def goal_baseline(image: Tensor, goal: Tensor, baseline: Tensor, weight: float) -> Tensor:
    """1 - ‖(s - g) P‖² / 2 with P = α d dᵀ/‖d‖² + (1 - α) I and d = g - b, without building P (arXiv 2310.12921, definition 1).

    Args:
        image, goal: s and g, (N, D) of unit length.
        baseline: b, (1, D) or (N, D) of unit length.
        weight: α in [0, 1]; 0 gives the cosine.

    Returns:
        (N,) in [-1, 1].
    """
    rest = image - goal
    along = (rest * F.normalize(goal - baseline, dim=-1)).sum(-1)
    keep = (1 - weight) ** 2
    return 1 - ((1 - keep) * along.square() + keep * torch.sum(rest.square(), -1)) / 2
