"""FLUX.2 with 2 × 2 pixels a latent: dev (Mistral 3) and klein (Qwen 3). Their text encoders have the layers that the pipelines read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import text

SIZE: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
SIZE |= {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32}


def parts(width: int, guided: bool) -> dict[str, Any]:
    """What dev and klein share; `width` of three layers of the text encoder together."""
    import diffusers

    vae = text.vae("AutoencoderKLFlux2")
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(**SIZE, in_channels=16, joint_attention_dim=width, guidance_embeds=guided)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def dev(folder: Path) -> None:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    special = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = text.words(special, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    template = "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=8, chat_template=template)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "head_dim": 8}
    language = {"num_hidden_layers": 30, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "model_type": "mistral"}
    vision = {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8, "model_type": "pixtral"}
    config = Mistral3Config(text_config=tower | language, vision_config=tower | vision, image_token_id=special.index("[IMG]"))
    encoder = Mistral3ForConditionalGeneration(config)
    Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **parts(3 * 8, True)).save_pretrained(folder)


def klein(folder: Path, distilled: bool = False) -> None:
    from diffusers import Flux2KleinPipeline

    tokenizer, encoder = text.qwen3(27, 8)
    pipeline = Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=distilled, **parts(3 * 8, False))
    pipeline.save_pretrained(folder)
