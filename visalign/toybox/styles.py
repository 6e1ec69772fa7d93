"""Scenes of the toybox drawn for a prompt, in the world's own look or in another: references, subjects, and targets of a style transfer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.toybox import scenes

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Style:
    """A ground, a colour that every colour of the palette is mixed with, and shapes that are drawn as others."""

    ground: Colour
    wash: Colour = (0, 0, 0)
    share: float = 0.0  # of the wash
    shapes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def palette(self) -> dict[str, Colour]:
        return {name: self._washed(colour) for name, colour in scenes.COLOURS.items()}

    def _washed(self, colour: Colour) -> Colour:
        red, green, blue = (round(c + self.share * (w - c)) for c, w in zip(colour, self.wash, strict=True))
        return red, green, blue


STYLES = {  # every colour at least 70/255 from its ground
    "plain": Style(scenes.GROUND),
    "pastel": Style((192, 192, 176), (240, 236, 232), 0.45),
    "night": Style((10, 12, 34), (190, 190, 200), 0.4),
    "ink": Style(scenes.GROUND, (15, 15, 15), 1.0),  # what the toybox's own decoder, too, can draw: it knows no other ground
    "chalk": Style(scenes.GROUND, (245, 245, 245), 1.0),
    "sparkle": Style(scenes.GROUND, shapes={"star": "sparkle"}),  # a subject: one star of its own, with four points
}


def drawn(prompt: str, metadata: scenes.Metadata, count: int, seed: int = 0, style: str = "plain") -> Tensor:
    """(count, 3, 64, 64) in [0, 1]: scenes that meet a prompt, a function of all arguments.

    Raises:
        UserError: a prompt that is not of the toybox, or an unknown style.
    """
    if style not in STYLES:
        raise UserError(f"toybox references: no style {style!r}; expected {', '.join(STYLES)}")
    record = scenes.wanted(metadata, prompt)
    if record is None:
        raise UserError(f"toybox references: {prompt!r} asks for nothing that the toybox can draw; expected such as 'two red circles'")
    rng = random.Random(json.dumps([seed, record["include"]], sort_keys=True))
    look = STYLES[style]
    corners = {shape: scenes.outline(drawn_as) for shape, drawn_as in look.shapes.items()}
    common = {"ground": look.ground, "palette": look.palette, "shapes": corners}
    pictures = [scenes.render(scenes.lay_out(record, rng), **common) for _ in range(count)]
    return torch.from_numpy(np.stack([scenes.to_array(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255
