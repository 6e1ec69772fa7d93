"""Tiny random Qwen-Image pipelines, for text to image and for editing, of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny.qwen import PATCH, qwen_tokenizer, qwen_vision

CHANNELS = 4


def parts(levels: int, **scheduler: Any) -> dict[str, Any]:
    """Network, autoencoder and the published scheduler's settings, but for what `scheduler` changes; 2^levels pixels a latent."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    published = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9}
    published |= {"base_image_seq_len": 256, "max_image_seq_len": 8192, "time_shift_type": "exponential", "shift": 1.0}
    torch.manual_seed(0)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**(published | scheduler)),
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1] * (levels + 1),
            num_res_blocks=0,
            temperal_downsample=[False] * levels,
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[0.8, 1.1, 1.3, 0.9],
        ),
        "transformer": QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(2, 2, 4),
        ),
    }


def qwen_image(folder: Path, **scheduler: Any) -> Path:
    """A QwenImagePipeline with two pixels a latent; its tokenizer makes 34 tokens of the prompt template's head, as the real one does."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(**parts(1, **scheduler), text_encoder=None, tokenizer=None)  # pyright: ignore[reportArgumentType]
    tokenizer = qwen_tokenizer([pipeline.prompt_template_encode])
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=qwen_vision(tokenizer))
    pipeline.save_pretrained(folder)
    return folder


def qwen_image_edit(folder: Path, name: str = "QwenImageEditPipeline", **scheduler: Any) -> Path:
    """A QwenImageEditPipeline with 32 pixels a latent: it scales every given picture to a million pixels."""
    import diffusers
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pipeline: Any = getattr(diffusers, name)(**parts(5, **scheduler), **dict.fromkeys(("text_encoder", "tokenizer", "processor")))
    tokenizer = qwen_tokenizer([pipeline.prompt_template_encode])
    pixels = {"patch_size": PATCH, "merge_size": 2}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels))
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=qwen_vision(tokenizer), processor=processor)
    pipeline.save_pretrained(folder)
    return folder


def qwen_image_edit_plus(folder: Path, **scheduler: Any) -> Path:
    """A QwenImageEditPlusPipeline, alike."""
    return qwen_image_edit(folder, "QwenImageEditPlusPipeline", **scheduler)
