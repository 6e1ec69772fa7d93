"""The shipped vision-language model, asked as every reward of its kind asks: scenes that were drawn for the prompt score above others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from visalign import registry
from visalign.scoring import RewardInput
from visalign.toybox import scenes

COUNT = 24


def drawn() -> tuple[Tensor, list[str], list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Held-out scenes, their prompts and records, and those with an attribute (not a place) changed so that the scene misses them."""
    rng, by_kind = random.Random(5), scenes.prompts(test=True)
    records = [rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]]) for n in range(COUNT)]
    layouts = [scenes.lay_out(record, rng) for record in records]
    wrong: list[dict[str, Any]] = []
    for record, layout in zip(records, layouts, strict=True):
        while True:
            attribute, other = scenes.alter(record, rng)
            if attribute != "relation" and not scenes.meets(layout, other)[0]:
                wrong.append(other)
                break
    pictures = torch.stack([torch.from_numpy(scenes.to_array(scenes.render(layout)).copy()) for layout in layouts])
    images = pictures.permute(0, 3, 1, 2).float() / 255
    return images, [scenes.describe(r) for r in records], records, [scenes.describe(r) for r in wrong], wrong


@pytest.mark.parametrize(
    ("name", "least", "options"),
    [
        ("vlm_yes", 0.95, {}),
        ("prompt_echo", 0.85, {}),
        ("vlm_rating", 0.85, {"aspects": ["prompt_following"]}),
        ("listener", 0.8, {}),
    ],
)
def test_true_prompts_score_above_changed_ones(name: str, least: float, options: dict[str, Any]) -> None:
    images, true, records, false, wrong = drawn()
    reward = registry.load("rewards", name)("toybox/vlm", **options)
    with torch.no_grad():
        right, other = (reward.score(RewardInput(images, t, r)).scores for t, r in ((true, records), (false, wrong)))
    assert (right > other).float().mean() >= least


def test_of_two_pictures_it_prefers_the_one_that_was_asked_for() -> None:
    images, true, records, *_ = drawn()
    shown = torch.stack([images, images.roll(1, 0)], 1).flatten(0, 1)
    twice = [text for text in true for _ in range(2)]
    groups = torch.arange(COUNT).repeat_interleave(2)
    reward = registry.load("rewards", "pairwise_winrate")("toybox/vlm")
    with torch.no_grad():
        wins = reward.score(RewardInput(shown, twice, [r for r in records for _ in range(2)], groups=groups)).scores.unflatten(0, (-1, 2))
    assert (wins[:, 0] > wins[:, 1]).float().mean() >= 0.9
