"""Pictures as tensors to what an encoder wants.

Differentiable, so that scores carry gradients to pictures, and equal to a checkpoint's official PIL preprocessing up to PIL's rounding to
8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.errors import UserError

Aspect = Literal["crop", "letterbox", "stretch"]


@dataclass(frozen=True)
class Preprocess:
    """Pictures in [0, 1] of any size to what an encoder wants.

    Attributes:
        size: (height, width) of the encoder's input.
        mean, std: per channel.
        interpolation: "bicubic" or "bilinear"; always antialiased, as PIL's is.
        aspect: "crop" scales the short side and cuts the middle, "letterbox" scales the long side and pads with black, "stretch" scales
            both.
        rounds: where an odd margin is halved: rounded (torchvision, open_clip) or truncated (transformers).
        scaled: (height, width) that the checkpoint's own aspect scales to before the middle `size` is cut out; None for `size`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    aspect: Aspect = "crop"
    rounds: bool = True
    scaled: tuple[int, int] | None = None

    @classmethod
    def of(cls, official: Any) -> Preprocess:
        """What an image processor of transformers does. Raises KeyError where it does something else, such as keeping every aspect."""
        crops = bool(getattr(official, "do_center_crop", False))
        asked = dict(official.size)
        short = asked.get("shortest_edge") if crops else None
        scaled = (short, short) if short else (asked["height"], asked["width"])
        size = (official.crop_size["height"], official.crop_size["width"]) if crops else scaled
        low, span = (-1, 2) if getattr(official, "rescale_offset", False) else (0, 1)  # the interval that pixels are rescaled to
        mean, std = (official.image_mean, official.image_std) if official.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        return cls(
            size=size,
            mean=tuple((m - low) / span for m in mean),
            std=tuple(s / span for s in std),
            interpolation={2: "bilinear", 3: "bicubic"}[int(official.resample)],
            aspect="crop" if short else "stretch",
            rounds=False,
            scaled=scaled if scaled != size else None,
        )

    def __call__(self, images: Tensor, aspect: Aspect | None = None) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, height, width) float32, normalised; differentiable."""
        aspect = aspect or self.aspect
        images = images.float()
        target = self._scaled(images.shape[-2], images.shape[-1], aspect)
        for size in ((images.shape[-2], target[1]), target):  # widths first, and clipped after each pass, as PIL does
            if size != tuple(images.shape[-2:]):
                images = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True).clamp(0, 1)
        images = self._centre(images)
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images - mean) / std

    def _scaled(self, height: int, width: int, aspect: Aspect) -> tuple[int, int]:
        """Size after scaling; the free side of a crop is truncated and that of a letterbox rounded, as the official transforms do."""
        high, wide = self.scaled if self.scaled and aspect == self.aspect else self.size
        if aspect == "stretch":
            return high, wide
        if aspect == "letterbox":
            ratio = max(height / high, width / wide)
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        return (high, int(high * width / height)) if height * wide <= width * high else (int(wide * height / width), wide)

    def _centre(self, images: Tensor) -> Tensor:
        """The middle `size` of the pictures, padded with black where they are smaller."""
        (high, wide), (height, width) = self.size, images.shape[-2:]
        down, right = max(0, high - height), max(0, wide - width)
        if down or right:
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        halve = round if self.rounds else int
        top, left = (halve(max(0, extra) / 2) for extra in (height - high, width - wide))
        return images[..., top : top + high, left : left + wide]


def checked_aspect(aspect: Aspect | None) -> Aspect | None:
    """An `aspect` option, None for the checkpoint's own. Raises UserError for another word."""
    if aspect is not None and aspect not in get_args(Aspect):
        raise UserError(f"aspect {aspect!r} is not one of {', '.join(get_args(Aspect))}")
    return aspect
