"""A reward of one's own: a small head on a frozen encoder, trained on pairs of pictures by `trainers/reward_model.py`.

In the way of ImageReward (arXiv 2304.05977) a network learns from comparisons alone; here the encoder stays frozen, so that a few thousand
pairs and seconds are enough. A vision-language model that was trained so is loaded by `vlm_yes` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from visalign.features import load_dual_encoder
from visalign.heads import PreferenceHead
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Preference(Reward):
    """Log-odds of a trained head: σ(r(a) - r(b)) is the probability that picture a is preferred to b. Differentiable.

    Args:
        checkpoint: RUN/reward of a `reward_model` run with kind=head.

    Raises:
        UserError: no head there, or its encoder cannot be loaded.
    """

    spec = RewardSpec("preference", differentiable=True, needs=frozenset({"prompt"}))

    def __init__(self, checkpoint: str):
        self.head = PreferenceHead.load(checkpoint)
        self.encoder = load_dual_encoder(self.head.encoder)
        self.spec = replace(self.spec, model_id=checkpoint)

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; embeddings "preference" (N, D) are the encoder's."""
        image, text = self.encoder.encode_images(batch.images), self.encoder.encode_texts(batch.prompts)
        return RewardOutput.of(self.head(image, text), embeddings={"preference": image})

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        self.encoder.encode_texts(prompts)
