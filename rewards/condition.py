"""Condition consistency: are the edges, the depth, the segments or the colours of a picture those of its condition?

The cycle-consistency reward of ControlNet++ (arXiv 2404.07987) and Ctrl-U (arXiv 2410.11236). Differs in: edges are Sobel's, soft, and need
no network; classes are scored by their overlap, which is bounded; cross entropy is a component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign import pictures
from visalign.errors import UserError
from visalign.references import References, resized
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox import scenes
from visalign.vision import load_map_predictor

MODELS = {"depth": "depth-anything/Depth-Anything-V2-Small-hf", "segmentation": "openmmlab/upernet-convnext-small"}
EDGE = 0.1  # slope of the luminance per pixel at which an edge counts half
TEMPERATURE = 0.2  # of a pixel's membership in a palette colour, in units of RGB distance
UNLABELLED = 255  # places of a class map that don't count

Kind = Literal["edges", "depth", "segmentation", "colours"]


class Condition(Reward):
    """Agreement of a map of the picture with that of its condition, differentiable.

        edges         soft F1, 2 Σab / (Σa² + Σb²), in [0, 1]; a = s² / (s² + 0.1²) of the luminance's slope s per pixel
        depth         -mean |a - b|, in [-1, 0]; maps scaled to [0, 1] each
        segmentation  mean over the condition's classes of the soft intersection over union Σpy / Σ(p + y - py), in [0, 1]
        colours       the same; classes are the toybox's colours and its ground, p a softmax over distances in RGB

    The condition is `metadata["condition"]`, a file or a tensor; without one, the first reference picture.

    Args:
        kind: which map.
        checkpoint: of a depth estimator or a semantic segmenter of transformers; None for the defaults. Unused by the others.
        given: what `metadata["condition"]` holds: a "picture" (3, H, W) in [0, 1] whose map is computed, or the "map" itself (H, W), edges
            in [0, 1], depth on any scale or class numbers (255: doesn't count). In a file, a map is grey, of 8 bits.
        references: see `visalign.references.References`.
        form: "agreement" is that; "error" the mean of the dense map, in [-1, 0], which Ctrl-U attenuates place by place (`uncertainty`).

    Dense is minus the error at every place, in [-1, 0]. Component of class maps: `cross_entropy`.
    """

    spec = RewardSpec("condition", differentiable=True, range=(0.0, 1.0))

    def __init__(
        self,
        kind: Kind = "edges",
        checkpoint: str | None = None,
        given: Literal["picture", "map"] = "picture",
        references: str | None = None,
        form: Literal["agreement", "error"] = "agreement",
    ):
        self.kind: Kind = kind
        self.form, self.given = form, given
        error = form == "error" or kind == "depth"
        self.spec = replace(self.spec, range=(-1.0, 0.0) if error else (0.0, 1.0), model_id=MODELS.get(kind, ""))
        self.model = load_map_predictor(checkpoint or MODELS[kind], kind) if kind in ("depth", "segmentation") else None
        self.references = References("condition", references, 1, lambda images: (images[:1],))

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; dense (N, h, w)."""
        maps = self._map(batch.images)
        wanted = torch.cat(self._wanted(batch, maps)).to(maps.device)
        if self.kind in ("segmentation", "colours"):
            found = _classes(maps, wanted)
        else:
            error = (maps - wanted).abs()[:, 0]
            score = -error.mean((1, 2)) if self.kind == "depth" else soft_f1(maps.flatten(1), wanted.flatten(1))
            found = RewardOutput.of(score, dense=-error)
        if self.form == "agreement" or found.dense is None:
            return found
        return RewardOutput.of(found.dense.flatten(1).mean(1), dense=found.dense, components=found.components)

    def _map(self, images: Tensor) -> Tensor:
        """(N, K, h, w): edges or depth in [0, 1] (K = 1), or logarithms of class probabilities."""
        if self.kind == "edges":
            return edges(images)
        if self.kind == "colours":
            return colours(images)
        assert self.model is not None
        found = self.model.predict(images)
        return _unit(found) if self.kind == "depth" else found.log_softmax(1)

    # --- conditions ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _wanted(self, batch: RewardInput, maps: Tensor) -> list[Tensor]:
        """N maps (1, 1, h, w), or class numbers (1, h, w), of the size of `maps`; inputs of one condition share it."""
        missing = [row for row, metadata in enumerate(batch.metadata) if "condition" not in metadata]
        drawn = self.references(batch.take(torch.tensor(missing))) if missing else []
        sources: dict[int, Any] = {row: found[0] for row, found in zip(missing, drawn, strict=True)}
        known: dict[Any, Tensor] = {}
        found: list[Tensor] = []
        for row, metadata in enumerate(batch.metadata):
            source = sources.get(row, metadata.get("condition"))
            key = id(source) if isinstance(source, Tensor) else str(source)
            if key not in known:
                read = self._from_map if self.given == "map" and row not in sources else self._from_picture
                known[key] = read(self._read(source), batch.images.shape[-2:], maps)
            found.append(known[key])
        return found

    def _read(self, source: Any) -> Tensor:
        if isinstance(source, Tensor):
            return source
        numbers = self.given == "map" and self.kind in ("segmentation", "colours")
        return pictures.load(source) * (255 if numbers else 1)

    def _from_picture(self, picture: Tensor, size: Sequence[int], maps: Tensor) -> Tensor:
        image = picture if picture.ndim == 4 else picture[None]
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"condition: a picture must be (3, H, W), got {tuple(picture.shape)}; a map needs given: map")
        found = self._map(resized(image.to(maps.device), (size[0], size[1])))
        return found.argmax(1) if self.kind in ("segmentation", "colours") else found

    def _from_map(self, given: Tensor, size: Sequence[int], maps: Tensor) -> Tensor:
        """`given` (H, W), (1, H, W), or (3, H, W) as files are read."""
        grey = given.float().reshape(-1, *given.shape[-2:])[0][None, None].to(maps.device)
        shape = (maps.shape[-2], maps.shape[-1])
        if self.kind in ("segmentation", "colours"):
            return F.interpolate(grey, shape, mode="nearest-exact")[:, 0].round().long()
        found = F.interpolate(grey, shape, mode="bilinear", antialias=True, align_corners=False)
        return _unit(found) if self.kind == "depth" else found.clamp(0, 1)

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        if self.references.draw is not None:
            self.references.prepare(prompts, metadata)


# --- maps and their agreement --------------------------------------------------------------------------------------------


def edges(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 1, H, W) in [0, 1)."""
    grey = images.float().mean(1, keepdim=True)
    across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    slope = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None]).square().sum(1, keepdim=True)
    return slope / (slope + EDGE**2)


def colours(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 9, H, W): logarithms of the membership in each of the toybox's colours, and in its ground."""
    palette = images.new_tensor([*scenes.COLOURS.values(), scenes.GROUND], dtype=torch.float32) / 255
    distance = (images.float()[:, None] - palette[:, :, None, None]).square().sum(2)
    return (-distance / (2 * TEMPERATURE**2)).log_softmax(1)


def soft_f1(a: Tensor, b: Tensor) -> Tensor:
    """(N, P), (N, P) in [0, 1] -> (N,) in [0, 1]: 1 where they are equal."""
    tiny = 1e-6
    return (2 * (a * b).sum(1) + tiny) / (a.square().sum(1) + b.square().sum(1) + tiny)


def _classes(log_shares: Tensor, labels: Tensor) -> RewardOutput:
    """(N, K, h, w) log-probabilities against (N, h, w) class numbers: mean soft intersection over union."""
    count = log_shares.shape[1]
    counted = labels != UNLABELLED
    labels = labels.where(counted, 0)
    if int(labels.max()) >= count or int(labels.min()) < 0:
        raise UserError(f"condition: a map holds class {int(labels.max())}, but there are {count} classes (255: doesn't count)")
    wanted = F.one_hot(labels, count).permute(0, 3, 1, 2) * counted[:, None]
    shares = log_shares.exp() * counted[:, None]
    both = (shares * wanted).sum((2, 3))
    union = (shares + wanted).sum((2, 3)) - both
    present = wanted.sum((2, 3)) > 0
    score = torch.where(present, both / union.clamp_min(1e-6), 0).sum(1) / present.sum(1)
    right = log_shares.gather(1, labels[:, None])[:, 0]
    entropy = -(right * counted).sum((1, 2)) / counted.sum((1, 2))
    return RewardOutput.of(score, dense=(right.exp() - 1) * counted, components={"cross_entropy": entropy})


def _unit(maps: Tensor) -> Tensor:
    """(N, 1, h, w) scaled to [0, 1], each from its lowest to its highest value."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-6)
