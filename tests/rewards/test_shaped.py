"""Shaping: every form against its formula, ranks against a hand-made table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.rewards.shaped import Shaped, ranks
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Level(Reward):
    """The mean of a picture; NaN stays NaN."""

    spec = RewardSpec("level", differentiable=True)

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.mean((1, 2, 3)))


def inputs(values: list[float], prompts: list[str], groups: list[int] | None = None) -> RewardInput:
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2).clone()
    return RewardInput(images, prompts, groups=None if groups is None else torch.tensor(groups))


BASE = inputs([0.1, 0.3, 0.5, 0.9], ["a", "a", "b", "c"])
REFERENCES = torch.tensor([0.1, 0.3, 0.5, 0.9])
STD = REFERENCES.std(correction=0)
RAW, PROMPTS = [0.4, 0.4, 0.4, math.nan], ["a", "b", "new", "a"]
CENTRE = torch.tensor([0.2, 0.5, 0.45])


def shaped(form: Any, **options: Any) -> Tensor:
    reward = Shaped(Level(), form=form, **options)
    reward.calibrate(BASE)
    output = reward.score(inputs(RAW, PROMPTS))
    assert output.valid.tolist() == [True, True, True, False]
    torch.testing.assert_close(output.components["level"], torch.tensor(RAW), equal_nan=True)
    low, high = reward.spec.range
    assert ((output.scores[:3] >= low) & (output.scores[:3] <= high)).all()
    return output.scores[:3]


def test_par_is_the_mean_sigmoid_over_the_prompts_own_references() -> None:
    def mean(k: Tensor | float, references: list[float]) -> Tensor:
        return torch.sigmoid(k * (0.4 - torch.tensor(references))).mean()

    own = [[0.1, 0.3], [0.5], [0.1, 0.3, 0.5, 0.9]]
    torch.testing.assert_close(shaped("par"), torch.stack([mean(1 / STD, r) for r in own]))
    torch.testing.assert_close(shaped("par", k=3.0), torch.stack([mean(3.0, r) for r in own]))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("centred", 0.4 - CENTRE),
        ("tanh", torch.tanh((0.4 - CENTRE) / STD)),
        ("clip", torch.tensor([0.4, 0.4, 0.4])),
        ("min_max", torch.full((3,), 0.375)),
        ("mean_std", (0.4 - CENTRE) / STD),
        ("ceiling", torch.full((3,), 0.4)),
        ("lsc", F.logsigmoid((0.4 - CENTRE) / STD - 1.0364334)),
    ],
)
def test_the_relatives(form: str, expected: Tensor) -> None:
    torch.testing.assert_close(shaped(form), expected)


def test_clip_and_ceiling_hold_back_outliers_alone() -> None:
    for form, limit in (("clip", 0.2 + STD.item()), ("ceiling", 0.9)):
        reward = Shaped(Level(), form=form)  # type: ignore[arg-type]
        reward.calibrate(BASE)
        found = reward.score(inputs([5.0, 0.2], ["a", "a"])).scores
        assert found.tolist() == pytest.approx([limit, 0.2])


def test_shaping_keeps_the_order_of_a_group() -> None:
    values = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    for form in ("par", "centred", "tanh", "min_max", "mean_std", "lsc"):
        reward = Shaped(Level(), form=form)  # type: ignore[arg-type]
        reward.calibrate(BASE)
        assert torch.equal(reward.score(inputs(values, ["a"] * 12)).scores.argsort(), torch.tensor(values).argsort())


def test_ranks_by_hand() -> None:
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 7.0, math.nan, 5.0])
    groups = torch.tensor([4, 4, 4, 4, 9, 9, 9])
    # 1 < 2 < 3 = 3 of four: (1 - ½)/4, (2 - ½)/4, twice (3.5 - ½)/4; of two: ¼ and ¾
    expected = torch.tensor([0.75, 0.125, 0.75, 0.375, 0.75, math.nan, 0.25])
    torch.testing.assert_close(ranks(scores, groups), expected, equal_nan=True)
    torch.testing.assert_close(ranks(scores.exp(), groups), expected, equal_nan=True)


def test_rank_is_of_a_group_and_needs_no_references() -> None:
    reward = Shaped(Level(), form="rank")
    assert (reward.spec.scope, reward.spec.differentiable, reward.base_pictures) == ("group", False, 0)
    assert "groups" in reward.spec.needs
    output = reward.score(inputs([0.2, 0.1, 0.9], ["a"] * 3, [0, 0, 1]))
    assert output.scores.tolist() == [0.75, 0.25, 0.5]
    assert output.scores.mean() == 0.5


def test_references_from_a_file_equal_those_that_were_seen(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"a": [0.1, 0.3], "b": 0.5, "c": [0.9]}))
    lines = [{"prompt": "a", "scores": [0.1, 0.3]}, {"prompt": "b", "scores": 0.5}, {"prompt": "c", "scores": [0.9]}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = shaped("par")
    for name in ("r.json", "r.jsonl"):
        reward = Shaped(Level(), references=str(tmp_path / name))
        assert reward.base_pictures == 0
        torch.testing.assert_close(reward.score(inputs(RAW, PROMPTS)).scores[:3], seen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no reference scores"),
        ('{"a": ["x"]}', "holds no reference"),
        ('{"a": 1}', "has 1 reference scores"),
        ("[1]", "holds no"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Shaped(Level(), references=str(tmp_path / "r.json"))


def test_references_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="valid scores of level for the untrained model's pictures are all the same"):
        Shaped(Level()).calibrate(inputs([0.5, 0.5, math.nan], ["a"] * 3))
    with pytest.raises(UserError, match="k must be above 0"):
        Shaped(Level(), k=0.0)
    with pytest.raises(UserError, match="must see pictures of the untrained model first"):
        Shaped(Level()).score(BASE)
