"""A tiny random Z-Image pipeline of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny.qwen import qwen_text, qwen_tokenizer

ROLES = "user\nassistant\n"


def z_image(folder: Path, **scheduler: Any) -> Path:
    """A ZImagePipeline with two pixels a latent and the published scheduler's settings, but for what `scheduler` changes."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer([ROLES])
    text_encoder = qwen_text(tokenizer)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[128] * 3,
    )
    torch.manual_seed(1)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # zeros without training
        torch.nn.init.normal_(token)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, scaling_factor=0.36, shift_factor=0.12)
    flow = FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler))
    ZImagePipeline(flow, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder
