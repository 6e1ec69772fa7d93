"""Tiny random Sana pipelines of the real classes: the flow model and its one-step student."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import WORDS


def gemma_tokenizer(texts: list[str]) -> Any:
    """Gemma's byte-pair tokenizer that knows every word of `texts` and of `WORDS`, with the space before it, as one token."""
    from transformers import GemmaTokenizer

    words = [f"▁{word}" for text in (*texts, *WORDS) for word in text.split()]
    letters = ["▁", *sorted({letter for text in (*texts, *map(chr, range(33, 127))) for letter in text} - {" "})]
    starts = list(dict.fromkeys(word[:n] for word in words for n in range(2, len(word) + 1)))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *starts]
    merges: Any = [(start[:-1], start[-1]) for start in starts]
    return GemmaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges)


def parts(kind: Any, **transformer: Any) -> dict[str, Any]:
    """All but the scheduler; four pixels a latent."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma_tokenizer(inspect.signature(kind.__call__).parameters["complex_human_instruction"].default)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    stages = {f"{coder}_{name}": value for coder in ("encoder", "decoder") for name, value in STAGES.items()}
    return {
        "tokenizer": tokenizer,
        "text_encoder": Gemma2Model(Gemma2Config(**text, vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.1)).eval(),
        "vae": AutoencoderDC(latent_channels=4, scaling_factor=0.41, **stages),
        "transformer": SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
            **transformer,
        ),
    }


STAGES = {"block_out_channels": (8, 8, 16), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}


def sana(folder: Path, **scheduler: Any) -> Path:
    """A SanaPipeline with the published scheduler's settings, but for what `scheduler` changes."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    published = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    SanaPipeline(**parts(SanaPipeline), scheduler=DPMSolverMultistepScheduler(**(published | scheduler))).save_pretrained(folder)
    return folder


def sana_sprint(folder: Path) -> Path:
    """A SanaSprintPipeline: a student on the trigonometric path that takes its guidance as an input."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    student = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    scheduler: Any = SCMScheduler(sigma_data=0.5)
    SanaSprintPipeline(**parts(SanaSprintPipeline, **student), scheduler=scheduler).save_pretrained(folder)
    return folder
