"""DINO similarity: how much a picture looks like the reference pictures of its prompt, as a whole and patch by patch.

The visual reward of Adv-GRPO (arXiv 2511.20256, section 3) is `patch_weight: 0`, without gradients. Differs in: patches count as well and
give a map of credit; the nearest reference's distance is reported, because this reward pays for copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.preprocess import Aspect, checked_aspect
from visalign.references import References
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.vision import load_vision_encoder


class Dino(Reward):
    """(1 - patch_weight) · global + patch_weight · patch, differentiable, in [-1, 1].

    With f the unit features of a picture, g_m those of reference m, j and k patches:

        global = max_m cos(f, g_m)
        patch  = max_m mean_j max_k cos(f_j, g_mk)     ("best")
        patch  = max_m mean_j cos(f_j, g_mj)           ("aligned": the same thing at the same place)

    Args:
        checkpoint: see `visalign.vision.load_vision_encoder`.
        references, count: see `visalign.references.References`.
        patch_weight: in [0, 1].
        patches: what a patch is compared with.
        reduce: over references: "max", or "mean" in its place.
        layers: blocks whose patch features are compared, side by side.
        resolution: pixels per side of the encoder's input; None for the checkpoint's own (published: 518, with aspect "stretch").
        aspect: "crop", "letterbox" or "stretch" for pictures that are not square; None for the checkpoint's own.

    Components, each (N,): `global`, `patch`, and `distance` = 1 - max_m cos(f, g_m), near 0 for a copy of a reference.
    """

    spec = RewardSpec(name="dino", differentiable=True, range=(-1.0, 1.0), licence="Apache-2.0", model_id="facebook/dinov2-base")

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        references: str | None = None,
        count: int = 8,
        patch_weight: float = 0.3,
        patches: Literal["best", "aligned"] = "best",
        reduce: Literal["max", "mean"] = "max",
        layers: tuple[int, ...] = (-1,),
        resolution: int | None = None,
        aspect: Aspect | None = None,
    ):
        if not 0 <= patch_weight <= 1:
            raise UserError(f"dino: patch_weight must be in [0, 1], got {patch_weight}")
        self.patch_weight, self.patches, self.reduce = patch_weight, patches, reduce
        self.layers = layers
        self.aspect: Aspect | None = checked_aspect(aspect)
        self.encoder = load_vision_encoder(checkpoint, resolution)
        self.references = References("dino", references, count, self._encode)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.encoder.encode(images, self.layers, self.aspect)
        return seen.image, seen.patches

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; dense (N, h, w) of patch similarities; embeddings "dino" (N, D)."""
        references = self.references(batch)
        image, patches = self._encode(batch.images)
        rows = [self._compare(*pair, *known) for *pair, known in zip(image, patches, references, strict=True)]
        whole, nearest, dense = (torch.stack(column) for column in zip(*rows, strict=True))
        patch = dense.mean(1)
        score = (1 - self.patch_weight) * whole + self.patch_weight * patch
        components = {"global": whole, "patch": patch, "distance": 1 - nearest}
        return RewardOutput.of(
            score, components=components, dense=dense.unflatten(1, self.encoder.grid), embeddings={"dino": image.detach()}
        )

    def _compare(self, image: Tensor, patches: Tensor, others: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(D,), (P, D) against (R, D), (R, P, D): global similarity, that of the nearest, and (P,) of patches."""
        others, parts = others.to(image.device), parts.to(image.device)
        cosine = others @ image
        best = self.patches == "best"
        similar = torch.stack([(patches @ part.T).amax(1) if best else (patches * part).sum(1) for part in parts])
        if self.reduce == "mean":
            return cosine.mean(), cosine.amax(), similar.mean(0)
        return cosine.amax(), cosine.amax(), similar[similar.mean(1).argmax()]

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        if self.references.draw is not None:
            self.references.prepare(prompts, metadata)
