"""FLUX.1 dev and schnell: whatever loads as `FluxPipeline`.

Two kinds of guidance: dev was distilled to take one as an input (`distilled_guidance`, one forward), and `policy.guidance` is true
classifier-free guidance on top (two forwards), which leads away from the negative prompt. The grid's shift follows the picture's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.paths import Flow
from visalign.pipeline_family import PipelineFamily, shifted_grid


def tokens(latents: Tensor) -> Tensor:
    """(N, C, H, W) latents to (N, H/2·W/2, 4C) tokens of 2 × 2."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def positions(height: int, width: int, picture: int, device: torch.device) -> Tensor:
    """(height·width, 3) of tokens in reading order: number of the picture, row, column."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in (height, width))
    return F.pad(torch.cartesian_prod(rows, columns), (1, 0), value=picture)


class Flux(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side, a multiple of 16; None takes the pipeline's own.
    negative_prompt: what guidance leads away from.
    distilled_guidance: what the transformer takes as an input, where it takes one.
    max_sequence_length: T5 tokens; text beyond it is cut, with a warning by diffusers.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`), and schnell does.
    """

    pipeline_classes = ("FluxPipeline",)
    lora_targets = tuple(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    output_layer = "proj_out"
    patch = 2

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        negative_prompt: str = "",
        distilled_guidance: float = 3.5,
        max_sequence_length: int = 512,
        step_distilled: bool | None = None,
    ):
        super().__init__(pipeline, resolution, negative_prompt, step_distilled)
        self.path, self.distilled_guidance, self.max_sequence_length = Flow(), distilled_guidance, max_sequence_length

    def shape(self, side: int | None) -> tuple[int, ...]:
        channels, *sides = super().shape(side)
        return (channels // self.patch**2, *sides)

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        del pictures
        sequence, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts, prompt_2=None, device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return {"sequence": sequence, "pooled": pooled}

    def grid(self, steps: int) -> Tensor:
        return shifted_grid(self.pipeline.scheduler, steps, self.latent_shape[1] * self.latent_shape[2] // self.patch**2)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        dtype, (height, width) = self.denoiser.dtype, (side // self.patch for side in x.shape[-2:])
        shown, given = tokens(x.to(dtype)), self.shown(condition)
        places = [positions(height, width, number, x.device) for number in range(1 + len(given))]
        said = network(
            hidden_states=torch.cat([shown, *given], 1),
            timestep=(sigma * 1000).to(dtype) / 1000,  # rounded as the pipeline rounds it
            guidance=torch.full_like(sigma, self.distilled_guidance) if self.denoiser.config.guidance_embeds else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["sequence"],
            txt_ids=torch.zeros(condition["sequence"].shape[1], 3, device=x.device),
            img_ids=torch.cat(places),
            return_dict=False,
        )[0][:, : shown.shape[1]]
        return F.pixel_shuffle(said.transpose(1, 2).unflatten(2, (height, width)), self.patch)

    def shown(self, condition: dict[str, Tensor]) -> list[Tensor]:
        """(N, tokens, 4C) of further pictures of the picture's own size, of which this family has none."""
        del condition
        return []

    def pack(self, latents: Tensor) -> Tensor:
        return tokens(latents)

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "negative_prompt": [self.negative_prompt] * len(texts),
            "true_cfg_scale": guidance,
            "guidance_scale": self.distilled_guidance,
            "max_sequence_length": self.max_sequence_length,
        }
