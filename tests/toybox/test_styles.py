"""Scenes for a prompt: what it asks for, always the same, and in other looks the same scenes."""

from __future__ import annotations

import pytest
import torch

from visalign.errors import UserError
from visalign.toybox import scenes, styles
from visalign.toybox.perception import perceive


def test_scenes_meet_their_prompt_and_are_a_function_of_it() -> None:
    for prompt in ("two red circles", "a blue star left of a ring"):
        found = styles.drawn(prompt, {}, 4)
        assert tuple(found.shape) == (4, 3, 64, 64)
        record = scenes.parse(prompt)
        assert record
        assert all(scenes.meets(objects, record)[0] == 1 for objects in perceive(found))
        assert torch.equal(styles.drawn(prompt, {}, 4), found)
        assert not torch.equal(styles.drawn(prompt, {}, 4, seed=1), found)
        assert not torch.equal(found[0], found[1])
    assert torch.equal(styles.drawn("anything", {"include": [{"class": "star", "count": 1}]}, 1), styles.drawn("a star", {}, 1))


def test_a_style_is_the_same_scenes_in_other_colours() -> None:
    plain, pastel = (styles.drawn("a red star", {}, 2, style=style) for style in ("plain", "pastel"))
    ground = torch.tensor(styles.STYLES["pastel"].ground).view(3, 1, 1) / 255
    contrast = [(picture - picture[:, :, :1, :1]).abs().amax(1) for picture in (plain, pastel)]
    inked = [values > values.amax() / 2 for values in contrast]
    assert (inked[0] == inked[1]).float().mean() > 0.99
    assert torch.equal(pastel[0, :, :1, :1], ground)
    for style in styles.STYLES.values():
        for colour in style.palette.values():
            assert torch.dist(torch.tensor(colour).float(), torch.tensor(style.ground).float()) >= 70


def test_a_subject_is_a_shape_of_its_own() -> None:
    plain, sparkle = (styles.drawn("a red star and a blue ring", {}, 3, style=style) for style in ("plain", "sparkle"))
    changed = (plain != sparkle).any(1)
    ring = (plain[:, 2] > 0.7) & (plain[:, 0] < 0.3)
    assert 0 < changed.float().mean() < 0.08
    assert not (changed & ring).any(), "only the star is another one"


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="a dog"):
        styles.drawn("a dog", {}, 1)
    with pytest.raises(UserError, match="no style 'cubist'"):
        styles.drawn("a star", {}, 1, style="cubist")
