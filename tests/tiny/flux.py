"""FLUX.1 with 2 × 2 pixels a latent, as dev (guidance is an input), schnell or Kontext."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import text


def flux(folder: Path, kind: str = "FluxPipeline", guided: bool = True, **scheduler: Any) -> None:
    import diffusers

    tokenizer, encoder = text.clip(width=16)
    tokenizer_2, encoder_2 = text.t5(width=32)
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    shift = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 64, "max_image_seq_len": 256}
    pipeline = getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**(shift | scheduler)),
        vae=text.vae(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guided, **size
        ),
    )
    pipeline.save_pretrained(folder)


def kontext(folder: Path) -> None:
    flux(folder, "FluxKontextPipeline")
