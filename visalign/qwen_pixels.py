"""Pictures and videos as tensors to the patches that Qwen2-VL and its descendants look at.

Differentiable, and equal to transformers' own image and video processors up to their rounding to 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.preprocess import Preprocess

LONGEST = 200  # times the short side, at most


@dataclass(frozen=True)
class QwenPixels:
    """What a checkpoint's processor does to pictures.

    Attributes:
        mean, std: per channel.
        min_pixels, max_pixels: bounds of a frame's area after scaling.
        patch: pixels per side of a patch.
        merge: patches per side that become one token.
        frames: consecutive frames in a patch; a picture, or a last frame that has no partner, is repeated.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    frames: int = 2

    @classmethod
    def of(cls, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> QwenPixels:
        """The settings of a transformers image or video processor, with other bounds of the area if they are given."""
        size = processor.size
        return cls(
            tuple(processor.image_mean),
            tuple(processor.image_std),
            min_pixels or size["shortest_edge"],
            max_pixels or size["longest_edge"],
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
        )

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Size after scaling: sides are multiples of patch · merge, the area within the bounds and the aspect kept as well as that allows.

        Raises:
            UserError: one side is more than 200 times the other.
        """
        if max(height, width) > LONGEST * min(height, width):
            raise UserError(f"a picture of {height} × {width} is too narrow for Qwen2-VL: expected sides within a factor of {LONGEST}")
        factor, area = self.patch * self.merge, height * width
        high, wide = (round(side / factor) * factor for side in (height, width))
        if high * wide > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            high, wide = (max(1, math.floor(side / shrink / factor)) * factor for side in (height, width))
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return high, wide

    def __call__(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of N pictures or videos of one size.

        Args:
            media: (N, 3, H, W) or (N, F, 3, H, W) in [0, 1].

        Returns:
            `pixel_values` (N · t · h · w, 3 · frames · patch²) float32, and `grid_thw` (N, 3) int64, the counts t, h, w of patches. Every
            merge² rows in turn become one token, so that a medium has t · h · w / merge² tokens.
        """
        video = media.unsqueeze(1) if media.ndim == 4 else media
        high, wide = self.scaled(*video.shape[-2:])
        frames = Preprocess((high, wide), self.mean, self.std, aspect="stretch")(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        missing = -frames.shape[1] % self.frames
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else frames
        grid = frames.shape[1] // self.frames, high // self.patch, wide // self.patch
        down, across = ((side // self.merge, self.merge, self.patch) for side in grid[1:])
        blocks = frames.reshape(len(media), grid[0], self.frames, 3, *down, *across)
        rows = blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # N, t, h, w, merge, merge, 3, frames, patch, patch
        rows = rows.reshape(len(media) * math.prod(grid), -1)
        return rows, torch.tensor([grid], device=rows.device).expand(len(media), 3)
