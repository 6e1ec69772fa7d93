"""Tiny Qwen language models and their tokenizers, as the text encoders of image pipelines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tests.tiny_models import QWEN_TOKENS, WORDS

CHAT = (  # what Qwen's own template comes to for one message of the user
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}
TEXT = SIZE | {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"image_token": "image_pad", "video_token": "video_pad", "vision_start_token": "vision_start", "vision_end_token": "vision_end"}
PATCH = 56  # pixels; four times the real one, so that a picture has few tokens


def qwen_tokenizer(texts: Sequence[str]) -> Any:
    """Qwen's byte-pair tokenizer that knows every word of `texts` and of `WORDS` as one token, as the real one knows common words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    split: Any = Qwen2Tokenizer(vocab={token: n for n, token in enumerate(letters)}, merges=[])
    plain = [part for text in (*texts, *(f" {word}" for word in WORDS), *WORDS) for part in re.split(r"<\|\w+\|>|\{\}", text)]
    words = [word for part in plain for word, _ in split.backend_tokenizer.pre_tokenizer.pre_tokenize_str(part)]
    starts = list(dict.fromkeys(word[:n] for word in words for n in range(2, len(word) + 1)))
    vocabulary = {token: n for n, token in enumerate([*letters, *starts])}
    merges = [(start[:-1], start[-1]) for start in starts]
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=list(QWEN_TOKENS), chat_template=CHAT)


def qwen_text(tokenizer: Any) -> Any:
    """A Qwen3 without head, as Z-Image's text encoder."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    return Qwen3Model(Qwen3Config(**TEXT, vocab_size=len(tokenizer), num_hidden_layers=3, head_dim=8)).eval()


def qwen_vision(tokenizer: Any) -> Any:
    """A Qwen2.5-VL, as Qwen-Image's text encoder."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = TEXT | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    vision = SIZE | {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    numbers = {f"{name}_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in VISION.items()}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | {"patch_size": PATCH, "window_size": 4 * PATCH},
        **numbers,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
