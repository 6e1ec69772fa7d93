"""LTX-Video, text to video: whatever loads as `LTXPipeline`.

Its scheduler is Euler's method already, with a shift that grows with the number of latents. Decoders that take a time get 0, the stock
pipeline's own default, at which they add no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from torch import Tensor, nn

from visalign.paths import Flow
from visalign.pipeline_family import shifted_grid
from visalign.video_family import VideoFamily


class LTX(VideoFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side of square videos; None: `height` and `width`.
    height, width, frames: of a video: multiples of 32, and one more than a multiple of 8.
    frame_rate: frames per second, which the model is told.
    negative_prompt: what guidance leads away from.
    max_sequence_length: T5 tokens; text beyond it is cut, with a warning by diffusers.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).

    Raises:
        UserError: a size that the model doesn't have.
    """

    pipeline_classes = ("LTXPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    output_layer = "proj_out"

    def __init__(
        self,
        pipeline: LTXPipeline,
        resolution: int | None = None,
        height: int = 512,
        width: int = 704,
        frames: int = 161,
        frame_rate: int = 25,
        negative_prompt: str = "",
        max_sequence_length: int = 128,
        step_distilled: bool | None = None,
    ):
        super().__init__(pipeline, resolution, height, width, frames, negative_prompt, max_sequence_length, step_distilled)
        self.path, self.frame_rate = Flow(), frame_rate

    def units(self) -> tuple[int, int, int]:
        pipe = self.pipeline
        return pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio, max(32, pipe.vae_spatial_compression_ratio)

    def moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        return vae.latents_mean, vae.latents_std / vae.config.scaling_factor

    @property
    def size(self) -> dict[str, int]:
        return super().size | {"frame_rate": self.frame_rate}

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        text, mask, *_ = self.pipeline.encode_prompt(texts, device=self.pipeline.text_encoder.device, **options)
        return {"text": text, "mask": mask}

    def grid(self, steps: int) -> Tensor:
        return shifted_grid(self.pipeline.scheduler, steps, torch.Size(self.latent_shape[1:]).numel())

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        every, across, _ = self.units()
        frames, height, width = self.latent_shape[1:]
        said = network(
            hidden_states=self.pack(x.to(self.denoiser.dtype)),
            encoder_hidden_states=condition["text"],
            timestep=sigma * 1000,
            encoder_attention_mask=condition["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(every / self.frame_rate, across, across),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(said, frames, height, width, *self._patch())

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *self._patch())

    def _patch(self) -> tuple[int, int]:
        return self.pipeline.transformer_spatial_patch_size, self.pipeline.transformer_temporal_patch_size

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        time = latents.new_zeros(len(latents), dtype=vae.dtype) if vae.config.timestep_conditioning else None
        videos = vae.decode(self.unscaled(latents).to(vae.dtype), time, return_dict=False)[0]
        return (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
