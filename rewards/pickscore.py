"""PickScore: a CLIP fine-tuned on which of two pictures people prefer for a prompt; the logit, not the cosine, is the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from visalign.features import load_dual_encoder
from visalign.preprocess import Aspect, checked_aspect
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

TYPICAL = 26.0  # a little above the best pictures' score, so that a normalised one stays below 1


class PickScore(Reward):
    """exp(logit_scale) · cos(image, prompt), differentiable (Kirstain et al. 2023, arXiv 2305.01569, equation 1).

    A softmax over several pictures of one prompt is the probability that each is preferred. Raw scores lie around 18 to 24.

    Args:
        checkpoint: see `visalign.features.load_dual_encoder`.
        processor: tokenizer and picture processor, for a checkpoint without its own; None means the one that the default weights were
            trained with, or else the checkpoint's.
        normalise: divide by 26, which brings scores near 0.8 to 0.9.
        aspect: "crop", "letterbox" or "stretch" for pictures that are not square; None for the checkpoint's own.

    Raises:
        UserError: a bad option, or a checkpoint that cannot be loaded.
    """

    spec = RewardSpec(
        name="pickscore",
        differentiable=True,
        needs=frozenset({"prompt"}),
        licence="MIT",
        model_id="yuvalkirstain/PickScore_v1",
    )
    processor_id = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        processor: str | None = None,
        normalise: bool = False,
        aspect: Aspect | None = None,
    ):
        self.aspect: Aspect | None = checked_aspect(aspect)
        self.encoder = load_dual_encoder(checkpoint, processor or (self.processor_id if checkpoint == self.spec.model_id else None))
        self.scale = self.encoder.logit_scale.exp().item() / (TYPICAL if normalise else 1.0)
        self.spec = replace(self.spec, range=(-self.scale, self.scale))

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; embeddings "pickscore" (N, D)."""
        image, text = self.encoder.encode_images(batch.images, self.aspect), self.encoder.encode_texts(batch.prompts)
        cosine = (image * text).sum(-1)
        return RewardOutput.of(self.scale * cosine, components={"cosine": cosine}, embeddings={"pickscore": image})

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        self.encoder.encode_texts(prompts)
