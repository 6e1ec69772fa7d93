"""Scenes of the toybox: what they contain, how they are drawn, how they are described and when a description is met.

A scene is a list of objects on a grey ground. A prompt is one of GenEval's six kinds and carries GenEval's metadata
(`tag`, `include: [{class, count, color?, position?}]`), so the same record drives the renderer, the verifier and the second judge.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels per side
GROUND = (128, 128, 128)
COLOURS: dict[str, tuple[int, int, int]] = {  # near the corners of the RGB cube: all equally far from the ground
    "red": (225, 35, 35),
    "green": (35, 190, 60),
    "blue": (40, 60, 225),
    "yellow": (240, 225, 45),
    "purple": (200, 50, 210),
    "cyan": (50, 215, 225),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction of the first seen from the second
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # of motion, in `moving_scenes`
SPLIT = 20  # salt of the train/test split: chosen so that every kind has its share
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Object:
    """One shape; `x`, `y` and `radius` in pixels, `angle` in degrees."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float = 9.0
    angle: float = 0.0


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape inscribed in the unit circle (y points down); "sparkle" is a star of four points, in no prompt."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "cross":
        a, b = 0.3, 0.95
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    corners, radii = {"triangle": (3, (1.0,)), "star": (10, (1.05, 0.42)), "sparkle": (8, (1.05, 0.3))}[shape]
    turn = [2 * math.pi * k / corners - math.pi / 2 for k in range(corners)]
    return [(radii[k % len(radii)] * math.cos(t), radii[k % len(radii)] * math.sin(t)) for k, t in enumerate(turn)]


def render(
    objects: Sequence[Object],
    size: int = SIZE,
    ground: tuple[int, int, int] = GROUND,
    oversample: int = 4,
    palette: Mapping[str, tuple[int, int, int]] = COLOURS,
    shapes: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Image.Image:
    """Draw a scene: supersampled polygons on a plain ground; `shapes` gives polygonal ones other corners in the unit circle."""
    scale = oversample * size / SIZE
    canvas = Image.new("RGB", (size * oversample, size * oversample), ground)
    draw = ImageDraw.Draw(canvas)
    for item in objects:
        x, y, r, colour = item.x * scale, item.y * scale, item.radius * scale, palette[item.colour]
        if item.shape in ("circle", "ring"):
            r *= 0.92
            draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
            if item.shape == "ring":
                draw.ellipse([x - r * 0.52, y - r * 0.52, x + r * 0.52, y + r * 0.52], fill=ground)
        else:
            c, s = math.cos(math.radians(item.angle)), math.sin(math.radians(item.angle))
            corners = (shapes or {}).get(item.shape) or outline(item.shape)
            draw.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in corners], fill=colour)
    return canvas.resize((size, size), Image.Resampling.BOX)


# --- prompts -----------------------------------------------------------------------------------------------------------


def describe(metadata: Metadata) -> str:
    """The prompt of a record: "two red circles", "a star left of a ring", "a blue cross and a white square", "a ring moving up"."""
    phrases = []
    for clause in metadata["include"]:
        words = [NUMBERS[clause["count"]], clause.get("color", ""), clause["class"] + ("s" if clause["count"] > 1 else "")]
        phrases.append(" ".join(filter(None, words)).replace("crosss", "crosses"))
    if len(phrases) == 1:
        return phrases[0] + (f" moving {metadata['motion']}" if "motion" in metadata else "")
    joint = metadata["include"][0].get("position", ["and"])[0]
    return f"{phrases[0]} {joint} {phrases[1]}"


_NOUN = r"(?P<number{0}>a|an|one|two|three|four) (?:(?P<colour{0}>{1}) )?(?P<shape{0}>{2})(?:e?s)?"
_GRAMMAR = re.compile(
    _NOUN.format(1, "|".join(COLOURS), "|".join(SHAPES))
    + rf"(?: (?P<joint>and|{'|'.join(RELATIONS)}) "
    + _NOUN.format(2, "|".join(COLOURS), "|".join(SHAPES))
    + rf")?(?: moving (?P<motion>{'|'.join(DIRECTIONS)}))?"
)


def parse(prompt: str) -> Metadata | None:
    """The record of a prompt in the toybox's grammar, or None when it is not in it or names one shape twice without two colours."""
    match = _GRAMMAR.fullmatch(prompt.strip().lower().rstrip("."))
    if match is None:
        return None
    counts = {word: n for n, word in NUMBERS.items()} | {"an": 1, "one": 1}
    include: list[dict[str, Any]] = []
    for k in ("1", "2"):
        if match["shape" + k]:
            clause = {"class": match["shape" + k], "count": counts[match["number" + k]]}
            include.append(clause | ({"color": match["colour" + k]} if match["colour" + k] else {}))
    if len(include) == 2 and match["joint"] != "and":
        include[0]["position"] = [match["joint"], 1]
    metadata: Metadata = {"tag": _tag(include), "include": include} | ({"motion": match["motion"]} if match["motion"] else {})
    return metadata if readable(metadata) else None


def _tag(include: Sequence[dict[str, Any]]) -> str:
    coloured = any("color" in clause for clause in include)
    if len(include) == 2:
        return "position" if "position" in include[0] else "color_attr" if coloured else "two_object"
    return "counting" if include[0]["count"] > 1 else "colors" if coloured else "single_object"


def compositions() -> Iterator[Metadata]:
    """Every composition of the six kinds, once."""
    for shape in SHAPES:
        yield {"tag": "single_object", "include": [{"class": shape, "count": 1}]}
    for a, b in itertools.permutations(SHAPES, 2):
        yield {"tag": "two_object", "include": [{"class": a, "count": 1}, {"class": b, "count": 1}]}
        for relation in RELATIONS:
            yield {"tag": "position", "include": [{"class": a, "count": 1, "position": [relation, 1]}, {"class": b, "count": 1}]}
        for c, d in itertools.permutations(COLOURS, 2):
            yield {"tag": "color_attr", "include": [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]}
    for shape in SHAPES:
        for colour in COLOURS:
            yield {"tag": "colors", "include": [{"class": shape, "count": 1, "color": colour}]}
        for count in (2, 3, 4):
            yield {"tag": "counting", "include": [{"class": shape, "count": count}]}
            for colour in COLOURS:
                yield {"tag": "counting", "include": [{"class": shape, "count": count, "color": colour}]}


def is_test(metadata: Metadata) -> bool:
    """Whether a composition is held out: one in five, decided by a hash that ignores the order in which objects are named."""
    phrases = [(c["class"], c["count"], c.get("color", "")) for c in metadata["include"]]
    relation = metadata["include"][0].get("position", ("", 1))[0]
    dx, dy = RELATIONS.get(relation, (0, 0))
    if phrases != sorted(phrases):
        phrases, dx, dy = sorted(phrases), -dx, -dy
    return hashlib.sha256(f"{SPLIT}{phrases}{dx}{dy}".encode()).digest()[0] % 5 == 0


def prompts(test: bool) -> dict[str, list[Metadata]]:
    """Train or held-out compositions by kind."""
    found: dict[str, list[Metadata]] = {kind: [] for kind in KINDS}
    for metadata in compositions():
        if is_test(metadata) == test:
            found[metadata["tag"]].append(metadata)
    return found


def alter(metadata: Metadata, rng: random.Random) -> tuple[str, Metadata]:
    """The record with one attribute changed, and which: "shape", "colour", "count" or "relation".

    A scene of the record meets the altered one only where two relations hold at once (just over 30 degrees off both axes).
    """
    clauses = [dict(clause) for clause in metadata["include"]]
    clause = rng.choice(clauses)
    first = clauses[0]
    choices = ["shape", "count"] + ["colour"] * ("color" in clause) + ["relation"] * ("position" in first)
    what = rng.choice(choices)
    if what == "shape":
        clause["class"] = rng.choice([s for s in SHAPES if s not in {c["class"] for c in clauses}])
    elif what == "colour":
        clause["color"] = rng.choice([c for c in COLOURS if c != clause["color"]])
    elif what == "count":
        clause["count"] = rng.choice([n for n in NUMBERS if n != clause["count"]])
    else:
        first["position"] = [rng.choice([r for r in RELATIONS if r != first["position"][0]]), 1]
    return what, {"tag": _tag(clauses), "include": clauses}


def lay_out(metadata: Metadata, rng: random.Random) -> list[Object]:
    """A random scene that meets a record exactly: no other objects, no overlap, relations unmistakable.

    Centres lie on a grid of 8 pixels; sizes and turns are two: a small transformer has no notion of translation, and learns these faster.
    """
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    biggest = {1: 16.0, 2: 14.0, 3: 11.5, 4: 10.5}[len(wanted)]
    relation = metadata["include"][0].get("position", (None,))[0]
    while True:
        objects: list[Object] = []
        for clause in wanted:
            radius = biggest * rng.choice((0.8, 1.0))
            places = [at for at in range(0, SIZE, 8) if radius + 2 <= at <= SIZE - radius - 2]
            x, y = rng.choice(places), rng.choice(places)
            colour = clause.get("color") or rng.choice(list(COLOURS))
            objects.append(Object(clause["class"], colour, x, y, radius, rng.choice((0.0, 12.0))))
        apart = all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2 for a, b in itertools.combinations(objects, 2))
        if apart and (relation is None or related(objects[0], objects[1], relation, 0.85)):
            return objects


# --- meeting a description ---------------------------------------------------------------------------------------------


def alignment(a: Object, b: Object, relation: str) -> float:
    """Cosine in [-1, 1] between the offset of `a` from `b` and the relation's direction."""
    dx, dy = RELATIONS[relation]
    ox, oy = a.x - b.x, a.y - b.y
    return (ox * dx + oy * dy) / max(math.hypot(ox, oy), 1e-6)


def related(a: Object, b: Object, relation: str, least: float = 0.5) -> bool:
    """GenEval's rule: the offset of `a` from `b`, normalised, points along the relation by more than `least` (1 = exactly)."""
    return alignment(a, b, relation) > least


def readable(metadata: Metadata) -> bool:
    """Whether a record speaks of this world only, and so that every object can belong to one clause alone."""
    clauses = metadata.get("include") or []
    known = all(
        clause.get("class") in SHAPES
        and clause.get("count", 0) >= 1
        and clause.get("color", "red") in COLOURS
        and ("position" not in clause or (clause["position"][0] in RELATIONS and 0 <= clause["position"][1] < len(clauses)))
        for clause in clauses
    )
    pairs = itertools.combinations(clauses, 2)
    twins = any(a["class"] == b["class"] and len({a.get("color"), b.get("color")} - {None}) < 2 for a, b in pairs)
    return bool(clauses) and known and not twins


def wanted(metadata: Metadata, prompt: str) -> Metadata | None:
    """What a picture must show: from the metadata's `include` if it has one, else from the prompt; None if that cannot be read."""
    if "include" in metadata:
        return metadata if readable(metadata) else None
    return parse(prompt)


def meets(objects: Sequence[Object], metadata: Metadata) -> tuple[float, float]:
    """(strict, dense) in [0, 1]: strict is 1 when the objects are exactly what the record says, dense the mean credit of its clauses.

    A clause earns the mean of its parts: count (1 - |found - count| / count, not below 0), colour (share of its objects that have it; at
    least 0.3 when anything has it) and position (mean over pairs of alignment + 0.5, cut to [0, 1]: 1 where GenEval's rule holds).
    `dense` is the mean of all clauses and of the same count credit for the objects as a whole, so that objects nobody asked for cost.
    Clauses of one shape tell their objects apart by colour. Shapes and colours outside the world ("unknown") meet nothing.
    """
    clauses: list[dict[str, Any]] = metadata["include"]
    kinds = [clause["class"] for clause in clauses]
    matched = [
        [o for o in objects if o.shape == clause["class"] and (kinds.count(o.shape) == 1 or o.colour == clause["color"])]
        for clause in clauses
    ]
    credit: list[float] = []
    for k, clause in enumerate(clauses):
        found, count = matched[k], clause["count"]
        parts = [max(0.0, 1 - abs(len(found) - count) / count)]
        if "color" in clause:
            painted = [o for o in found if o.colour == clause["color"]]
            anywhere = any(o.colour == clause["color"] for o in objects)
            parts.append(max(min(1.0, len(painted) / count), 0.3 * anywhere))
        if "position" in clause:
            relation, other = clause["position"]
            pairs = [min(1.0, max(0.0, alignment(a, b, relation) + 0.5)) for a in found for b in matched[other]]
            parts.append(sum(pairs) / len(pairs) if pairs else 0.0)
        credit.append(sum(parts) / len(parts))
    total = sum(clause["count"] for clause in clauses)
    counted = max(0.0, 1 - abs(len(objects) - total) / total)
    dense = (sum(credit) + counted) / (len(credit) + 1)
    strict = float(len(objects) == total and all(c == 1.0 for c in credit))
    return strict, dense


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(image.convert("RGB"))
