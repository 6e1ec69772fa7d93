"""λ-Harmonic reward: faithful to the subject's pictures *and* to the prompt; the lower of the two decides.

The reward of RPO (Miao et al. 2024, arXiv 2407.12164). Any dual encoder serves; the authors' is ALIGN. Differs in: likeness may be seen by
an encoder of its own, for shapes that one trained on captions takes for the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.features import load_dual_encoder
from visalign.preprocess import Aspect, checked_aspect
from visalign.references import References
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.vision import load_vision_encoder


class LambdaHarmonic(Reward):
    """1 / (λ / s_i + (1 - λ) / s_t), the weighted harmonic mean of two similarities, differentiable, in [0, 1].

    s_i = (1 + mean_m cos(reference m, image)) / 2 and s_t = (1 + cos(prompt, image)) / 2.

    Args:
        checkpoint: see `visalign.features.load_dual_encoder`.
        references, count: see `visalign.references.References`.
        image_weight: λ in [0, 1]; 0 looks at the prompt alone (as the authors label their training pairs), 1 at the pictures alone.
        aspect: "crop", "letterbox" or "stretch" for pictures that are not square; None for the checkpoint's own.
        image_checkpoint: of another encoder for s_i, see `visalign.vision.load_vision_encoder`; None: the same.

    Components, each (N,): `image` s_i and `text` s_t.
    """

    spec = RewardSpec(
        name="lambda_harmonic", differentiable=True, needs=frozenset({"prompt"}), range=(0.0, 1.0), model_id="kakaobrain/align-base"
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        references: str | None = None,
        count: int = 8,
        image_weight: float = 0.5,
        aspect: Aspect | None = None,
        image_checkpoint: str | None = None,
    ):
        if not 0 <= image_weight <= 1:
            raise UserError(f"lambda_harmonic: image_weight must be in [0, 1], got {image_weight}")
        self.image_weight = image_weight
        self.aspect: Aspect | None = checked_aspect(aspect)
        self.encoder = load_dual_encoder(checkpoint)
        self.seer = load_vision_encoder(image_checkpoint) if image_checkpoint else None
        # The mean of unit vectors: its product with a unit vector is the mean cosine.
        self.references = References("lambda_harmonic", references, count, lambda images: (self._seen(images).mean(0),))

    def _seen(self, images: Tensor) -> Tensor:
        """(N, D) unit features that likeness is measured in."""
        return self.encoder.encode_images(images, self.aspect) if self.seer is None else self.seer.encode(images, aspect=self.aspect).image

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; embeddings "clip" (N, D)."""
        references = torch.stack([mean for (mean,) in self.references(batch)])
        image, text = self.encoder.encode_images(batch.images, self.aspect), self.encoder.encode_texts(batch.prompts)
        seen = image if self.seer is None else self._seen(batch.images)
        subject, prompt = ((1 + (one * other.to(one)).sum(-1)) / 2 for one, other in ((seen, references), (image, text)))
        score = harmonic(subject, prompt, self.image_weight)
        return RewardOutput.of(score, components={"image": subject, "text": prompt}, embeddings={"clip": image.detach()})

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        self.encoder.encode_texts(prompts)
        if self.references.draw is not None:
            self.references.prepare(prompts, metadata)


def harmonic(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """(N,) weighted harmonic mean of two (N,) in [0, 1]; `weight` is the first one's."""
    return 1 / (weight / first.clamp_min(1e-6) + (1 - weight) / second.clamp_min(1e-6))
