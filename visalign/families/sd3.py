"""Stable Diffusion 3 and 3.5, and the toybox: whatever loads as `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline, calculate_shift
from torch import Tensor, nn

from visalign.paths import Flow
from visalign.policy import Family
from visalign.preprocess import Preprocess
from visalign.rollout import Condition


@contextmanager
def quiet() -> Iterator[None]:
    """No bars for the loading of weights; downloads keep theirs."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.enable_progress_bar()


class SD3(Family):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side; None takes the transformer's own.
    max_sequence_length: T5 tokens; text beyond it is cut, with a warning by diffusers.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    lora_targets = tuple(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    output_layer = "proj_out"

    def __init__(self, pipeline: StableDiffusion3Pipeline, resolution: int | None = None, max_sequence_length: int = 256):
        pipe: Any = pipeline
        self.pipeline, self.max_sequence_length = pipe, max_sequence_length
        self.network: nn.Module = pipe.transformer
        self.path = Flow()
        side = resolution // pipe.vae_scale_factor if resolution else pipe.transformer.config.sample_size
        self.latent_shape = (pipe.transformer.config.in_channels, side, side)
        pipe.set_progress_bar_config(disable=True)
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        self._negative: dict[str, Tensor] | None = None

    @classmethod
    def load(cls, source: str, dtype: torch.dtype = torch.float32, **options: Any) -> SD3:
        """From a folder or a hub id."""
        with quiet():
            pipeline = StableDiffusion3Pipeline.from_pretrained(source, dtype=dtype)
        return cls(pipeline, **options)

    def modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Condition:
        unique = list(dict.fromkeys(texts))
        row = {text: n for n, text in enumerate(unique)}
        if self._negative is None:
            self._negative = self._embed([""])
        return Condition(torch.tensor([row[text] for text in texts]), self._embed(unique), self._negative)

    def _embed(self, texts: list[str]) -> dict[str, Tensor]:
        sequence, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=next(self.pipeline.text_encoder.parameters()).device,
        )
        return {"sequence": sequence, "pooled": pooled}

    def grid(self, steps: int) -> Tensor:
        scheduler, extra = self.pipeline.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting", None):
            patch = self.pipeline.transformer.config.patch_size
            tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            extra["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(steps, **extra)
        return scheduler.sigmas.float().cpu()

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        dtype = self.pipeline.transformer.dtype
        return network(
            hidden_states=x.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=condition["sequence"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        pixels = Preprocess((height, width), (0.5,) * 3, (0.5,) * 3)(images)  # to [-1, 1]
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()  # the mean: no noise that a resumed run would have to repeat
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float) -> Tensor:
        side = [n * self.pipeline.vae_scale_factor for n in self.latent_shape[1:]]
        return self.pipeline(
            prompt=list(texts),
            height=side[0],
            width=side[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(self.pipeline.transformer.dtype),
            max_sequence_length=self.max_sequence_length,
            output_type="pt",
        ).images

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        # Without the metadata, stock diffusers takes alpha = rank.
        metadata = self.pipeline.transformer.peft_config["default"].to_dict()
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=metadata, safe_serialization=True
        )

    def save(self, folder: FilePath) -> None:
        self.pipeline.save_pretrained(folder, safe_serialization=True)
