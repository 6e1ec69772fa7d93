"""Frozen encoders behind one interface: pictures and texts to unit vectors of one space.

Loads open_clip checkpoints and transformers' CLIP-like models (CLIP, SigLIP, ALIGN). Weights never train, an encoder that is loaded twice
is the same object, and autocast of the caller doesn't reach it: a score depends on the picture alone.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.preprocess import Aspect, Preprocess

OPEN_CLIP_ASPECTS: dict[str, Aspect] = {"shortest": "crop", "longest": "letterbox", "squash": "stretch"}
CACHED_TEXTS = 16384  # at most; the oldest leave first


class DualEncoder(nn.Module, ABC):
    """Frozen image and text encoder of one space.

    Attributes:
        checkpoint: where it came from.
        preprocess: the checkpoint's own.
        context: most tokens of a text, begin and end included.
    """

    def __init__(self, model: nn.Module, checkpoint: str, preprocess: Preprocess, context: int):
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.checkpoint, self.preprocess, self.context = checkpoint, preprocess, context
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> Tensor:
        """() float32, the logarithm of the factor that turns cosines into logits, as checkpoints keep it."""
        return torch.as_tensor(self.model.logit_scale).detach().float().reshape(())

    def encode_images(self, images: Tensor, aspect: Aspect | None = None) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, D) float32 of unit length, with gradients to `images`."""
        parameter = next(self.model.parameters())
        with torch.autocast(parameter.device.type, enabled=False):
            pixels = self.preprocess(images.to(parameter.device), aspect).to(parameter.dtype)
            return F.normalize(self._image_features(pixels).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """L texts to (L, D) float32 of unit length; each text is encoded once. Warns of texts that are longer than the context."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            cut = sum(length > self.context for length in self._token_counts(new))
            if cut:
                message = f"{cut} of {len(new)} texts are longer than the {self.context} tokens of {self.checkpoint} and were cut"
                warnings.warn(message, stacklevel=2)
            device = next(self.model.parameters()).device
            with torch.autocast(device.type, enabled=False):
                found = F.normalize(self._text_features(self._token_ids(new).to(device)).float(), dim=-1)
            self._texts.update(zip(new, found, strict=True))
        result = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > CACHED_TEXTS:
            del self._texts[next(iter(self._texts))]
        return result

    def train(self, mode: bool = True) -> DualEncoder:
        """Stays in evaluation mode, whatever module it is part of."""
        return super().train(False)

    def _apply(self, *args: Any, **more: Any) -> DualEncoder:
        self._texts.clear()  # a change of device or dtype is one for the cached texts too
        return super()._apply(*args, **more)

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, ids: Tensor) -> Tensor: ...

    @abstractmethod
    def _token_ids(self, texts: list[str]) -> Tensor:
        """(L, context) int64, padded and cut."""

    @abstractmethod
    def _token_counts(self, texts: list[str]) -> list[int]:
        """Tokens of each text, begin and end included, before cutting."""


class OpenClipEncoder(DualEncoder):
    """An open_clip model. `name` is what `open_clip.create_model` takes: `local-dir:FOLDER`, `hf-hub:ID`, or a model that `weights` fit."""

    def __init__(self, name: str, weights: str | None = None):
        import open_clip

        # Without `require_pretrained`, a folder without weights gives a random model and a log line.
        model: Any = open_clip.create_model(name, weights, require_pretrained=True)
        self.tokenizer: Any = open_clip.get_tokenizer(name)
        official = model.visual.preprocess_cfg
        size = official["size"]
        preprocess = Preprocess(
            size=(size, size) if isinstance(size, int) else tuple(size),
            mean=tuple(official["mean"]),
            std=tuple(official["std"]),
            interpolation="bilinear" if official["interpolation"] == "bilinear" else "bicubic",
            aspect=OPEN_CLIP_ASPECTS[official["resize_mode"]],
        )
        super().__init__(model, weights or name, preprocess, self.tokenizer.context_length)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_features(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    def _token_ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def _token_counts(self, texts: list[str]) -> list[int]:
        if hasattr(self.tokenizer, "tokenizer"):  # a transformers tokenizer inside
            return [len(ids) for ids in self.tokenizer.tokenizer(texts).input_ids]
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]


class TransformersEncoder(DualEncoder):
    """A transformers model with `get_image_features` and `get_text_features`; tokenizer and picture processor come from `processor`."""

    def __init__(self, name: str, processor: str):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
        self.aligned = model.config.model_type == "align"  # its text tower is a BERT: padding must be masked, and it has a temperature
        if not hasattr(model, "get_text_features") or not (self.aligned or hasattr(model, "logit_scale")):
            raise ValueError(f"{type(model).__name__} has no text and image features")
        if report["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
        self.tokenizer = AutoTokenizer.from_pretrained(processor)
        positions = model.config.text_config.max_position_embeddings
        context = min(positions, self.tokenizer.model_max_length) if self.aligned else positions
        super().__init__(model, name, Preprocess.of(AutoImageProcessor.from_pretrained(processor)), context)

    @property
    def logit_scale(self) -> Tensor:
        return -self.model.temperature.detach().float().log() if self.aligned else super().logit_scale

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def _text_features(self, ids: Tensor) -> Tensor:
        mask = {"attention_mask": ids.ne(self.tokenizer.pad_token_id).long()} if self.aligned else {}
        return _tensor(self.model.get_text_features(input_ids=ids, **mask))

    def _token_ids(self, texts: list[str]) -> Tensor:
        # SigLIP is trained on texts padded to the full length; CLIP pools at the end token and doesn't see the padding behind it.
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.context, return_tensors="pt").input_ids

    def _token_counts(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts).input_ids]


def _tensor(output: Any) -> Tensor:
    """Features of transformers < 5 (a tensor) and >= 5 (an output with `pooler_output`)."""
    return output if isinstance(output, Tensor) else output.pooler_output


# --- loading -----------------------------------------------------------------------------------------------------------

_loaded: WeakValueDictionary[tuple[str, str], DualEncoder] = WeakValueDictionary()


def load_dual_encoder(checkpoint: str, processor: str | None = None, architecture: str | None = None) -> DualEncoder:
    """The frozen encoder of a checkpoint, the same object for as long as somebody holds it.

    Args:
        checkpoint: `toybox` or `toybox/clip`; a folder (open_clip's, or one that transformers loads); `local-dir:FOLDER`; `hf-hub:ID`
            (open_clip); a hub id (open_clip's files if it has them, else transformers).
        processor: where tokenizer and picture processor of a transformers model come from, if its checkpoint lacks them.
        architecture: open_clip's name of the model, if `checkpoint` is a file of weights alone.

    Raises:
        UserError: the checkpoint is missing or broken.
    """
    name = checkpoint if architecture else locate(checkpoint)
    key = (name, architecture or processor or name)
    encoder = _loaded.get(key)
    if encoder is None:
        with loading(checkpoint, "a CLIP-like encoder", "a folder of open_clip or transformers"):
            encoder = OpenClipEncoder(architecture, name) if architecture else _build(name, processor)
        _loaded[key] = encoder
    return encoder


@contextmanager
def loading(checkpoint: str, what: str, expected: str) -> Iterator[None]:
    """Whatever a model library raises on a missing or broken checkpoint, as a UserError that says what was expected."""
    try:
        yield
    except Exception as error:  # a broken file makes the libraries raise almost anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {checkpoint!r} cannot be loaded as {what}: {reason}; give {expected}, a hub id, or toybox") from error


def locate(checkpoint: str, part: str = "clip") -> str:
    """The folder of `toybox`, of `toybox/PART` and of paths; a hub id as it is. Raises UserError for a folder that doesn't exist."""
    text = checkpoint.removeprefix("local-dir:")
    if text == "toybox" or text.startswith("toybox/"):
        folder = Path(str(files("visalign.assets") / "toybox" / (text.partition("/")[2] or part)))
        if not folder.is_dir():
            raise UserError(f"checkpoint {checkpoint!r}: the toybox has no part {folder.name}; visalign.toybox.pretrain makes its parts")
        return str(folder)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if text != checkpoint or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise UserError(f"checkpoint {checkpoint!r}: no such folder")
    return text


def _build(name: str, processor: str | None) -> DualEncoder:
    folder = Path(name)
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return OpenClipEncoder(f"local-dir:{name}")
        return TransformersEncoder(name, processor or name)
    if name.startswith("hf-hub:"):
        return OpenClipEncoder(name)
    if processor is None and _hub_has(name, "open_clip_config.json"):
        return OpenClipEncoder(f"hf-hub:{name}")
    return TransformersEncoder(name, processor or name)


def _hub_has(name: str, file: str) -> bool:
    """Whether a hub repository has a file, as far as the hub or the local cache can tell."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(name, file)
    except EntryNotFoundError:  # also: not in the cache, and the hub is out of reach
        return False
    return True
