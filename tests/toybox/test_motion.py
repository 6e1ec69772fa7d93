"""Scenes that move: the judge of motion tells directions apart and sees what stands still; rewards of pictures ask to be wrapped."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.rewards.segmental import Segmental
from visalign.rewards.toybox import Toybox
from visalign.scoring import Panel, RewardInput
from visalign.toybox import moving_scenes, scenes
from visalign.toybox.motion import Motion


def drawn(record: scenes.Metadata) -> Tensor:
    """(1, F, 3, 64, 64)."""
    frames = moving_scenes.render(moving_scenes.lay_out(record, random.Random(0)))
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255


def test_a_video_shows_what_its_prompt_says_and_goes_where_it_says() -> None:
    for record in moving_scenes.records(test=True)[::6]:
        text, video = scenes.describe(record), drawn(record)
        assert scenes.parse(text) == record | {"tag": "colors"}
        whole = Segmental(Toybox("strict"), segments=None, attenuation=0.0)
        assert whole.score(RewardInput(video, [text])).scores.item() == 1
        output = Motion("strict").score(RewardInput(video, [text]))
        assert output.scores.item() == 1
        assert output.components["dense"].item() > 0.9
        other = text.rpartition(" ")[0] + (" up" if record["motion"] in ("left", "right") else " left")
        assert Motion().score(RewardInput(video, [other])).scores.item() == 0
        assert Motion().score(RewardInput(video[:, :1].expand_as(video), [text])).scores.item() == 0, "it stands still"
    assert Motion().score(RewardInput(video, ["a red circle"])).scores.isnan().all()


def test_no_record_is_in_both_halves() -> None:
    train, test = ({scenes.describe(r) for r in moving_scenes.records(half)} for half in (False, True))
    assert not train & test
    assert len(test) > 20


def test_rewards_of_pictures_ask_to_be_wrapped_for_videos_and_the_other_way_round() -> None:
    video = RewardInput(torch.rand(2, 3, 3, 16, 16), ["a", "b"])
    with pytest.raises(UserError, match=r"toybox scores single pictures, and these are videos; wrap it, as in shown: \{use: segmental"):
        Panel({"shown": (Toybox(), 1.0)}).score(video)
    with pytest.raises(UserError, match="reward motion: motion scores videos, and these are pictures"):
        Panel({"motion": (Motion(), 1.0)}).expects(videos=False)
    assert video.take(slice(0, 1)).video is not None
