"""FLUX.1 Kontext, which edits a picture as the prompt says: whatever loads as `FluxKontextPipeline`.

Each prompt's `metadata["condition"]` is its picture, a file or (3, H, W) in [0, 1]. It is scaled and cut to the size of what is drawn, and
its tokens follow the drawn picture's. The stock pipeline's choice of a size by the picture's aspect is off, so that a batch has one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.families.flux import Flux, tokens
from visalign.preprocess import Preprocess


class FluxKontext(Flux):
    """Args: as of `Flux`, which it is with a further picture."""

    pipeline_classes = ("FluxKontextPipeline",)
    needs_picture = True

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        given = [self.encode_images(self.fitted(picture)) for picture in pictures if picture is not None]
        own = {"picture": torch.cat(given)} if given else {}  # guidance keeps the sample's
        return super().embed(texts, pictures) | own

    def fitted(self, picture: Any) -> Tensor:
        """(1, 3, H, W) in [0, 1] of the drawn picture's size."""
        return Preprocess((self.size["height"], self.size["width"]), (0.0,) * 3, (1.0,) * 3)(self.opened(picture)[None])

    def shown(self, condition: dict[str, Tensor]) -> list[Tensor]:
        return [tokens(condition["picture"].to(self.denoiser.dtype))]

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pictures = torch.cat([self.fitted(record["condition"]) for record in metadata])
        area = self.size["height"] * self.size["width"]
        return super().call(texts, guidance, metadata) | {"image": pictures, "max_area": area, "_auto_resize": False}
