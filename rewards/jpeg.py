"""JPEG size: kilobytes of a picture as JPEG, or minus that. Needs no model; the plainest test that an optimiser optimises.

By design it is hacked at once: incompressible pictures turn to noise, compressible ones to flat fields.
"""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from PIL import Image

from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

SIGNS = {"incompressible": 1.0, "compressible": -1.0}


class Jpeg(Reward):
    """Kilobytes (1000 bytes) of the picture as JPEG, not differentiable (Black et al. 2023, DDPO, arXiv 2305.13301, section 5.1).

    Args:
        quality: of the encoder, 1 to 95.
        direction: "incompressible" rewards size, "compressible" rewards minus the size.
        per_megapixel: divide by the number of pixels in millions, to compare pictures of different sizes.

    Raises:
        UserError: a bad option.
    """

    spec = RewardSpec(name="jpeg", range=(0.0, float("inf")))

    def __init__(self, quality: int = 95, direction: str = "incompressible", per_megapixel: bool = False):
        if not 1 <= quality <= 95:
            raise UserError(f"jpeg: quality must be 1 to 95, got {quality}")
        if direction not in SIGNS:
            raise UserError(f"jpeg: direction {direction!r} is not one of {', '.join(SIGNS)}")
        self.quality, self.sign, self.per_megapixel = quality, SIGNS[direction], per_megapixel
        if self.sign < 0:
            self.spec = replace(self.spec, range=(-float("inf"), 0.0))

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; component "kilobytes" (N,). A picture that isn't finite is invalid."""
        images = batch.images.detach()
        finite = images.isfinite().flatten(1).all(1).cpu()
        # Rounded as every picture is on its way to a file; a cast alone would truncate.
        pixels = (images.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = torch.tensor([self._bytes(Image.fromarray(picture)) for picture in pixels]) / 1000
        sizes = torch.where(finite, sizes, torch.nan).to(images.device)
        megapixels = images.shape[-2] * images.shape[-1] / 1e6 if self.per_megapixel else 1.0
        return RewardOutput.of(self.sign * sizes / megapixels, components={"kilobytes": sizes})

    def _bytes(self, picture: Image.Image) -> int:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality)
        return buffer.tell()
