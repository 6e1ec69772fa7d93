"""What the families of diffusers' video pipelines do alike: sizes in space and time, latents, and videos in and out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.pipeline_family import PipelineFamily
from visalign.preprocess import Preprocess


class VideoFamily(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side of square videos; None: `height` and `width`.
    height, width, frames: of a video; the last one more than a multiple of what the VAE makes one.
    negative_prompt: what guidance leads away from.
    max_sequence_length: tokens, to which a prompt is cut or padded.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).

    Raises:
        UserError: a size that the model doesn't have.
    """

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None,
        height: int,
        width: int,
        frames: int,
        negative_prompt: str,
        max_sequence_length: int,
        step_distilled: bool | None,
    ):
        self.pipeline, self.frames, self.max_sequence_length = pipeline, frames, max_sequence_length
        self.height, self.width = resolution or height, resolution or width
        super().__init__(pipeline, resolution, negative_prompt, step_distilled)

    @abstractmethod
    def units(self) -> tuple[int, int, int]:
        """Frames and pixels per side of one latent, and what the stock pipeline wants sides to be multiples of."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """(C,) mean and std of the VAE's latents."""

    def shape(self, side: int | None) -> tuple[int, ...]:
        every, across, multiple = self.units()
        for name, value, unit, rest in (
            ("height", self.height, multiple, 0),
            ("width", self.width, multiple, 0),
            ("frames", self.frames, every, 1),
        ):
            if value < 1 or value % unit != rest % unit:
                raise UserError(f"policy.options.{name}={value}: expected a multiple of {unit}{' and one more' if rest else ''}")
        return (self.denoiser.config.out_channels, (self.frames - 1) // every + 1, self.height // across, self.width // across)

    @property
    def size(self) -> dict[str, int]:
        return {"height": self.height, "width": self.width, "num_frames": self.frames}

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = (values.to(latents).view(-1, 1, 1, 1) for values in self.moments())
        return latents * std + mean

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = (values.to(latents).view(-1, 1, 1, 1) for values in self.moments())
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).transpose(1, 2)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(N, F, 3, H, W) videos to (N, ...) clean latents: of evenly spaced frames, scaled, their middle cut out."""
        at = torch.linspace(0, images.shape[1] - 1, self.frames).round().long().to(images.device)
        pixels = Preprocess((self.height, self.width), (0.5,) * 3, (0.5,) * 3)(images[:, at].flatten(0, 1))  # to [-1, 1]
        videos = pixels.unflatten(0, (len(images), -1)).transpose(1, 2).to(self.pipeline.vae.dtype)
        return self.scaled(self.pipeline.vae.encode(videos).latent_dist.mode().float())

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().call(texts, guidance, metadata) | {"max_sequence_length": self.max_sequence_length}
