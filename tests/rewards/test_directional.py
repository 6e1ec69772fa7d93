"""D²-Align's direction: the guided text, what stage 1 finds, and that the prompt still counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.rewards.clip_score import ClipScore
from visalign.rewards.directional import Directional, fit_direction, guided
from visalign.rewards.jpeg import Jpeg
from visalign.scoring import RewardInput

PROMPTS = ["a red star", "two blue circles", "a green ring left of a cross", "a black square"]


def unit(rows: int, seed: int, width: int = 12) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def pictures(count: int = 4) -> RewardInput:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(coarse, 64, mode="bicubic").clamp(0, 1)
    return RewardInput(images, (PROMPTS * count)[:count])


def test_guided_text_by_hand_and_to_first_order() -> None:
    text, direction = unit(3, 0), unit(1, 1)[0]
    ahead, behind = F.normalize(text + direction, dim=-1), F.normalize(text - direction, dim=-1)
    torch.testing.assert_close(guided(text, direction, 1.5), F.normalize(1.5 * ahead - 0.5 * behind, dim=-1))
    torch.testing.assert_close(guided(text, direction, 1.0), ahead)
    torch.testing.assert_close(guided(text, 0 * direction, 1.5), text)
    small = 1e-4 * direction
    across = small - (text * small).sum(-1, keepdim=True) * text
    torch.testing.assert_close(guided(text, small, 1.5), F.normalize(text + 2 * across, dim=-1), rtol=0, atol=1e-7)


def test_the_paper_objective_has_its_supremum_where_the_prompt_is_forgotten() -> None:
    image, text = F.normalize(unit(64, 2) + 2 * unit(1, 3), dim=-1), unit(64, 4)
    scores = [
        (image * guided(text, fit_direction(image, text, 1.5, steps=800, lr=0.05, radius=r), 1.5)).sum(-1).mean() for r in (0.1, 1.0, 50.0)
    ]
    assert scores == sorted(scores)
    far = guided(text, fit_direction(image, text, 1.5, steps=2000, lr=0.5, radius=1e4), 1.5)
    assert (far @ far.T).min() > 0.95, "all texts have become one"
    near = guided(text, fit_direction(image, text, 1.5, steps=200, lr=0.05, radius=0.3), 1.5)
    assert (near @ near.T).fill_diagonal_(0).max() < 0.9


def test_stage_one_finds_the_best_direction_of_its_radius() -> None:
    image, text = unit(32, 5), unit(32, 6)
    found = fit_direction(image, text, 1.5, steps=400, lr=0.01, radius=0.3)
    assert found.norm().item() == pytest.approx(0.3, rel=1e-3)
    best = (image * guided(text, found, 1.5)).sum(-1).mean()
    others = 0.3 * unit(200, 7)
    assert all((image * guided(text, other, 1.5)).sum(-1).mean() < best for other in others)


def test_without_a_direction_it_is_the_member_and_with_one_it_is_kinder_to_the_base(tmp_path: Path) -> None:
    member, batch = ClipScore("toybox", scale=2.5), pictures(16)
    plain = member.score(batch).scores
    save_file({"rewards/x/direction": torch.zeros(96)}, tmp_path / "zero.safetensors")
    torch.testing.assert_close(Directional(member, direction=str(tmp_path / "zero.safetensors")).score(batch).scores, plain)
    reward = Directional(member, steps=100)
    with pytest.raises(UserError, match="directional must see pictures of the untrained model first"):
        reward.score(batch)
    reward.calibrate(batch)
    output = reward.score(batch)
    assert output.scores.mean() > plain.mean()
    torch.testing.assert_close(output.components["clip_score"], plain)
    assert reward.state_dict()["direction"].shape == (96,)
    save_file(reward.state_dict(), tmp_path / "found.safetensors")
    again = Directional(member, direction=str(tmp_path / "found.safetensors"))
    torch.testing.assert_close(again.score(batch).scores, output.scores)
    assert again.spec.version == reward.spec.version


def test_the_fit_does_not_depend_on_who_asks() -> None:
    first, second = Directional(ClipScore("toybox"), steps=30), Directional(ClipScore("toybox"), steps=30)
    first.calibrate(pictures(8))
    with torch.no_grad():
        second.calibrate(pictures(8))
    assert torch.equal(first.known("direction"), second.known("direction"))


def test_bad_options_are_user_errors() -> None:
    with pytest.raises(UserError, match="jpeg has no picture and text encoder"):
        Directional(Jpeg())
    with pytest.raises(UserError, match="leave baseline out"):
        Directional(ClipScore("toybox", baseline="a picture"))
    with pytest.raises(UserError, match="omega >= 1"):
        Directional(ClipScore("toybox"), omega=0.5)
