"""Noise, signal and loopholes of rewards whose answers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from visalign.perturb import perturbed
from visalign.reward_check import HACKS, measure, spearman
from visalign.scoring import Panel, Reward, RewardInput, RewardOutput, RewardSpec


class Corner(Reward):
    """The first pixel: moved by every shift."""

    spec = RewardSpec("corner")

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images[:, 0, 0, 0])


class Colour(Reward):
    """How colourful a picture is, or minus that."""

    def __init__(self, sign: float = 1.0):
        self.spec, self.sign = RewardSpec("colour"), sign

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(self.sign * (batch.images.amax(1) - batch.images.amin(1)).mean((1, 2)))


class Named(Reward):
    """How red a picture is, or how little where the prompt says so."""

    spec = RewardSpec("named")

    def score(self, batch: RewardInput) -> RewardOutput:
        signs = torch.tensor([-1.0 if prompt == "dark" else 1.0 for prompt in batch.prompts])
        return RewardOutput.of(signs * (batch.images[:, 0].mean((1, 2)) - 0.5))


def base() -> RewardInput:
    coarse = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(0.3 + 0.4 * coarse, 40, mode="bicubic").clamp(0, 1)
    return RewardInput(images, ["p"] * 16, groups=torch.arange(16) // 4)


def test_measure() -> None:
    found = measure(Panel({"corner": (Corner(), 1.0), "colour": (Colour(), 1.0), "dull": (Colour(-1.0), 1.0)}), base())
    rewards = found["rewards"]
    assert json.loads(json.dumps(found)) == found
    assert all(reward["valid"] == 1 and reward["repeat"] == 0 for reward in rewards.values())
    copies = torch.stack([images[..., 0, 0, 0] for images in (base().images, *(perturbed(base().images, n) for n in range(6)))])
    assert rewards["corner"]["noise"] == pytest.approx(copies.var(0, correction=0).mean().sqrt().item())
    assert rewards["corner"]["spread"] == pytest.approx(base().images[:, 0, 0, 0].view(4, 4).std(1, correction=0).mean().item())
    assert rewards["colour"]["noise"] == pytest.approx(rewards["dull"]["noise"])
    assert rewards["colour"]["signal"] == pytest.approx(rewards["colour"]["spread"] / rewards["colour"]["noise"])
    assert {name for name, hack in rewards["colour"]["hacks"].items() if not hack["passed"]} == {"saturated", "noise"}
    assert {name for name, hack in rewards["dull"]["hacks"].items() if not hack["passed"]} == {"grey"}
    assert found["spearman"]["colour"]["dull"] == pytest.approx(-1.0)
    assert found["spearman"]["corner"]["corner"] == pytest.approx(1.0)


def test_pictures_are_held_against_other_prompts() -> None:
    levels = torch.tensor([0.9, 0.8, 0.1, 0.7])  # two bright and two dark ones, the last of them under the wrong prompt
    images = levels.view(4, 1, 1, 1).expand(4, 3, 8, 8)
    pairs = RewardInput(images, ["bright", "bright", "dark", "dark"], groups=torch.tensor([3, 3, 8, 8]))
    found = measure(Panel({"named": (Named(), 1.0), "corner": (Corner(), 1.0)}), pairs, changes=1)["rewards"]
    assert found["named"]["prompt"] == pytest.approx(0.75)
    assert found["corner"]["prompt"] is None, "it doesn't read"
    assert found["corner"]["range"] == pytest.approx(0.8)


def test_hacks_are_what_their_names_say() -> None:
    images = base().images
    changed = {name: hack(images) for name, hack in HACKS.items()}
    assert all(picture.shape == images.shape and 0 <= picture.min() <= picture.max() <= 1 for picture in changed.values())
    assert torch.equal(changed["tiled"][..., :20, :20], changed["tiled"][..., 20:, 20:])
    torch.testing.assert_close(changed["saturated"].mean(), images.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [1, 4, 9, 16], 1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, math.nan, 2, 3], [3, 9, 2, 1], -1.0),
        ([1, 2], [5, 5], math.nan),
    ],
)
def test_spearman(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(Tensor(a), Tensor(b)) == pytest.approx(expected, nan_ok=True)
