"""The adversarial reward: its formulas on hand, schedules, equal treatment of both sides, replay, and a state that goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import visalign
from visalign.errors import UserError
from visalign.replay import Features
from visalign.rewards.adversarial import Adversarial
from visalign.scoring import RewardInput
from visalign.toybox import styles

PROMPTS = ["a red star", "two blue circles"]


@pytest.fixture(scope="module")
def batch() -> RewardInput:
    """Two groups of three soft, dark pictures: unlike the references."""
    images = torch.cat([styles.drawn(prompt, {}, 3, seed=5) for prompt in PROMPTS])
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    return RewardInput(0.7 * F.avg_pool2d(images, 5, 1, 2), prompts, groups=torch.arange(2).repeat_interleave(3))


@pytest.fixture
def make(dino: str) -> Callable[..., Adversarial]:
    return lambda **options: Adversarial(dino, **({"references": "toybox", "count": 2} | options))


def test_score_is_the_formula(make: Callable[..., Adversarial], batch: RewardInput) -> None:
    reward = make(patches=10, image_weight=0.6)
    output = reward.score(batch)
    rounded = (batch.images * 255).round() / 255
    seen = reward.encoder.encode(rounded)
    logits = [reward.head(features * 32**0.5)[..., 0] for features in (seen.image, seen.patches)]
    torch.testing.assert_close(output.components["image"], logits[0])
    assert output.dense is not None
    torch.testing.assert_close(output.dense.flatten(1), logits[1])
    torch.testing.assert_close(output.scores, 0.6 * logits[0] + 0.4 * output.components["patch"])
    again = reward.score(batch.take(slice(1, 2)))  # the same patches, whatever the batch
    torch.testing.assert_close(again.components["patch"], output.components["patch"][1:2])
    top = make(patches=10, select="top").score(batch)
    torch.testing.assert_close(top.components["patch"], logits[1].topk(10).values.mean(1))
    everything = make(patches=1000)
    assert everything.patches == 64
    torch.testing.assert_close(everything.score(batch).components["patch"], logits[1].mean(1))


def test_gradients_pass_the_rounding_and_leave_the_head_alone(make: Callable[..., Adversarial], batch: RewardInput) -> None:
    gradients: list[Tensor] = []
    for eight_bits in (True, False):
        images = ((batch.images * 255).round() / 255).requires_grad_()  # where rounding changes nothing
        reward = make(eight_bits=eight_bits)
        reward.score(replace(batch, images=images)).scores.sum().backward()
        assert images.grad is not None
        gradients.append(images.grad)
        assert all(p.grad is None for p in reward.head.parameters())
    torch.testing.assert_close(*gradients)


def features(count: int, prompts: list[int], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, 32, generator=generator), torch.randn(count, 5, 32, generator=generator), torch.tensor(prompts))


def test_losses_are_the_formulas(make: Callable[..., Adversarial]) -> None:
    real, fake = features(3, [0, 0, 1], 0), features(4, [0, 1, 1, 2], 1)
    for loss in ("hinge", "pairwise"):
        reward = make(loss=loss, patch_loss=0.3)
        h = [[reward.head(x)[..., 0] for x in (f.image, f.patches)] for f in (real, fake)]
        if loss == "hinge":
            parts = [((1 - a).clamp_min(0).mean() + (1 + b).clamp_min(0).mean()) / 2 for a, b in zip(*h, strict=True)]
        else:
            pairs = [(0, 0), (1, 0), (2, 1), (2, 2)]
            two_way = [
                torch.stack([F.cross_entropy(torch.stack([a[i], b[j]])[None], torch.tensor([0])) for i, j in pairs]).mean()
                for a, b in ((h[0][0], h[1][0]), (h[0][1].mean(1), h[1][1].mean(1)))
            ]
            parts = two_way
        torch.testing.assert_close(reward._loss(real, fake), parts[0] + 0.3 * parts[1])


@pytest.mark.parametrize("loss", ["hinge", "pairwise"])
def test_it_learns_to_tell_them_apart(make: Callable[..., Adversarial], batch: RewardInput, loss: str) -> None:
    reward = make(loss=loss, lr=1e-3, steps=20, max_accuracy=None, r1=1e-3)
    first = reward.update(reward.real(batch), batch)
    assert (first["updated"], first["version"]) == (1, 1)
    assert reward.score(batch).info["version"] == "1"
    for _ in range(3):
        last = reward.update(reward.real(batch), batch)
    assert last["d_loss"] < 0.5 * first["d_loss"]
    assert last["d_accuracy"] > 0.9
    assert last["real"] > last["fake"]
    clean = torch.cat([styles.drawn(prompt, {}, 3, seed=9) for prompt in PROMPTS])
    assert reward.score(replace(batch, images=clean)).scores.mean() > reward.score(batch).scores.mean()
    assert not any(p.requires_grad for p in reward.head.parameters())


def test_a_head_on_pixels_learns_a_look(batch: RewardInput) -> None:
    reward = Adversarial("pixels", references="toybox:pastel", count=2, lr=1e-2, steps=20, max_accuracy=None, eight_bits=False)
    for _ in range(3):
        last = reward.update(reward.real(batch), batch)
    assert last["d_accuracy"] > 0.9
    images = batch.images.clone().requires_grad_()
    scores = reward.score(replace(batch, images=images))
    assert scores.dense is not None
    assert tuple(scores.dense.shape) == (6, 4, 4)
    (slope,) = torch.autograd.grad(scores.scores.sum(), images)
    assert (slope.mean((1, 2, 3)) > 0).all(), "towards the lighter ground of the references"
    direction = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        up, down = (reward.score(replace(batch, images=batch.images + sign * direction)).scores.sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (slope * direction).sum(), rtol=1e-2, atol=1e-4)
    alone = reward.score(batch.take(slice(2, 3)))
    torch.testing.assert_close(alone.scores, scores.scores[2:3].detach())


def test_schedules(make: Callable[..., Adversarial], batch: RewardInput) -> None:
    def updated(reward: Adversarial, real: RewardInput, calls: int) -> list[float]:
        return [reward.update(real, batch)["updated"] for _ in range(calls)]

    reward = make(every=3, max_accuracy=None)
    assert updated(reward, reward.real(batch), 6) == [0, 0, 1, 0, 0, 1]
    reward = make(schedule="trigger", lr=1e-3, steps=20, max_accuracy=None)
    real = reward.real(batch)
    assert updated(reward, real, 2) == [1, 0]  # once at first; then references score higher, and nobody is hacking
    hacked = reward.update(batch, replace(batch, images=torch.cat([styles.drawn(p, {}, 3) for p in PROMPTS])))
    assert hacked["fake"] > hacked["real"]
    assert hacked["updated"] == 1
    reward = make(lr=1e-3, steps=30, max_accuracy=0.75)
    assert updated(reward, reward.real(batch), 4)[-1] == 0  # right too often


def test_both_sides_have_one_size_and_each_reference_comes_once(make: Callable[..., Adversarial], batch: RewardInput) -> None:
    reward = make()
    large = replace(batch, images=F.interpolate(batch.images, (96, 96)))
    real = reward.real(large)
    assert tuple(real.images.shape) == (4, 3, 96, 96)  # two prompts, two references each
    assert real.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert torch.equal(reward.real(batch).images, torch.cat([styles.drawn(prompt, {}, 2) for prompt in PROMPTS]))
    with pytest.raises(UserError, match="adversarial has no reference pictures"):
        make(references=None).real(batch)


def test_the_state_goes_on_exactly(make: Callable[..., Adversarial], batch: RewardInput) -> None:
    options: dict[str, Any] = {"replay": 8, "lr": 1e-3, "max_accuracy": None, "patches": 7}
    once, first = make(**options), make(**options)
    real = once.real(batch)
    expected = [once.update(real, batch) for _ in range(4)]
    assert expected[:2] == [first.update(real, batch) for _ in range(2)]
    second = make(**options)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert expected[2:] == [second.update(real, batch) for _ in range(2)]
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in once.state_dict().items())
    assert second.spec.version == "4"
    with pytest.raises(UserError, match="were options changed"):
        make(patches=9).load_state_dict(state)


def test_a_run_gives_its_head_to_others(make: Callable[..., Adversarial], batch: RewardInput, tmp_path: Path) -> None:
    trained = make()
    trained.update(trained.real(batch), batch)
    state = {f"critic/{name}": value for name, value in trained.state_dict().items()}
    save_file(state | {"other/weight": torch.zeros(1)}, tmp_path / "rewards.safetensors")
    for path in (tmp_path, tmp_path / "rewards.safetensors"):
        assert torch.equal(make(head=str(path)).score(batch).scores, trained.score(batch).scores)
    with pytest.raises(UserError, match="can't be read"):
        make(head=str(tmp_path / "nowhere"))
    save_file({"other/weight": torch.zeros(1)}, tmp_path / "rewards.safetensors")
    with pytest.raises(UserError, match="holds 0 heads"):
        make(head=str(tmp_path))


def test_nobody_is_judged_by_a_head_that_has_learned_nothing(dino: str) -> None:
    with pytest.raises(UserError, match="has learned nothing"):
        visalign.score(torch.rand(1, 3, 64, 64), "a red star", {"adversarial": {"checkpoint": dino}})


def test_building_leaves_the_callers_random_numbers_alone(make: Callable[..., Adversarial]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make()
    assert torch.equal(torch.rand(2), expected)
    with pytest.raises(UserError, match="image_weight"):
        make(image_weight=1.5)
    with pytest.raises(UserError, match="at least 1"):
        make(steps=0)
