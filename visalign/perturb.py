"""Changes to pictures that no judge should mind: what a score moves by under them is noise, not quality."""

from __future__ import annotations

import io
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visalign.noise import seed_for

SHIFT = 2  # pixels, at most
QUALITY = 95  # of JPEG


def perturbed(images: Tensor, number: int) -> Tensor:
    """The same pictures, shifted by up to 2 pixels, resized by 1 % or through JPEG of quality 95, in turn.

    A function of `number` alone, the same for all pictures. Differentiable; through JPEG the gradient passes straight (arXiv 1308.3432).

    Args:
        images: (N, 3, H, W) in [0, 1].
        number: which of the changes, from 0 on.

    Returns:
        (N, 3, H, W), or a pixel more or less per side where resized.
    """
    rng = random.Random(seed_for("perturbation", number))
    kind = number % 3
    if kind == 0:
        down, right = rng.choice([(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1) if (y, x) != (SHIFT, SHIFT)])
        wide = F.pad(images, (SHIFT,) * 4, mode="replicate")
        return wide[..., down : down + images.shape[-2], right : right + images.shape[-1]]
    if kind == 1:
        sign = rng.choice((-1, 1))
        size = [max(1, side + sign * max(1, round(side / 100))) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return images + (_jpeg(images.detach()) - images).detach()


def _jpeg(images: Tensor) -> Tensor:
    """(N, 3, H, W) through JPEG and back."""
    pixels = (images.float().nan_to_num().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded: list[Tensor] = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
        decoded.append(torch.from_numpy(np.array(Image.open(buffer))))
    return (torch.stack(decoded).permute(0, 3, 1, 2) / 255).to(images)
