"""Frozen models that look at pictures alone: encoders with a global and with patch features, and models that predict a map.

Loads transformers' DINOv2 (with registers or without), DINOv3, SigLIP and CLIP vision towers, depth estimators and semantic segmenters.
As in `visalign.features`, weights never train, a model that is loaded twice is the same object, and autocast doesn't reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.features import loading, locate
from visalign.preprocess import Aspect, Preprocess


@dataclass(frozen=True)
class VisualFeatures:
    """What an encoder sees in N pictures, in vectors of unit length.

    Attributes:
        image: (N, D) of the whole pictures: the class token, or what the tower pools.
        patches: (N, P, L·D) of their P = h·w patches, row by row; L layers side by side.
        grid: (h, w).
    """

    image: Tensor
    patches: Tensor
    grid: tuple[int, int]


class FrozenVision(nn.Module):
    """A frozen model of transformers with its checkpoint's own preprocessing."""

    def __init__(self, auto: Any, name: str, resolution: int | None):
        from transformers import AutoImageProcessor

        super().__init__()
        model, report = auto.from_pretrained(name, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
        self.checkpoint = name
        self.model: Any = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.preprocess = Preprocess.of(AutoImageProcessor.from_pretrained(name))
        if resolution:
            self.preprocess = replace(self.preprocess, size=(resolution, resolution), scaled=None)

    def train(self, mode: bool = True) -> FrozenVision:
        """Stays in evaluation mode, whatever module it is part of."""
        return super().train(False)

    def _run(self, images: Tensor, aspect: Aspect | None, **options: Any) -> Any:
        parameter = next(self.model.parameters())
        return self.model(self.preprocess(images.to(parameter.device), aspect).to(parameter.dtype), **options)

    def _exact(self) -> torch.autocast:
        """A context that the caller's autocast doesn't reach."""
        return torch.autocast(next(self.model.parameters()).device.type, enabled=False)


class VisionEncoder(FrozenVision):
    """A vision transformer.

    Attributes:
        width: D.
        grid: (h, w) patches of a picture.
    """

    def __init__(self, name: str, resolution: int | None = None):
        from transformers import AutoModel

        super().__init__(AutoModel, name, resolution)
        config = self.model.config
        self.width: int = config.hidden_size
        high, wide = self.preprocess.size
        self.grid = high // config.patch_size, wide // config.patch_size
        self.depth: int = config.num_hidden_layers
        norms = [getattr(self.model, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(self.model, name)]
        if not norms:
            raise ValueError(f"{type(self.model).__name__} is not one of DINOv2, DINOv3, SigLIP and CLIP")
        self.norm: nn.Module = norms[0]

    def encode(self, images: Tensor, layers: Sequence[int] = (-1,), aspect: Aspect | None = None) -> VisualFeatures:
        """Features of (N, 3, H, W) in [0, 1], float32 with gradients to `images`.

        Args:
            layers: blocks whose patch features are returned, each through the tower's last norm: 1 is the first, -1 the last.
        """
        inner = any(layer not in (-1, self.depth) for layer in layers)
        more = {"interpolate_pos_encoding": True} if self.model.config.model_type.startswith(("clip", "siglip")) else {}
        with self._exact():
            output = self._run(images, aspect, output_hidden_states=inner, **more)
            last = output.last_hidden_state
            if self.model.config.model_type.startswith("clip"):  # the one tower that norms its pooled token alone
                last = self.norm(last)
            tokens = [last if layer in (-1, self.depth) else self.norm(output.hidden_states[layer]) for layer in layers]
        count = self.grid[0] * self.grid[1]  # class and register tokens come before the patches
        patches = torch.cat([F.normalize(token[:, -count:].float(), dim=-1) for token in tokens], -1) / len(tokens) ** 0.5
        return VisualFeatures(F.normalize(output.pooler_output.float(), dim=-1), patches, self.grid)


class Pixels(nn.Module):
    """No network, but the look of one: the pixels themselves, for looks that encoders of meaning were taught to ignore.

    A patch is a window of the picture scaled to `resolution`, and the picture itself a thumbnail of the same size. Entries are in ±1/√D:
    the length of a vector, at most 1, says how far it is from grey.

    Attributes:
        width: D, 3 · `WINDOW`².
        grid: (h, w) windows.
    """

    WINDOW = 8  # pixels per side

    def __init__(self, resolution: int = 32):
        super().__init__()
        if resolution < self.WINDOW or resolution % self.WINDOW:
            raise UserError(f"resolution: pixels are seen in windows of {self.WINDOW}; {resolution} is no multiple of it")
        self.resolution, self.width = resolution, 3 * self.WINDOW**2
        self.grid = resolution // self.WINDOW, resolution // self.WINDOW

    def encode(self, images: Tensor) -> VisualFeatures:
        """(N, 3, H, W) in [0, 1], float32 with gradients to `images`."""
        centred = (2 * images.float() - 1) / self.width**0.5
        windows = F.unfold(_squares(centred, self.resolution), self.WINDOW, stride=self.WINDOW).mT
        return VisualFeatures(_squares(centred, self.WINDOW).flatten(1), windows, self.grid)


def _squares(images: Tensor, side: int) -> Tensor:
    """(N, C, side, side), averaged where they were larger."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


class MapPredictor(FrozenVision):
    """A model that says something of every place of a picture: its depth or its class."""

    def __init__(self, name: str, task: Literal["depth", "segmentation"]):
        from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

        super().__init__(AutoModelForDepthEstimation if task == "depth" else AutoModelForSemanticSegmentation, name, None)
        self.task = task

    def predict(self, images: Tensor) -> Tensor:
        """(N, 1, h, w) depth as the model scales it, or (N, K, h, w) logits of K classes; float32 with gradients to `images`.

        Pictures are stretched to the model's input: a map covers the whole picture.
        """
        with self._exact():
            output = self._run(images, "stretch")
        return (output.predicted_depth[:, None] if self.task == "depth" else output.logits).float()


# --- loading -----------------------------------------------------------------------------------------------------------

_loaded: WeakValueDictionary[tuple[str, str, int], FrozenVision] = WeakValueDictionary()


def load_vision_encoder(checkpoint: str, resolution: int | None = None) -> VisionEncoder:
    """The frozen encoder of a checkpoint, the same object for as long as somebody holds it.

    Args:
        checkpoint: `toybox` or `toybox/dino`; a folder that transformers loads; a hub id.
        resolution: pixels per side of the encoder's input, a multiple of its patch size; None for the checkpoint's own.

    Raises:
        UserError: the checkpoint is missing, broken or no vision transformer.
    """
    key = (locate(checkpoint, "dino"), "encoder", resolution or 0)
    found = _loaded.get(key)
    if not isinstance(found, VisionEncoder):
        with loading(checkpoint, "a vision transformer", "a folder of transformers (DINOv2, DINOv3, SigLIP, CLIP)"):
            found = VisionEncoder(key[0], resolution)
        _loaded[key] = found
    return found


def load_map_predictor(checkpoint: str, task: Literal["depth", "segmentation"]) -> MapPredictor:
    """The frozen depth estimator or semantic segmenter of a folder or hub id; shared and refused as above."""
    key = (locate(checkpoint), task, 0)
    found = _loaded.get(key)
    if not isinstance(found, MapPredictor):
        with loading(checkpoint, f"a model for {task}", "a folder of transformers"):
            found = MapPredictor(key[0], task)
        _loaded[key] = found
    return found
