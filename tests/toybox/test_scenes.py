"""Scenes: prompts and records say the same, the split is clean, layouts meet their records, and `meets` gives credit as it says."""

from __future__ import annotations

import random

import pytest

from visalign.toybox import scenes
from visalign.toybox.scenes import Object

RED, BLUE = Object("circle", "red", 16, 32), Object("square", "blue", 48, 32)


def record(prompt: str) -> scenes.Metadata:
    found = scenes.parse(prompt)
    assert found is not None
    return found


def test_every_composition_survives_its_own_prompt() -> None:
    every = list(scenes.compositions())
    assert all(scenes.parse(scenes.describe(m)) == m for m in every)
    assert len({scenes.describe(m) for m in every}) == len(every)


def test_the_split_is_disjoint_and_does_not_see_the_order_of_naming() -> None:
    train, test = ({scenes.describe(m) for kind in scenes.prompts(t).values() for m in kind} for t in (False, True))
    assert not train & test
    assert all(kind for kind in scenes.prompts(True).values())
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for metadata in scenes.compositions():
        if len(metadata["include"]) == 2:
            first, second = ({k: v for k, v in clause.items() if k != "position"} for clause in metadata["include"])
            if "position" in metadata["include"][0]:
                second["position"] = [mirrored[metadata["include"][0]["position"][0]], 1]
            assert scenes.is_test({"tag": metadata["tag"], "include": [second, first]}) == scenes.is_test(metadata)


def test_layouts_meet_their_records_and_alterations_do_not() -> None:
    rng = random.Random(0)
    for metadata in rng.sample(list(scenes.compositions()), 300):
        objects = scenes.lay_out(metadata, rng)
        assert scenes.meets(objects, metadata) == (1.0, 1.0)
        what, changed = scenes.alter(metadata, rng)
        assert scenes.readable(changed)
        if what != "relation":  # "left of" and "above" hold together just over 30 degrees off both
            strict, dense = scenes.meets(objects, changed)
            assert strict == 0
            assert dense < 1


def test_strict_and_dense_of_hand_made_scenes() -> None:
    wish = record("a red circle and a blue square")
    assert scenes.meets([RED, BLUE], wish) == (1.0, 1.0)
    assert scenes.meets([BLUE, RED], wish) == (1.0, 1.0)
    assert scenes.meets([], wish) == (0.0, 0.0)
    ladder = [[], [RED], [RED, Object("square", "red", 48, 32)], [RED, BLUE]]
    dense = [scenes.meets(objects, wish)[1] for objects in ladder]
    assert dense == sorted(dense)
    assert len(set(dense)) == len(dense)
    strict, dense_more = scenes.meets([RED, BLUE, Object("unknown", "red", 32, 10)], wish)
    assert strict == 0
    assert dense_more < 1


def test_position_is_credited_by_angle_and_exact_from_geneval_s_rule_on() -> None:
    wish = record("a circle left of a square")
    dense = [scenes.meets([Object("circle", "red", x, y), BLUE], wish)[1] for x, y in ((60, 32), (48, 10), (40, 10), (16, 10), (16, 32))]
    assert dense == sorted(dense)
    assert dense[0] < dense[2] < dense[3] == dense[4] == 1.0
    assert scenes.meets([RED, BLUE], record("a circle right of a square"))[0] == 0


def test_clauses_of_one_shape_are_told_apart_by_colour() -> None:
    wish = record("a red circle and a blue circle")
    both = [RED, Object("circle", "blue", 48, 32)]
    assert scenes.meets(both, wish) == (1.0, 1.0)
    assert scenes.meets([RED, Object("circle", "red", 48, 32)], wish)[0] == 0


@pytest.mark.parametrize("prompt", ["a dog", "", "a circle and a circle", "a red circle and a circle", "five stars", "a red"])
def test_prompts_outside_the_grammar_are_not_read(prompt: str) -> None:
    assert scenes.parse(prompt) is None


@pytest.mark.parametrize(
    "clause",
    [{"class": "dog", "count": 1}, {"class": "star", "count": 1, "color": "pink"}, {"class": "star", "count": 1, "position": ["on", 0]}],
)
def test_records_of_another_world_are_not_readable(clause: dict) -> None:
    assert not scenes.readable({"include": [clause]})
    assert scenes.wanted({"include": [clause]}, "a star") is None
    assert scenes.wanted({}, "a star") == record("a star")
