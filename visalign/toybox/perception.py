"""What the verifier sees: the objects of toybox pictures, and how much of each picture no object explains.

Colours are told apart by the nearest palette colour, objects by connected components of one colour, shapes by the overlap of an object's
outline with rendered templates. Unlike textbook template matching nothing slides: an object is first shifted to its centre of mass and
scaled to unit area, which leaves only the rotation to search. Outlines are where a colour covers half a pixel, found by interpolation, so
soft edges do not change them. A whole batch is one array at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from visalign.toybox.scenes import COLOURS, GROUND, SHAPES, SIZE, Object, render

CLEAN = 0.05  # blemish (see View) up to which a picture is clean
LEAST_OVERLAP = 0.90  # intersection over union with a template below which a shape is "unknown"
LEAST_MARGIN = 0.06  # and so is one that overlaps another shape's template almost as well (a square with round corners)
COLOUR_TOLERANCE = 44 / 255  # Euclidean distance in RGB; palette colours are at least 150/255 from the ground
HAZE_TOLERANCE = 24 / 255  # the same for the ground, where noise is averaged away
LEAST_AREA, MOST_AREA = 12, 1000  # pixels of an object; the world's own have 78 … 680
TURNS = range(-20, 21, 4)  # degrees; the world turns its shapes by at most 12
SCALES = (0.96, 1.0, 1.04)  # areas err by so much on small rings and soft edges
SHARPEN = 4.0  # slope of the ramp at an outline: soft edges must not count as missing overlap
GRID = 32  # samples per side of a normalised outline, which spans ±1 root of the object's area


@dataclass(frozen=True)
class View:
    """One picture, perceived.

    Attributes:
        objects: with shape "unknown" where no template overlaps enough, and colour "unknown" where none is near enough.
        likeness: (n, 6) in [0, 1], each object's best overlap with each shape of `SHAPES`, or of those that were asked for.
        blemish: share of the ink (everything that isn't plain ground) that no object explains, in [0, 1]; 1 when ink covers half of it.
    """

    objects: list[Object]
    likeness: np.ndarray
    blemish: float


def perceive(images: Tensor) -> list[list[Object]]:
    """The objects of (N, 3, H, W) pictures in [0, 1]."""
    return [view.objects for view in look(images)]


def look(images: Tensor, shapes: tuple[str, ...] = SHAPES) -> list[View]:
    """Perceive (N, 3, H, W) pictures in [0, 1]; other sizes than 64 × 64 are resized first (bilinear, antialiased).

    Args:
        shapes: that are told apart; any that `scenes.render` draws.
    """
    return [view for piece in images.detach().float().cpu().split(64) for view in _look(piece, shapes)]  # 64: what stays in the cache


def _look(images: Tensor, shapes: tuple[str, ...]) -> list[View]:
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    count, pixels = len(images), images.permute(1, 0, 2, 3).reshape(3, -1)
    cover, nearest, distance = _segment(pixels)
    labels = nearest.reshape(count, SIZE, SIZE).numpy()
    parts = _components(labels)
    size = np.bincount(parts.ravel())
    keep = np.flatnonzero((size >= LEAST_AREA) & (size <= MOST_AREA) & (np.arange(len(size)) > 0))
    found = _measure(parts, keep)
    colour = labels.ravel()[found.first] - 1
    found = replace(found, area=_area(parts, cover.clamp(0, 1).numpy(), keep, colour))
    likeness, turn = _match(_outlines(parts, cover.numpy(), keep, colour, found), shapes)
    tinted = _off_palette(pixels, parts, keep, colour)
    objects = [_object(shapes, *row) for row in zip(found.x, found.y, found.area, colour, tinted, likeness, turn, strict=True)]
    explained = np.isin(parts, np.append(keep, 0)) & _explained(pixels, labels, cover, distance)
    ink = ((labels > 0) | ~explained).sum((1, 2))
    blemish = np.where(ink > SIZE**2 / 2, 1.0, (~explained).sum((1, 2)) / np.maximum(ink, LEAST_AREA))
    owner = found.first // SIZE**2
    bounds = np.searchsorted(owner, np.arange(count + 1))
    return [View(objects[a:b], likeness[a:b], float(blemish[n])) for n, (a, b) in enumerate(pairwise(bounds))]


# --- colours -----------------------------------------------------------------------------------------------------------


@cache
def _palette() -> Tensor:
    """(9, 3) in [0, 1]: the ground, then the colours."""
    return torch.tensor([GROUND, *COLOURS.values()]) / 255


def _segment(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (3, M) pixels: (8, M) how far each lies from the ground towards each colour (1 = there), (M,) nearest entry, (M,) its distance."""
    palette = _palette()
    ways = palette[1:] - palette[:1]
    cover = (ways / ways.square().sum(1, keepdim=True)) @ (pixels - palette[0, :, None])
    near, nearest = (palette @ pixels - palette.square().sum(1, keepdim=True) / 2).max(0)
    return cover, nearest, (pixels.square().sum(0) - 2 * near).clamp(min=0).sqrt()


def _explained(pixels: Tensor, labels: np.ndarray, cover: Tensor, distance: Tensor) -> np.ndarray:
    """(N, 64, 64) bool: plain ground or colour or, within a pixel of an outline, near a mixture of the ground and a colour.

    Ground is compared after averaging over 3 × 3 pixels of ground, so that faint noise passes where an equally faint haze does not.
    """
    ink = torch.from_numpy(labels > 0).float()[:, None]
    outline = (F.max_pool2d(ink, 3, 1, 1) + F.max_pool2d(1 - ink, 3, 1, 1) == 2).float()
    palette = _palette()
    ground = (1 - ink) * (1 - outline)
    haze = (pixels - palette[0, :, None]).reshape(3, *labels.shape).transpose(0, 1) * ground
    haze = F.avg_pool2d(haze, 3, 1, 1) / F.avg_pool2d(ground, 3, 1, 1).clamp(min=1e-6)
    hazy = (haze.square().sum(1, keepdim=True) > HAZE_TOLERANCE**2) & (ground > 0)
    good = (distance <= COLOUR_TOLERANCE) & ~hazy.flatten()
    edge = (outline.flatten().bool() & ~good).nonzero()[:, 0]
    part = cover[:, edge].clamp(0, 1)[:, None]  # (8, 1, E)
    mixture = palette[0, :, None] + part * (palette[1:] - palette[:1])[:, :, None]
    good[edge] = (pixels[:, edge] - mixture).square().sum(1).amin(0).sqrt() <= COLOUR_TOLERANCE
    return good.reshape(labels.shape).numpy()


def _off_palette(pixels: Tensor, parts: np.ndarray, keep: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(n,) bool: whether most pixels of an object are out of tolerance of its colour (edges alone never are most)."""
    flat = parts.ravel()
    where = np.flatnonzero(flat)
    slot = np.full(flat.max(initial=0) + 1, -1)
    slot[keep] = np.arange(len(keep))
    owner = slot[flat[where]]
    where, owner = where[owner >= 0], owner[owner >= 0]
    wanted = _palette().numpy()[1:][colour][owner]
    off = np.linalg.norm(pixels.numpy()[:, where].T - wanted, axis=1) > COLOUR_TOLERANCE
    return np.bincount(owner, off, len(keep)) > 0.6 * np.bincount(owner, minlength=len(keep))


# --- objects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """(n,) each: centre of mass and area in pixels, and the index of an object's first pixel in the batch."""

    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    first: np.ndarray


def _components(labels: np.ndarray) -> np.ndarray:
    """(N, H, W) int: 0 on the ground, else the number of the pixel's component, in order of first pixels (8 neighbours, one colour)."""
    flat = labels.ravel()
    where = np.flatnonzero(flat)
    node = np.zeros(flat.shape, np.int64)
    node[where] = np.arange(len(where))
    index = np.arange(flat.size).reshape(labels.shape)
    one, two = [], []
    for dy, left, right in ((0, slice(None, -1), slice(1, None)), (1, slice(None), slice(None))):
        one.append(index[:, : SIZE - dy, left])
        two.append(index[:, dy:, right])
    one += [index[:, :-1, :-1], index[:, :-1, 1:]]
    two += [index[:, 1:, 1:], index[:, 1:, :-1]]
    a, b = (np.concatenate([part.ravel() for part in side]) for side in (one, two))
    same = (flat[a] == flat[b]) & (flat[a] > 0)
    a, b = node[a[same]], node[b[same]]
    _, member = connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), (len(where), len(where))), directed=False)
    parts = np.zeros(flat.shape, np.int64)
    if len(where):
        _, first, member = np.unique(member, return_index=True, return_inverse=True)
        parts[where] = np.argsort(np.argsort(first))[member] + 1
    return parts.reshape(labels.shape)


def _measure(parts: np.ndarray, keep: np.ndarray) -> _Found:
    """Where the components `keep` lie; the world's shapes are all centred on their centre of mass."""
    flat = parts.ravel()
    where = np.flatnonzero(flat)
    name = flat[where]
    most = flat.max(initial=0) + 1
    area = np.bincount(name, minlength=most)
    x, y = (np.bincount(name, v + 0.5, most) / np.maximum(area, 1) for v in (where % SIZE, where // SIZE % SIZE))
    first = np.zeros(most, np.int64)
    first[name[::-1]] = where[::-1]  # the last write wins
    return _Found(x[keep], y[keep], area[keep], first[keep])


def _area(parts: np.ndarray, cover: np.ndarray, keep: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(n,) what the components `keep` cover, with the part of each pixel around them: in whole pixels a thin bar errs by a fifth."""
    around = F.max_pool2d(torch.from_numpy(parts).double()[:, None], 3, 1, 1)[:, 0].long().numpy()
    flat = np.where(parts > 0, parts, around).ravel()
    where = np.flatnonzero(flat)
    ink = np.zeros(flat.max(initial=0) + 1, np.int64)
    ink[keep] = colour
    return np.bincount(flat[where], cover[ink[flat[where]], where], len(ink))[keep]


def _outlines(parts: np.ndarray, cover: np.ndarray, keep: np.ndarray, colour: np.ndarray, found: _Found) -> np.ndarray:
    """(n, 32²) in [0, 1]: objects filled up to their outline, shifted to the centre and scaled to unit area."""
    step = (np.arange(GRID) + 0.5) * 2 / GRID - 1
    scale = np.sqrt(found.area)[:, None]
    x, y = (np.clip(centre[:, None] + scale * step - 0.5, 0, SIZE - 1.001) for centre in (found.x, found.y))
    left, top = x.astype(np.int64), y.astype(np.int64)
    start = (found.first // SIZE**2 * SIZE**2)[:, None, None]
    value = np.zeros((len(keep), GRID, GRID), np.float32)
    flat = parts.ravel()
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = start + (top + dy)[:, :, None] * SIZE + (left + dx)[:, None, :]
        weight = (1 - np.abs(y - top - dy))[:, :, None] * (1 - np.abs(x - left - dx))[:, None, :]
        owner = flat[at]
        own = (owner == keep[:, None, None]) | (owner == 0)
        value += weight * own * np.clip(cover[colour[:, None, None], at], 0, 1)
    return np.clip(SHARPEN * (value - 0.5) + 0.5, 0, 1).reshape(len(keep), GRID**2)


@cache
def _templates(shapes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outlines of every shape at every turn and scale: (T, 32²), their shape (T,) and their turn (T,)."""
    masks, shape, turn = [], [], []
    for k, name in enumerate(shapes):
        for angle, scale in product((0,) if name in ("circle", "ring") else TURNS, SCALES):
            radius = SIZE / 2 * scale / area_of(name) ** 0.5
            picture = render([Object(name, "black", SIZE / 2, SIZE / 2, radius, angle)], SIZE, (255, 255, 255), 8)
            ink = 1 - (np.asarray(picture.convert("L"), np.float32) - 15) / 240
            masks.append(ink.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID).mean((1, 3)).ravel())
            shape.append(k)
            turn.append(angle)
    return np.stack(masks), np.array(shape), np.array(turn)


@cache
def area_of(shape: str) -> float:
    """Area of a shape of radius 1."""
    picture = render([Object(shape, "black", SIZE / 2, SIZE / 2, 28.0)], SIZE, (255, 255, 255), 8)
    return float((255 - np.asarray(picture.convert("L"), np.float32)).sum() / 240 / 28.0**2)


def _match(outlines: np.ndarray, shapes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of (n, 32²) outlines: (n, S) best overlap with each of S shapes, and (n,) the turn of the best template of all."""
    masks, shape, turn = _templates(shapes)
    both = outlines @ masks.T
    area = np.maximum((outlines**2).sum(1), GRID**2 / 4 * 0.9)[:, None]  # what lies beyond the grid counts against the object
    overlap = both / (area + (masks**2).sum(1) - both)
    likeness = np.stack([overlap[:, shape == k].max(1, initial=0) for k in range(len(shapes))], 1)
    return likeness, turn[overlap.argmax(1)] if len(overlap) else np.zeros(0)


def _object(
    shapes: tuple[str, ...], x: float, y: float, area: float, colour: int, tinted: bool, likeness: np.ndarray, turn: float
) -> Object:
    second, best = np.argsort(likeness)[-2:]
    clear = likeness[best] >= LEAST_OVERLAP and likeness[best] - likeness[second] >= LEAST_MARGIN
    shape = shapes[best] if clear else "unknown"
    radius = float((area / area_of(shapes[best])) ** 0.5)
    return Object(shape, "unknown" if tinted else list(COLOURS)[colour], float(x), float(y), radius, float(turn))
