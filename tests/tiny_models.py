"""Tiny random models of the real classes, saved as the published checkpoints are: their file names, their tensor names."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = [
    "a",
    "and",
    "of",
    "the",
    "left",
    "right",
    "above",
    "below",
    "red",
    "blue",
    "green",
    "black",
    "yellow",
    "star",
    "circle",
    "circles",
    "ring",
    "cross",
    "square",
    "triangle",
    "two",
]
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PATCH = 56  # pixels; four times the real one, so that a picture has few tokens


def affine_layers(widths: tuple[int, ...], numbers: tuple[int, ...], prefix: str) -> dict[str, Tensor]:
    """Random linear layers under the numbers that they have between dropouts: `{prefix}N.weight`, `{prefix}N.bias`."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for number, (width, out) in zip(numbers, pairwise(widths), strict=True):
        state[f"{prefix}{number}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(out, generator=generator) / 4
    return state


def aesthetic_head(file: Path, width: int) -> str:
    """The published layout of the aesthetic predictor, narrower."""
    torch.save(affine_layers((width, 32, 16, 8, 4, 1), (0, 2, 4, 6, 7), "layers."), file)
    return str(file)


def blip_names(name: str) -> str:
    """A name in transformers' BLIP as the original BLIP's, written down by hand."""
    part, _, rest = name.partition(".")
    if part == "text":
        return f"blip.text_encoder.{rest}"
    fixed = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    }
    if rest in fixed:
        return f"blip.visual_encoder.{fixed[rest]}"
    _, _, number, *inner = rest.split(".")
    old = {"self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    module, kind = ".".join(inner[:-1]), inner[-1]
    return f"blip.visual_encoder.blocks.{number}.{old.get(module, module)}.{kind}"


def blip(folder: Path) -> str:
    """A BLIP under the original names with ImageReward's head, as `ImageReward.pt`'s tensors are, and BERT's tokenizer."""
    from safetensors.torch import save_file
    from transformers import BertTokenizer, BlipConfig

    from visalign.rewards.image_reward import Blip

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    text = tower | {"vocab_size": len(special) + len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 40}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    state = {blip_names(name): value for name, value in Blip(config).state_dict().items() if not name.startswith("head.")}
    state |= affine_layers((32, 24, 16, 8, 4, 1), (0, 2, 4, 6, 7), "mlp.layers.")
    state |= {"blip.vision_proj.weight": torch.zeros(4, 32), "blip.text_encoder.embeddings.position_ids": torch.arange(40).unsqueeze(0)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    BertTokenizer({word: n for n, word in enumerate([*special, *WORDS])}).save_pretrained(folder)
    return str(folder)


def qwen_config(vocabulary: int, image: int, video: int) -> Any:
    from transformers import Qwen2VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": QWEN_PATCH}
    return Qwen2VLConfig(
        text_config=text | tokens | {"rope_parameters": rope, "initializer_range": 0.1},
        vision_config=vision | {"initializer_range": 0.02},
        image_token_id=image,
        video_token_id=video,
    )


def qwen(folder: Path, added: int) -> Any:
    """A Qwen2-VL with `added` embeddings for tokens that its tokenizer doesn't know yet; its processor is in the folder, it is returned."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    vocabulary = {"<|endoftext|>": 0} | {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()), 1)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(QWEN_TOKENS))
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    config = qwen_config(len(tokenizer) + added, image, video)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=QWEN_PATCH).save_pretrained(folder)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).eval()


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `Qwen2VLForConditionalGeneration` under the names of the versions that the reward models were trained with."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        old = name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)
        found[old] = value.clone()
    return found


def hps3(folder: Path) -> str:
    """HPSv3's layout: one safetensors file with the whole model, head included, and the language model's unused output layer."""
    from safetensors.torch import save_file

    from visalign.rewards.hps3 import TEMPLATE, head

    state = published_names(qwen(folder, 1).state_dict())
    state |= {f"rm_head.{name}": value.clone() for name, value in head(32).state_dict().items()}
    state["rm_head.5.weight"] *= 4  # so that scores differ by more than rounding
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


def video_reward(folder: Path) -> str:
    """VideoReward's model with its low-rank updates merged."""
    from safetensors.torch import save_file

    from visalign.rewards.video_reward import TEMPLATE

    state = published_names(qwen(folder, 3).state_dict())
    save_file(state | {"rm_head.weight": torch.randn(1, 32) / 8}, folder / "model.safetensors")
    (folder / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


def clip_tokenizer(length: int) -> Any:
    """CLIP's byte-pair tokenizer with each word as one token and letters for the rest; the end token has the highest id."""
    import tempfile

    from transformers import CLIPTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,")
    words = [word for word in WORDS if word not in letters]
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(w + "</w>" for w in words), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def sd15(folder: Path, **scheduler: Any) -> Path:
    """A StableDiffusionPipeline of 32 × 32 pictures with the published scheduler's settings, but for what `scheduler` changes."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(16)
    size = len(tokenizer)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    tokens = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    torch.manual_seed(0)
    unet: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
    }
    vae: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**blocks, **vae, latent_channels=4, shift_factor=0.12),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **tokens)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**blocks, **unet, sample_size=16, cross_attention_dim=16),
        scheduler=DDIMScheduler(**(published | {"steps_offset": 1, "clip_sample": False} | scheduler)),
        **parts,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def controlnet(folder: Path, base: Path) -> Path:
    """A ControlNet for `sd15`'s U-Net, with random weights in place of the zeros that it starts from."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
