"""Stable Diffusion XL, its Turbo and Lightning students: whatever loads as `StableDiffusionXLPipeline`.

Variance-preserving. Euler's step of the noise level σ = √(1/ᾱ - 1), which these checkpoints come with, is DDIM's of ᾱ on the same times
with clean data at the end, so their scheduler is replaced by that: equal for `leading` times; for `trailing` ones (Turbo, Lightning), Euler
starts from noise of std √(1-ᾱ) instead of 1, here 0.998. Euler ancestral is the same without its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import VariancePreserving
from visalign.pipeline_family import PREDICTIONS, PipelineFamily, as_ddim, ddim_grid


class SDXL(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied, its scheduler replaced by DDIM's and its watermark taken out.
    resolution: pixels per side; None takes the U-Net's own.
    negative_prompt: what guidance leads away from; an empty one is zeros, where the pipeline's config says so (the base model's does).
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).

    Raises:
        UserError: a scheduler that `as_ddim` refuses, or a U-Net that takes its guidance as an input.
    """

    pipeline_classes = ("StableDiffusionXLPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    component = "unet"

    def __init__(self, pipeline: Any, resolution: int | None = None, negative_prompt: str = "", step_distilled: bool | None = None):
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise UserError("the model's U-Net takes guidance as an input (time_cond_proj_dim); such students can't be guided here")
        ends = {} if isinstance(pipeline.scheduler, DDIMScheduler) else {"set_alpha_to_one": True}
        scheduler = as_ddim(pipeline.scheduler, **ends)
        pipeline.register_modules(scheduler=scheduler)
        pipeline.watermark = None
        super().__init__(pipeline, resolution, negative_prompt, step_distilled)
        self._widen()
        self.path = VariancePreserving(scheduler.alphas_cumprod, PREDICTIONS[scheduler.config.prediction_type])

    @property
    def _negative_words(self) -> str | None:
        """The negative prompt as the pipeline's argument: None asks for zeros."""
        return self.negative_prompt or (None if self.pipeline.config.force_zeros_for_empty_prompt else "")

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        del pictures
        device = self.pipeline.text_encoder_2.device
        text, _, pooled, _ = self.pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
        size = (self.size["height"], self.size["width"])
        sizes = torch.tensor([*size, 0, 0, *size], device=device, dtype=text.dtype)  # original, of the crop's corner, target
        return {"text": text, "pooled": pooled, "sizes": sizes.expand(len(texts), -1)}

    def unconditional(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        if self._negative is None:
            self._negative = self.embed([self.negative_prompt], [None])
            if self._negative_words is None:
                self._negative |= {name: torch.zeros_like(self._negative[name]) for name in ("text", "pooled")}
        return self._negative

    def grid(self, steps: int) -> Tensor:
        return ddim_grid(self.pipeline.scheduler, steps)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
        text = condition["text"]
        return network(x.to(self.denoiser.dtype), sigma, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        if self.pipeline.vae.dtype != self.denoiser.dtype:
            self.pipeline.vae.to(self.denoiser.dtype)  # the pipeline widens it itself, and back
        images = super().stock(texts, noise, steps, guidance, metadata)
        self._widen()
        return images

    # --- latents -------------------------------------------------------------------------------------------------------

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std (C, 1, 1) of latents, where the VAE's config has them."""
        config = self.pipeline.vae.config
        found = [config.get(name) for name in ("latents_mean", "latents_std")]
        mean, std = ([0.0], [1.0]) if None in found else found
        return torch.tensor(mean).to(like)[:, None, None], torch.tensor(std).to(like)[:, None, None] / config.scaling_factor

    def _widen(self) -> None:
        """The VAE overflows in float16, unless its config says that it doesn't."""
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        words = self._negative_words
        return {"guidance_scale": guidance, "negative_prompt": None if words is None else [words] * len(texts)}
