"""The OCR reward: its formula, and the real engine on drawn text."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visalign.errors import UserError
from visalign.rewards import ocr
from visalign.rewards.ocr import Ocr, character_iou, edit_distance, normalise, target_text, text_score
from visalign.scoring import RewardInput


def drawn(text: str, size: int = 48) -> Tensor:
    """(3, 512, 512) picture of dark text on a light ground."""
    picture = Image.new("RGB", (512, 512), (236, 230, 214))
    ImageDraw.Draw(picture).text((40, 200), text, fill=(30, 20, 70), font=ImageFont.load_default(size))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> Ocr:
    return Ocr()


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("recognised", "score", "exempt"),
    [
        ("open", 1, 1),
        ("", 0, 0),
        ("opfn", 0.75, 0.75),
        ("op", 0.5, 0.5),
        ("xopenx", 0.5, 1),  # two letters too many
        ("openopenopen", 0, 1),  # the distance never counts for more than the target is long
        ("zzzzzzzz", 0, 0),
    ],
)
def test_text_score(recognised: str, score: float, exempt: float) -> None:
    assert text_score(recognised, "open") == pytest.approx(score)
    assert text_score(recognised, "open", exempt_substring=True) == pytest.approx(exempt)


def test_character_iou_pays_for_repetition() -> None:
    assert character_iou("open", "open") == 1
    assert character_iou("openopen", "open") == 0.5
    assert character_iou("", "open") == 0


@pytest.mark.parametrize(
    ("prompt", "metadata", "target"),
    [
        ('A sign that says "Open Now" by a "door"', {}, "Open Now"),
        ('A sign that says "Open"', {"text": "Closed"}, "Closed"),
        ("A sign", {"text": "Closed"}, "Closed"),
        ("A sign", {}, None),
        ('A sign that says "Open', {}, None),
        ('A sign that says ""', {}, ""),
    ],
)
def test_target_text(prompt: str, metadata: dict[str, str], target: str | None) -> None:
    assert target_text(prompt, metadata) == target


def test_normalise() -> None:
    assert normalise(" Fresh\tBread \n") == "freshbread"


def test_reads_drawn_text(reward: Ocr) -> None:
    images = torch.stack(
        [drawn("Fresh Bread"), drawn("Fresh Bxead"), drawn("Blue Moon"), torch.rand(3, 512, 512, generator=torch.manual_seed(0))]
    )
    output = reward.score(RewardInput(images, ['a shop window with "Fresh Bread" on it'] * 4))
    assert output.scores.dtype == torch.float32
    assert output.valid.all()
    assert output.scores[0] == output.components["exact"][0] == output.components["iou"][0] == 1
    assert output.scores[1] == pytest.approx(0.9)
    assert output.components["exact"][1] == 0
    assert (output.scores[2:] < 0.3).all()
    assert normalise(output.info["texts"][0]) == "freshbread"


def test_lines_are_joined_and_channels_kept(reward: Ocr) -> None:
    output = reward.score(RewardInput(drawn("SUMMER\nSALE").unsqueeze(0), ["a poster"], [{"text": "Summer Sale"}]))
    assert output.scores.tolist() == [1]


def test_extra_text_costs_unless_exempt(reward: Ocr) -> None:
    batch = RewardInput(drawn("Open All Day").unsqueeze(0), ['a sign reading "Open"'])
    assert reward.score(batch).scores.tolist() == [0]
    assert Ocr(exempt_substring=True).score(batch).scores.tolist() == [1]


def test_unscorable_is_invalid_not_zero(reward: Ocr) -> None:
    images = torch.stack([drawn("Open")] * 4)
    images[3, 0, 0, 0] = math.nan
    output = reward.score(RewardInput(images, ["a sign", 'a sign ""', 'a sign "Open"', 'a sign "Open"']))
    assert output.valid.tolist() == [False, False, True, False]
    assert output.scores[2] == 1
    for scores in (output.scores, *output.components.values()):
        assert torch.equal(scores.isfinite(), output.valid)


def test_one_engine_per_process(reward: Ocr) -> None:
    assert Ocr(exempt_substring=True).engine is reward.engine


def test_missing_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    ocr._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install visalign\[ocr\]"):
        Ocr()
