"""ImageReward: a BLIP that reads the prompt while it looks at the picture, fine-tuned on rankings by people.

Differs from the published code: transformers' own BLIP under converted names, gradients to the picture, prompts that are too long reported
instead of silently cut, and the head's five linear layers, which have no activation between them, kept as the one affine map that they are.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.preprocess import Aspect, Preprocess, checked_aspect
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.weights import collapsed, fetch, load_weights, read_weights, renamed

TOKENS = 35  # of a prompt, begin and end included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, as published
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PUBLISHED = {  # BlipConfig of the published weights
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {"num_attention_heads": 12, "encoder_hidden_size": 1024},
}
RULES = [  # the original BLIP's names to those of `Blip`
    (r"^blip\.(vision_proj|text_proj)\..*|.*\.position_ids$", ""),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
]


class Blip(nn.Module):
    """Picture and text to one number. `config` is a transformers BlipConfig."""

    def __init__(self, config: Any):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.config = config
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = nn.Linear(config.text_config.hidden_size, 1)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, 3, H, W), (N, L) and (N, L) to (N,) raw scores: the head on the first token, which has attended to all patches."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (states[:, 0].float() * self.head.weight).sum(-1) + self.head.bias


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names of `Blip`; weights that have these names already stay as they are."""
    found = renamed(state, RULES)
    layers = {name: found.pop(name) for name in list(found) if name.startswith("mlp.")}
    if layers:
        found["head.weight"], found["head.bias"] = collapsed(layers)
    return found


class ImageReward(Reward):
    """(MLP(BLIP(image, prompt)) - mean) / std, differentiable (Xu et al. 2023, arXiv 2304.05977, section 3; mean and std from its code).

    Scores lie around -2.3 to 2, with mean 0 and std 1 on the authors' data.

    Args:
        checkpoint: the default hub id; a file `ImageReward.pt` or a folder with it; or a folder that `save` wrote.
        tokenizer: BERT's, a folder or hub id; None means the folder that `save` wrote, or else the published one.
        aspect: "crop" as published, "letterbox" or "stretch" for pictures that are not square.

    Raises:
        UserError: a bad option, or a checkpoint that cannot be loaded or doesn't fit.
    """

    spec = RewardSpec(
        name="image_reward",
        differentiable=True,
        needs=frozenset({"prompt"}),
        licence="Apache-2.0",
        model_id="THUDM/ImageReward",
    )
    tokenizer_id = "google-bert/bert-base-uncased"

    def __init__(self, checkpoint: str = spec.model_id, tokenizer: str | None = None, aspect: Aspect | None = None):
        from transformers import AutoTokenizer, BlipConfig

        self.aspect: Aspect | None = checked_aspect(aspect)
        path = fetch(checkpoint, "model.safetensors", "ImageReward.pt")
        own = path.name == "model.safetensors" and path.with_name("config.json").is_file()
        config: Any = BlipConfig.from_pretrained(path.parent) if own else BlipConfig(**PUBLISHED)
        self.model = Blip(config).eval().requires_grad_(False)
        load_weights(self.model, converted(read_weights(path)), f"image_reward's checkpoint {checkpoint!r}")
        source = tokenizer or (str(path.parent) if path.with_name("tokenizer_config.json").is_file() else self.tokenizer_id)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"image_reward: no tokenizer at {source!r} ({' '.join(str(error).split())[:120]})") from None
        side = config.vision_config.image_size
        self.preprocess = Preprocess((side, side), PIXEL_MEAN, PIXEL_STD)
        self._cut: set[str] = set()

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32."""
        parameter = self.model.head.weight
        ids, mask = (tensor.to(parameter.device) for tensor in self._tokens(batch.prompts))
        with torch.autocast(parameter.device.type, enabled=False):
            raw = self.model(self.preprocess(batch.images.to(parameter.device), self.aspect), ids, mask)
        return RewardOutput.of((raw - MEAN) / STD)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors` and the tokenizer: a folder that loads without conversion and without the hub."""
        from safetensors.torch import save_file

        self.tokenizer.save_pretrained(folder)
        self.model.config.save_pretrained(folder)
        save_file({name: value.contiguous().cpu() for name, value in self.model.state_dict().items()}, Path(folder) / "model.safetensors")

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (N, 35) each; a prompt that is cut is reported once."""
        lengths = [len(ids) for ids in self.tokenizer(prompts).input_ids]
        cut = {prompt for prompt, length in zip(prompts, lengths, strict=True) if length > TOKENS} - self._cut
        if cut:
            self._cut |= cut
            warnings.warn(f"image_reward: {len(cut)} of {len(prompts)} prompts are longer than {TOKENS} tokens and were cut", stacklevel=3)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return tokens.input_ids, tokens.attention_mask
