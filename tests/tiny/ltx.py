"""A tiny random LTXPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny.wan import WORDS
from visalign.toybox.build_wan import word_tokenizer

WIDTH = 16


def ltx(folder: Path) -> None:
    """Frames by 4, pixels by 16."""
    shape: dict[str, Any] = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 8}
    shape |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "patch_size": 4}
    shape |= {"spatio_temporal_scaling": (True, True, False, False), "decoder_spatio_temporal_scaling": (True, True, False, False)}
    size: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    tokenizer = word_tokenizer(WORDS)
    text = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, dropout_rate=0.0)
    LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=AutoencoderKLLTXVideo(**shape),
        transformer=LTXVideoTransformer3DModel(**size, cross_attention_dim=WIDTH, caption_channels=WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
    ).save_pretrained(folder)
