"""Scenes of the toybox that move: one shape that crosses the picture in one of four directions, "a red circle moving left".

A record is that of a still scene (`scenes`) with a `motion`, so that rewards of pictures can judge every frame of a video alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from visalign.toybox import scenes
from visalign.toybox.scenes import DIRECTIONS, Metadata, Object

SHAPES = ("circle", "square", "triangle", "cross")
FRAMES, STEP = 9, 2.0  # pixels per frame
RADIUS = 12.0
LANES = (16, 32, 48)  # where the centre lies across the motion


def records(test: bool) -> list[Metadata]:
    """The train or held-out records, each shape in each colour and in any, each direction."""
    return [record for record in _every() if _is_test(record) == test]


def _every() -> Iterator[Metadata]:
    for shape in SHAPES:
        for colour in (None, *scenes.COLOURS):
            for direction in DIRECTIONS:
                clause = {"class": shape, "count": 1} | ({"color": colour} if colour else {})
                yield {"tag": "motion", "include": [clause], "motion": direction}


def _is_test(record: Metadata) -> bool:
    """One in five, by a hash; prompts without a colour are for training, since their scenes have every colour."""
    clause = record["include"][0]
    said = f"{scenes.SPLIT}{clause['class']}{clause.get('color')}{record['motion']}"
    return "color" in clause and hashlib.sha256(said.encode()).digest()[0] % 5 == 0


def lay_out(record: Metadata, rng: random.Random) -> list[Object]:
    """The object of a random scene in each of `FRAMES` frames; it crosses the middle, on a grid of 16 pixels in every fourth frame."""
    clause = record["include"][0]
    dx, dy = DIRECTIONS[record["motion"]]
    lane, half = rng.choice(LANES), scenes.SIZE / 2
    x, y = (half, lane) if dx else (lane, half)
    middle = Object(clause["class"], clause.get("color") or rng.choice(list(scenes.COLOURS)), x, y, RADIUS)
    way = [STEP * (n - FRAMES // 2) for n in range(FRAMES)]
    return [replace(middle, x=x + dx * far, y=y + dy * far) for far in way]


def render(objects: Sequence[Object]) -> np.ndarray:
    """(F, 64, 64, 3) uint8."""
    return np.stack([scenes.to_array(scenes.render([item])) for item in objects])
