"""Segmental video reward: which frames, which weights, and what a wrapper passes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visalign import registry
from visalign.errors import UserError
from visalign.rewards.segmental import Segmental, frame_weights
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Brightness(Reward):
    """Mean pixel, invalid above 0.9; remembers the prompts it was prepared for."""

    def __init__(self, **spec: object):
        self.spec = RewardSpec("brightness", differentiable=True, range=(0.0, 1.0), needs=frozenset({"prompt"}))
        for name, value in spec.items():
            object.__setattr__(self.spec, name, value)
        self.prepared: list[str] = []

    def score(self, batch: RewardInput) -> RewardOutput:
        assert len(batch.images) == len(batch.prompts) == len(batch.metadata)
        mean = batch.images.mean((1, 2, 3))
        length = torch.tensor([len(prompt) for prompt in batch.prompts], dtype=torch.float32)
        return RewardOutput.of(torch.where(mean > 0.9, math.nan, mean), components={"length": length})

    def prepare(self, prompts: object, metadata: object) -> None:
        self.prepared += list(prompts)  # type: ignore[call-overload]

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert set(state) == {"weight"}


def videos(count: int) -> RewardInput:
    """Two videos of `count` flat frames: the second is 0.1 brighter, brightness grows by 0.01 a frame."""
    levels = torch.arange(count) / 100 + torch.tensor([[0.2], [0.3]])
    video = levels.view(2, count, 1, 1, 1).expand(2, count, 3, 4, 4).contiguous()
    return RewardInput(video[:, 0], ["a", "abc"], video=video)


def test_the_papers_weights() -> None:
    expected = [math.exp(-abs(n - 8)) for n in range(16)]
    torch.testing.assert_close(frame_weights(torch.arange(16), 16, 1.0), torch.tensor(expected))


def test_score_is_the_weighted_sum_over_segments() -> None:
    output = Segmental(Brightness(), segments=4, attenuation=0.5, random=False).score(videos(16))
    assert output.info["frames"] == (2, 6, 10, 14)
    for n, base in enumerate((0.2, 0.3)):
        expected = sum(math.exp(-0.5 * abs(i - 8)) * (base + i / 100) for i in (2, 6, 10, 14)) / 4
        assert output.scores[n].item() == pytest.approx(expected, abs=1e-6)
    assert output.components["length"].tolist() == [1.0, 3.0]


def test_all_frames_without_attenuation_are_the_mean() -> None:
    reward = Segmental(Brightness(), segments=None, attenuation=0.0)
    assert reward.spec.deterministic
    batch = videos(7)
    assert batch.video is not None
    torch.testing.assert_close(reward.score(batch).scores, batch.video.mean((1, 2, 3, 4)))
    assert reward.spec.range == (0.0, 1.0)


def test_random_frames_are_one_of_each_segment_and_resume() -> None:
    reward = Segmental(Brightness(), segments=3, seed=5)
    assert not reward.spec.deterministic
    drawn = [reward.frames(10) for _ in range(200)]
    seen = [set(column.tolist()) for column in torch.stack(drawn).unbind(1)]
    assert seen == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8, 9}]
    again = Segmental(Brightness(), segments=3, seed=5)
    assert torch.equal(torch.stack([again.frames(10) for _ in range(200)]), torch.stack(drawn))
    fresh = Segmental(Brightness(), segments=3, seed=6)
    fresh.load_state_dict(reward.state_dict())
    assert torch.equal(fresh.frames(10), reward.frames(10))


def test_an_invalid_frame_makes_a_video_invalid() -> None:
    batch = videos(8)
    assert batch.video is not None
    batch.video[1, -1] = 0.95
    assert Segmental(Brightness(), segments=None).score(batch).valid.tolist() == [True, False]


def test_what_is_passed_on() -> None:
    inner = Brightness()
    reward = Segmental(inner)
    reward.prepare(["x"], [{}])
    assert inner.prepared == ["x"]
    assert reward.spec.differentiable
    assert reward.spec.needs == {"prompt", "video"}
    assert set(reward.state_dict()) == {"brightness/weight", "generator"}
    built = registry.load_reward("segmental", of={"use": "clip_score", "checkpoint": "toybox"}, segments=2)
    assert isinstance(built, Segmental)


def test_bad_inputs_are_user_errors() -> None:
    with pytest.raises(UserError, match="lower the option segments"):
        Segmental(Brightness(), segments=9).score(videos(8))
    for spec in ({"modality": "video"}, {"scope": "group"}):
        with pytest.raises(UserError, match="single pictures"):
            Segmental(Brightness(**spec))
