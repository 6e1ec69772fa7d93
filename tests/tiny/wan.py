"""Tiny random Wan pipelines: 2.1 and 2.2 from text, 2.1 from a first frame, and the 5B model of 2.2 from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from visalign.toybox.build_wan import CHANNELS, small_text_encoder, small_vae, word_tokenizer

WORDS = ["a", "left", "of", "red", "circles", "ring", "star", "two"]
CLIP = 16


def transformer(**options: Any) -> WanTransformer3DModel:
    """Two blocks of width 24."""
    size: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "freq_dim": 16}
    size |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "rope_max_seq_len": 32, "cross_attn_norm": True}
    return WanTransformer3DModel(**(size | {"text_dim": small_text_encoder(1).config.d_model} | options))


def parts() -> dict[str, Any]:
    """What all of them have, with the published scheduler."""
    tokenizer = word_tokenizer(WORDS)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    text = small_text_encoder(len(tokenizer))
    return {"tokenizer": tokenizer, "text_encoder": text, "vae": small_vae(4), "scheduler": scheduler}


def wan21(folder: Path) -> None:
    WanPipeline(**parts(), transformer=transformer()).save_pretrained(folder)


def wan22(folder: Path) -> None:
    """Two experts."""
    WanPipeline(**parts(), transformer=transformer(), transformer_2=transformer(), boundary_ratio=0.875).save_pretrained(folder)


def wan22_5b(folder: Path) -> None:
    """A time for every token."""
    WanPipeline(**parts(), transformer=transformer(), expand_timesteps=True).save_pretrained(folder)


def wan22_5b_i2v(folder: Path) -> None:
    """A given first frame in the noise's place, with a time of its own."""
    WanImageToVideoPipeline(**parts(), transformer=transformer(), expand_timesteps=True).save_pretrained(folder)


def wan21_i2v(folder: Path) -> None:
    """A first frame, as latents and as CLIP sees it."""
    size: dict[str, Any] = {"hidden_size": CLIP, "intermediate_size": CLIP, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(**size, image_size=16, patch_size=8))
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    shown: dict[str, Any] = {"image_encoder": encoder, "image_processor": processor}
    denoiser = transformer(in_channels=2 * CHANNELS + 2, image_dim=CLIP, added_kv_proj_dim=24)
    WanImageToVideoPipeline(**parts(), **shown, transformer=denoiser).save_pretrained(folder)
