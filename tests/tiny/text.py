"""Tiny tokenizers, text encoders and VAEs of the real classes."""

from __future__ import annotations

from typing import Any

from tests.tiny_models import WORDS, clip_tokenizer


def clip(length: int = 16, width: int = 16, projected: bool = False) -> tuple[Any, Any]:
    """CLIP's tokenizer and text encoder, with its projection to the same width on request."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(length)
    size = len(tokenizer)
    tower = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": width}
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    config = CLIPTextConfig(**tower, **ids, max_position_embeddings=length)
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def words(special: list[str], **names: str) -> Any:
    """A tokenizer of whole words with special tokens first; `names` says which of them is what, e.g. pad_token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def t5(width: int = 16, encoder: str = "T5EncoderModel", config: str = "T5Config") -> tuple[Any, Any]:
    """A tokenizer that ends and pads as T5's, and T5's encoder, or UMT5's."""
    import transformers
    from tokenizers import processors

    tokenizer = words(["<pad>", "</s>", "<unk>"], pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    size = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    return tokenizer, getattr(transformers, encoder)(getattr(transformers, config)(**size))


def qwen_tokenizer() -> Any:
    """Qwen's byte tokenizer with a token for each byte and the turns of its chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {"<|endoftext|>": 0} | {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()), 1)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    turn = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return tokenizer


def qwen3(layers: int, width: int = 16) -> tuple[Any, Any]:
    """Qwen3's tokenizer and language model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    size = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "head_dim": 8}
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**size, num_key_value_heads=1, vocab_size=len(tokenizer)))


def vae(kind: str = "AutoencoderKL", channels: int = 4, **config: Any) -> Any:
    """A VAE of two blocks, which halves each side."""
    import diffusers

    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": channels}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return getattr(diffusers, kind)(**sizes, **blocks, **config)
