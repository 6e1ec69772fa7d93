"""Calibration: the published rule by hand, where it settles, and that a file is used only for what it was made for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.calibration import Calibration, Purpose, calibrate, load, save
from visalign.errors import UserError

PURPOSE = Purpose(policy="sd3", steps=3, guidance=4.5, transition="dance_sde", rewards=("clip", "ocr"))


def test_the_published_rule_by_hand() -> None:
    seen: list[Tensor] = []

    def signs(levels: Tensor) -> Tensor:
        seen.append(levels)
        # balanced; one more worse than better; two more better than worse; no gain that is not 0
        return torch.tensor([[1.0, -1.0, 1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]])

    found = calibrate(signs, torch.tensor([0.7, 0.7, 0.7, 0.7]), rounds=2, step=0.1, lowest=0.0, highest=2.0)
    assert_close(found.levels, torch.tensor([0.9, 0.9, 0.5, 0.9], dtype=torch.float64))
    assert found.imbalance.tolist() == [[0, -1, 2, 0]] * 2
    assert found.history.shape == (3, 4)
    assert_close(torch.stack(seen), found.history[:-1])
    assert_close(found.history[-1], found.levels)


def test_levels_stay_within_bounds_and_steps_without_gains_stay_put() -> None:
    def signs(levels: Tensor) -> Tensor:
        return torch.tensor([[1.0, 1.0, math.nan], [-1.0, 1.0, math.nan]])

    found = calibrate(signs, torch.tensor([0.5, 0.5, 0.9]), rounds=9, step=0.1, lowest=0.3, highest=0.8)
    assert_close(found.levels, torch.tensor([0.8, 0.3, 0.8], dtype=torch.float64))
    assert found.history[:, 2].unique().tolist() == [0.8]  # the bound, from the first
    assert found.history.min() == 0.3


def world(levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Gains that hurt more often the more noise a step has: balanced up to a level of 0.2, 0.5 and 0.8."""
    edge = torch.tensor([0.2, 0.5, 0.8])
    hurt = 0.5 + 2 * (levels.float() - edge).clamp(min=0)
    return torch.where(torch.rand(count, 3, generator=generator) < hurt, -1.0, 1.0)


def test_a_tolerance_that_suits_the_count_finds_the_balance_and_the_published_one_sinks() -> None:
    for count in (24, 200):
        generator = torch.Generator().manual_seed(count)
        tolerance = {"published": 2.0, "suited": 1.5 * count**0.5}
        found = {
            name: calibrate(
                lambda levels: world(levels, count, generator),  # noqa: B023
                torch.full((3,), 0.4),
                rounds=300,
                tolerance=value,
                lowest=0.05,
                highest=1.0,
            )
            .history[-100:]
            .mean(0)
            for name, value in tolerance.items()
        }
        assert_close(found["suited"], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64) + 0.3 / count**0.5, rtol=0, atol=0.1)
        assert (found["published"] < 0.15).all()


def test_ranks_agree_when_their_counts_are_summed() -> None:
    gains = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    options = {"rounds": 1, "tolerance": 3, "lowest": 0.0, "highest": 1.0}
    counts: list[Tensor] = []
    for rows in (slice(0, 5), slice(5, 12)):
        calibrate(lambda _, r=rows: gains[r], torch.full((3,), 0.5), total=lambda value: counts.append(value) or value, **options)
    whole = calibrate(lambda _: gains, torch.full((3,), 0.5), **options)
    part = calibrate(lambda _: gains[:5], torch.full((3,), 0.5), total=lambda _: counts[0] + counts[1], **options)
    assert part.imbalance.tolist() == whole.imbalance.tolist()
    assert_close(part.levels, whole.levels)


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"lowest": 1.0, "highest": 0.5}, {"step": 0.0}, {"levels": torch.ones(2, 3)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    options = {"levels": torch.ones(3), "rounds": 1, "lowest": 0.0, "highest": 2.0} | wrong
    with pytest.raises(ValueError, match="calibration wants levels"):
        calibrate(lambda levels: levels[None], **options)


def some() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return calibrate(lambda _: torch.randn(8, 3, generator=generator), torch.tensor([0.7, 0.8, 0.9]), rounds=4, lowest=0.0, highest=2.0)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    made, path = some(), tmp_path / "folder" / "psi.json"
    save(path, made, PURPOSE)
    found = load(path, PURPOSE)
    for name in ("levels", "history", "imbalance"):
        assert torch.equal(getattr(found, name), getattr(made, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "flux"}, "policy 'sd3', not 'flux'"),
        ({"guidance": 1.0}, "guidance 4.5, not 1.0"),
        ({"transition": "flow_sde"}, "transition 'dance_sde', not 'flow_sde'"),
        ({"rewards": ("clip",)}, r"rewards \('clip', 'ocr'\), not \('clip',\)"),
        ({"steps": 10, "policy": "x"}, "policy 'sd3', not 'x'; steps 3, not 10"),
    ],
    ids=["policy", "guidance", "transition", "rewards", "two"],
)
def test_a_file_is_refused_for_another_purpose(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save(tmp_path / "psi.json", some(), PURPOSE)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "psi.json", replace(PURPOSE, **change))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "psi.json"
    with pytest.raises(UserError, match=r"psi\.json does not exist"):
        load(path, PURPOSE)
    save(path, some(), PURPOSE)
    content = json.loads(path.read_text())
    for broken in ("", "[]", "{}", json.dumps(content | {"made_for": {"policy": "sd3"}}), json.dumps(content | {"levels": "high"})):
        path.write_text(broken)
        with pytest.raises(UserError, match="is not a calibration"):
            load(path, PURPOSE)
    for levels in ([0.5], [0.5, 0.5, math.nan], [0.5, 0.5, -0.1]):
        path.write_text(json.dumps(content | {"levels": levels}))
        with pytest.raises(UserError, match="must hold a level >= 0 for each of 3 steps"):
            load(path, PURPOSE)
