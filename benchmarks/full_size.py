"""Rewards in their published size with random weights, which time and memory don't tell from trained ones.

The prompts' tokenizers are small: they make other tokens than the real ones, of about the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from visalign import registry
from visalign.features import load_dual_encoder
from visalign.heads import PreferenceHead
from visalign.rewards.geneval import CLASSES
from visalign.rewards.image_reward import PUBLISHED, Blip

CLIP_LARGE: dict[str, Any] = {  # ViT-L/14
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
}
QWEN: dict[str, Any] = {  # Qwen2-VL of 2 billion parameters
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151660,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
}
SWIN = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
VISION_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def clip_large(folder: Path) -> str:
    """A CLIP ViT-L/14."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    CLIPModel(CLIPConfig(**CLIP_LARGE)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    AutoTokenizer.from_pretrained(registry.asset("toybox/clip")).save_pretrained(folder)
    return str(folder)


def aesthetic(folder: Path) -> dict[str, Any]:
    head = folder / "head"
    head.mkdir()
    save_file({name: value.data for name, value in nn.Linear(768, 1).named_parameters()}, head / "model.safetensors")
    return {"checkpoint": clip_large(folder / "clip"), "head": str(head)}


def image_reward(folder: Path) -> dict[str, Any]:
    from transformers import BertTokenizer, BlipConfig

    config = BlipConfig(**PUBLISHED)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    BertTokenizer({word: n for n, word in enumerate(words)}).save_pretrained(folder)
    config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in Blip(config).state_dict().items()}, folder / "model.safetensors")
    return {"checkpoint": str(folder)}


def video_reward(folder: Path) -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

    from visalign.rewards.video_reward import TEMPLATE

    letters = {"<|endoftext|>": 0} | {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()), 1)}
    tokenizer: Any = Qwen2Tokenizer(vocab=letters, merges=[], extra_special_tokens=list(VISION_TOKENS))
    image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS[-2:]))
    config = Qwen2VLConfig(**QWEN, image_token_id=image, video_token_id=video)
    with torch.device("meta"):
        shapes = Qwen2VLModel(config).state_dict()
    weights = {name: 0.02 * torch.randn(value.shape, dtype=torch.bfloat16) for name, value in shapes.items()}
    for part in (tokenizer, Qwen2VLImageProcessor(), config):
        part.save_pretrained(folder)
    save_file(weights | {"rm_head.weight": torch.randn(1, 1536) / 40}, folder / "model.safetensors")
    (folder / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    return {"checkpoint": str(folder)}


def geneval(folder: Path) -> dict[str, Any]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

    backbone = SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=len(CLASSES))
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    Mask2FormerImageProcessor().save_pretrained(folder / "detector")
    return {"checkpoint": str(folder / "detector"), "color_checkpoint": clip_large(folder / "clip")}


def preference(folder: Path) -> dict[str, Any]:
    """On the toybox's encoder, as `benchmarks.reward_model` trains it."""
    PreferenceHead("toybox/clip", load_dual_encoder("toybox/clip").encode_texts([""]).shape[1]).save(folder)
    return {"checkpoint": str(folder)}


BUILDERS: dict[str, Callable[[Path], dict[str, Any]]] = {  # reward -> what makes its weights and says its options
    "aesthetic": aesthetic,
    "geneval": geneval,
    "image_reward": image_reward,
    "ocr": lambda folder: {},
    "preference": preference,
    "video_reward": video_reward,
}
