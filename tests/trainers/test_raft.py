"""RAFT and reward-weighted regression: who is kept, with which weight, and whose pictures they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.toy_recipes import closeness, credited, forward
from visalign.snapshots import swapped
from visalign.trainers.raft import best, differs, exponential

NAN = math.nan
REWARDS = torch.tensor([0.1, 0.9, 0.5, NAN, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, NAN])
GROUPS = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1, 2, 2, 2, 2])


def test_the_best_of_each_group_that_differs() -> None:
    assert best(REWARDS, GROUPS, 0.25).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert best(REWARDS, GROUPS, 0.5).tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert best(REWARDS, GROUPS, 1.0).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0], "what failed is never kept"
    assert best(REWARDS, GROUPS, 0.0).sum() == 2, "at least one of a group"
    assert differs(REWARDS, GROUPS).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_reward_weighted_regression_weighs_by_the_exponential() -> None:
    found = exponential(REWARDS, GROUPS, 0.5)
    raw = [math.exp(r / 0.5) for r in (0.1, 0.9, 0.5)]
    assert found[:3].tolist() == pytest.approx([3 * r / sum(raw) for r in raw], rel=1e-6)
    assert found[3:8].tolist() == [0] * 5
    assert found[8:11].sum().item() == pytest.approx(3)
    assert exponential(REWARDS, GROUPS, 1e6)[:3].tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert exponential(REWARDS, GROUPS, 1e-3)[:3].tolist() == pytest.approx([0, 3, 0], abs=1e-5)


@pytest.mark.parametrize("select", ["best", "exponential"])
def test_it_raises_the_reward(tmp_path: Path, select: str) -> None:
    trainer = forward(tmp_path, "raft", optimizer__lr=0.05, trainer__select=select, trainer__temperature=0.5)
    before = closeness(trainer)
    rows = [trainer.step(n) for n in range(1, 41)]
    assert closeness(trainer) > before + 1.0
    assert rows[0]["nfe_train"] == (2 / 8 if select == "best" else 2), "what isn't kept costs nothing"


def test_keeping_all_is_plain_fine_tuning(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "raft", trainer__keep=1.0, trainer__timesteps=1)
    ((batch,),) = trainer.minibatches(credited(trainer), 1)
    assert trainer.loss(batch).value.item() == pytest.approx((trainer.predict(batch) - batch.target).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("every", "renewed"), [(None, []), (2, [2, 4])])
def test_offline_the_pictures_stay_those_of_an_older_policy(tmp_path: Path, every: int | None, renewed: list[int]) -> None:
    trainer = forward(tmp_path, "raft", trainer__draws="old", trainer__old={"every": every}, optimizer__lr=0.05)
    kept = [p.detach().clone() for p in trainer.parameters]
    for n in range(1, 5):
        found = trainer.collect(trainer.draw(1), n).trajectory.final
        online = forward(tmp_path / "online", "raft")
        with swapped(online.parameters, kept):
            assert torch.equal(online.collect(online.draw(1), n).trajectory.final, found)
        trainer.step(n)
        if n in renewed:
            kept = [p.detach().clone() for p in trainer.parameters]
    assert not torch.equal(trainer.collect(trainer.draw(1), 1).trajectory.final, found) or not renewed
