"""What the toybox's vision-language models learn from: scenes, some of them melted, and questions about them with their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from visalign.questions import CAPTION, POINT, RATE, REASON, fill
from visalign.toybox import scenes

PATCH = 8  # pixels
SIDE = scenes.SIZE // PATCH
MELTED = 1 / 8  # share of pictures with an object between two shapes
REASONS = {"shape": "the shape is wrong", "colour": "the colour is wrong", "count": "the number is wrong", "relation": "the place is wrong"}
RIGHT = "all is right"


@dataclass(frozen=True)
class Pictures:
    """Scenes: `images` (N, 3, 64, 64) uint8, `layouts` (a melted object has the shape "unknown") and `records` they were drawn for."""

    images: Tensor
    layouts: list[list[scenes.Object]]
    records: list[scenes.Metadata]

    def centres(self, n: int) -> list[tuple[int, int, int]]:
        """(patch, shape, colour) of every object of picture n that is one."""
        return [
            (int(o.y // PATCH) * SIDE + int(o.x // PATCH), scenes.SHAPES.index(o.shape), list(scenes.COLOURS).index(o.colour))
            for o in self.layouts[n]
            if o.shape in scenes.SHAPES
        ]


def draw(count: int, seed: int, test: bool = False, melted: float = MELTED) -> Pictures:
    """`count` scenes of the train (or test) compositions, the six kinds in equal shares."""
    rng = random.Random(seed)
    by_kind = scenes.prompts(test)
    records = [rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]]) for n in range(count)]
    images: list[np.ndarray] = []
    layouts: list[list[scenes.Object]] = []
    for record in tqdm(records, "scenes", leave=False):
        layout = scenes.lay_out(record, rng)
        image = scenes.to_array(scenes.render(layout))
        if rng.random() < melted:
            k = rng.randrange(len(layout))
            other = replace(layout[k], shape=rng.choice([s for s in scenes.SHAPES if s != layout[k].shape]))
            mixed = scenes.to_array(scenes.render([*layout[:k], other, *layout[k + 1 :]]))
            image = (image.astype(np.uint16) + mixed).astype(np.uint16) // 2
            layout = [*layout[:k], replace(other, shape="unknown"), *layout[k + 1 :]]
        images.append(image.astype(np.uint8))
        layouts.append(layout)
    return Pictures(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), layouts, records)


def changed(record: scenes.Metadata, rng: random.Random) -> tuple[str, scenes.Metadata]:
    """One attribute changed; never into a held-out composition, which must not be learnt as a wrong one either."""
    while True:
        attribute, other = scenes.alter(record, rng)
        if not scenes.is_test(other):
            return attribute, other


def rival(record: scenes.Metadata, rng: random.Random) -> Tensor:
    """(3, 64, 64) uint8, a scene that misses the record in one attribute."""
    while True:
        other = changed(record, rng)[1]
        if sum(clause["count"] for clause in other["include"]) <= max(scenes.NUMBERS):
            layout = scenes.lay_out(other, rng)
            if scenes.meets(layout, record)[0] == 0:
                return torch.from_numpy(scenes.to_array(scenes.render(layout)).copy()).permute(2, 0, 1)


def painted(record: scenes.Metadata, layout: Sequence[scenes.Object]) -> scenes.Metadata:
    """The record with the colours that its objects happen to have, where all objects of a clause have one."""
    clauses = [dict(clause) for clause in record["include"]]
    for clause in clauses:
        colours = {o.colour for o in layout if o.shape == clause["class"]}
        if len(colours) == 1 and sum(c["class"] == clause["class"] for c in clauses) == 1:
            clause["color"] = colours.pop()
    return record | {"include": clauses}


def recoloured(record: scenes.Metadata, rng: random.Random) -> scenes.Metadata:
    """Two colours swapped, or one changed."""
    clauses = [dict(clause) for clause in record["include"]]
    coloured = [clause for clause in clauses if "color" in clause]
    if len(coloured) == 2 and coloured[0]["color"] != coloured[1]["color"] and rng.random() < 0.5:
        coloured[0]["color"], coloured[1]["color"] = coloured[1]["color"], coloured[0]["color"]
    elif coloured:
        clause = rng.choice(coloured)
        clause["color"] = rng.choice([c for c in scenes.COLOURS if c != clause["color"]])
    return record | {"include": clauses}


def asked(layout: Sequence[scenes.Object], record: scenes.Metadata, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about a picture with their answers."""
    attribute, wrong = changed(record, rng)
    further = changed(wrong, rng)[1]
    melted = any(o.shape == "unknown" for o in layout)

    def meets(wanted: scenes.Metadata) -> bool:
        return scenes.meets(layout, wanted)[0] == 1

    explained, rated = rng.choice([record, wrong]), rng.choice([record, wrong, further])
    reason = RIGHT if meets(explained) else REASONS["shape" if melted else attribute]
    coloured = painted(record, layout)
    about = [record, wrong, *(r for r in (coloured, recoloured(coloured, rng)) if not scenes.is_test(r))]
    answers = [(fill(POINT, scenes.describe(r)), "yes" if meets(r) else "no") for r in about]
    answers += [(fill(REASON, scenes.describe(explained)), f"{reason}. answer: {'yes' if reason == RIGHT else 'no'}")]
    answers += [(fill(RATE, scenes.describe(rated)), str(1 + round(4 * scenes.meets(layout, rated)[1])))]
    return answers if melted else [*answers, (CAPTION, scenes.describe(record))]  # nothing true can be said of a melted object
