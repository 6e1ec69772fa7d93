"""Stable Diffusion XL with 2 × 2 pixels a latent and the published scheduler's settings, but for what `scheduler` changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import text

PUBLISHED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"}


def sdxl(folder: Path, kind: str = "EulerDiscreteScheduler", zeros: bool = True, **scheduler: Any) -> None:
    import diffusers

    tokenizer, encoder = text.clip(width=16)
    tokenizer_2, encoder_2 = text.clip(width=32, projected=True)
    unet: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
    }
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=text.vae(scaling_factor=0.13),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(
            **unet, sample_size=16, cross_attention_dim=16 + 32, projection_class_embeddings_input_dim=32 + 6 * 8
        ),
        scheduler=getattr(diffusers, kind)(**(scheduler if kind.startswith("EDM") else PUBLISHED | scheduler)),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
