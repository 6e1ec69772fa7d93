"""FLUX.2 dev and klein: whatever loads as `Flux2Pipeline` or `Flux2KleinPipeline`.

Latents are what the pipelines keep: the VAE's in patches of 2 × 2, normalised by its running statistics. dev takes its guidance as an input
(`distilled_guidance`) and has no unconditional half; klein has one, unless its config says that it was distilled to few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.paths import Flow
from visalign.pipeline_family import PipelineFamily, flow_grid

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj")


class Flux2(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side, a multiple of 16; None takes the pipeline's own.
    negative_prompt: what guidance leads away from; the stock klein always takes an empty one.
    distilled_guidance: what the transformer takes as an input, where it takes one.
    max_sequence_length: tokens of the prompt in its template.
    step_distilled: whether it draws in few steps; None goes by its config (klein) and its name (`policy.DISTILLED`).
    """

    pipeline_classes = ("Flux2Pipeline", "Flux2KleinPipeline")
    lora_targets = tuple(f"attn.{name}" for name in ATTENTION)
    output_layer = "proj_out"

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        negative_prompt: str = "",
        distilled_guidance: float = 4.0,
        max_sequence_length: int = 512,
        step_distilled: bool | None = None,
    ):
        config = pipeline.config
        few = config.get("is_distilled", False)
        self.guided = "is_distilled" in config and not few
        super().__init__(pipeline, resolution, negative_prompt, True if few and step_distilled is None else step_distilled)
        self.path, self.distilled_guidance, self.max_sequence_length = Flow(), distilled_guidance, max_sequence_length

    @property
    def stride(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def shape(self, side: int | None) -> tuple[int, ...]:
        return super().shape(side or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        del pictures
        device, length = self.pipeline.text_encoder.device, self.max_sequence_length
        return {"sequence": self.pipeline.encode_prompt(texts, device=device, max_sequence_length=length)[0]}

    def unconditional(self, pictures: Sequence[Any]) -> dict[str, Tensor] | None:
        return super().unconditional(pictures) if self.guided else None

    def grid(self, steps: int) -> Tensor:
        mu = compute_empirical_mu(self.latent_shape[1] * self.latent_shape[2], steps)
        return flow_grid(self.pipeline.scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        dtype, text, (height, width) = self.denoiser.dtype, condition["sequence"], x.shape[-2:]
        one, rows, columns, words = (torch.arange(n, device=x.device) for n in (1, height, width, text.shape[1]))
        said = network(
            hidden_states=x.to(dtype).flatten(2).transpose(1, 2),
            timestep=(sigma * 1000).to(dtype) / 1000,  # rounded as the pipeline rounds it
            guidance=torch.full_like(sigma, self.distilled_guidance) if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=text.to(dtype),
            txt_ids=torch.cartesian_prod(one, one, one, words).expand(len(x), -1, -1),  # time, row, column, word
            img_ids=torch.cartesian_prod(one, rows, columns, one).expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return said.transpose(1, 2).unflatten(2, (height, width))

    # --- latents -------------------------------------------------------------------------------------------------------

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std (C, 1, 1) of the VAE's latents."""
        vae = self.pipeline.vae
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return mean.to(like)[:, None, None], std.to(like)[:, None, None]

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return F.pixel_shuffle(latents * std + mean, 2)

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (F.pixel_unshuffle(latents, 2) - mean) / std

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        length = {"max_sequence_length": self.max_sequence_length}
        if not self.guided:
            return {"guidance_scale": self.distilled_guidance} | length
        negative = self.embed([self.negative_prompt], [None])["sequence"].expand(len(texts), -1, -1)
        return {"guidance_scale": guidance, "negative_prompt_embeds": negative} | length
