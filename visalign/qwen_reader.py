"""A frozen Qwen2-VL that reads an instruction about a picture or video; reward heads look at its states at special tokens.

As in the reward models that are built this way (HPSv3, VideoReward), text positions count through the picture's tokens: the published code
runs the language model without Qwen2-VL's three-dimensional positions, and the weights were trained so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.qwen_pixels import QwenPixels
from visalign.weights import fitting, load_weights, renamed

Precision = Literal["fp32", "bf16", "fp16"]
HEAD = "rm_head."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{media}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
RULES = [  # names of all versions of transformers, with and without PEFT's prefix, to those of `Qwen2VLModel`; the head's stay
    (r"^base_model\.model\.", ""),
    (r"\.modules_to_save\.default\.|\.original_module\.", "."),
    (r"^lm_head\..*", ""),
    (r"^model\.(visual|language_model)\.", r"\1."),
    (r"^model\.", "language_model."),
]


def merged(state: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Weights with PEFT's low-rank updates added, W + scale · B A; a state dict without updates stays as it is.

    Raises:
        UserError: there are updates, and no scale.
    """
    if scale is None and any(".lora_" in name for name in state):
        raise UserError("weights with low-rank updates need the scale of these: expected lora_r and lora_alpha in model_config.json")
    found = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_A." in name:
            target = name.partition(".lora_A.")[0] + ".weight"
            update = state[name.replace(".lora_A.", ".lora_B.")].float() @ down.float()
            found[target] = (found[target].float() + (scale or 0) * update).to(found[target].dtype)
    return found


def converted(state: Mapping[str, Tensor], scale: float | None = None) -> dict[str, Tensor]:
    """Published weights under the names of `Qwen2VLModel`, beside `rm_head.*`; `scale` is that of low-rank updates, alpha / rank."""
    return renamed(merged(state, scale), RULES)


def load_template(path: str | None, folder: Path, own: str, needs: Sequence[str], where: str) -> str:
    """The instruction that a checkpoint was trained with: `path`, else `folder`'s `template.txt`, else our `own` words, with a warning.

    Raises:
        UserError: the file is missing, or doesn't hold each of `needs` once.
    """
    file = Path(path).expanduser() if path else folder / "template.txt"
    if path and not file.is_file():
        raise UserError(f"{where}: no template at {path!r}; expected a text file")
    if not file.is_file():
        warnings.warn(
            f"{where}: there is no template.txt beside the weights, so the instruction is in visalign's own words; scores are not the "
            "published ones until the option template names a file with the instruction of the training",
            stacklevel=3,
        )
        return own
    text = file.read_text(encoding="utf-8")
    wrong = [word for word in needs if text.count(word) != 1]
    if wrong:
        raise UserError(f"{where}: template {str(file)!r} must have {' and '.join(wrong)} exactly once")
    return text


class QwenReader(nn.Module):
    """A head's outputs at special tokens of an instruction about a picture or video.

    Args:
        base: folder or hub id with config, tokenizer and picture processor.
        weights: published weights, as `converted` gives them.
        tokens: special tokens that the weights know beyond the base's own, in the order in which they were added.
        head: width of the language model -> the module that the weights call `rm_head`; it computes in float32.
        min_pixels, max_pixels: bounds of a frame's area.
        dtype: of the frozen backbone.
        where: for messages.

    Raises:
        UserError: the base cannot be loaded, or the weights don't fit it.
    """

    def __init__(
        self,
        base: str,
        weights: Mapping[str, Tensor],
        tokens: Sequence[str],
        head: Callable[[int], nn.Module],
        min_pixels: int,
        max_pixels: int,
        dtype: Precision,
        where: str,
    ):
        from transformers import AddedToken, AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLModel

        super().__init__()
        try:
            config: Any = AutoConfig.from_pretrained(base)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
            self.pixels = QwenPixels.of(AutoImageProcessor.from_pretrained(base), min_pixels, max_pixels)
            text = config.text_config
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{where}: {base!r} has no Qwen2-VL config, tokenizer and processor: {reason}") from None
        self.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        self.token_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(tokens))
        backbone = {name: value for name, value in weights.items() if not name.startswith(HEAD)}
        text.vocab_size = len(backbone.get("language_model.embed_tokens.weight", ()))
        if max(self.token_ids) >= text.vocab_size:
            raise UserError(f"{where} has no embeddings for {', '.join(tokens)}: expected the weights of the trained reward model")
        with torch.device("meta"):
            fitting(backbone, Qwen2VLModel(config).state_dict(), where)
        # Not load_state_dict: this spares a second copy of the weights, and fills the buffers that no checkpoint has.
        model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=backbone, dtype=DTYPES[dtype])
        self.model: Any = model.eval().requires_grad_(False)
        self.head = head(text.hidden_size).eval().requires_grad_(False)
        load_weights(self.head, {name.removeprefix(HEAD): value for name, value in weights.items() if name.startswith(HEAD)}, where)

    def forward(self, media: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """(N, tokens, outputs of the head) float32, with gradients to the media.

        Args:
            media: N pictures (3, H, W) or N videos (F, 3, H, W) in [0, 1].
            texts: N instructions that hold each special token once.
        """
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            patches, grids = zip(*(self.pixels(medium.to(device).unsqueeze(0)) for medium in media), strict=True)
            grid = torch.cat(grids)
            name = "video" if media[0].ndim == 4 else "image"
            counts = (grid.prod(1) // self.pixels.merge**2).tolist()
            chats = [CHAT.format(media=f"<|{name}_pad|>" * n, text=text) for n, text in zip(counts, texts, strict=True)]
            inputs = self.tokenizer(chats, padding=True, padding_side="right", return_tensors="pt").to(device)
            ids = inputs.input_ids
            features = self.model.visual(torch.cat(patches).to(self.model.dtype), grid_thw=grid).pooler_output
            places = (ids == self.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>")).unsqueeze(-1)
            language = self.model.language_model
            embeddings = language.embed_tokens(ids).masked_scatter(places, features)
            states = language(inputs_embeds=embeddings, attention_mask=inputs.attention_mask, use_cache=False).last_hidden_state
            at = torch.stack([(ids == token).int().argmax(1) for token in self.token_ids], 1)
            return self.head(states[torch.arange(len(ids), device=device).unsqueeze(1), at].float())

    def train(self, mode: bool = True) -> QwenReader:
        """Stays in evaluation mode, whatever module it is part of."""
        return super().train(False)


def harmless(prompt: str) -> str:
    """A prompt that cannot smuggle in special tokens."""
    return prompt.replace("<|", "< |")
