"""AWM on the Gaussian world: direction, ratio, penalties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.toy_recipes import closeness, credited, forward


def test_it_raises_the_reward(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "awm", optimizer__lr=0.05)
    before = closeness(trainer)
    rows = [trainer.step(n) for n in range(1, 41)]
    assert closeness(trainer) > before + 1.0
    assert all(row["ratio/max_deviation"] == 0 for row in rows), "one update per rollout: nothing has moved"
    assert rows[-1]["kl"] > rows[-1]["anchor"] > 0
    assert rows[0]["nfe_train"] == 6


def test_its_gradient_is_the_advantage_weighted_error_of_matching(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "awm", trainer__weighting="uniform", trainer__kl=0.0, trainer__anchor=0.0, trainer__timesteps=1)
    ((batch,),) = trainer.minibatches(credited(trainer), 1)
    shift = trainer.parameters[0]
    found = torch.autograd.grad(trainer.loss(batch).value, shift)[0]
    errors = (trainer.predict(batch) - batch.target).square().mean(1)
    assert torch.allclose(found, torch.autograd.grad((batch.credit / 5 * errors).mean(), shift)[0], atol=1e-7)


@pytest.mark.parametrize("draws", ["current", "old"])
def test_later_updates_are_held_against_the_policy_that_drew(tmp_path: Path, draws: str) -> None:
    trainer = forward(tmp_path, "awm", trainer__updates=2, trainer__draws=draws, trainer__clip=1e-4, optimizer__lr=0.05)
    row = trainer.step(1)
    assert row["ratio/max_deviation"] == 0, "of the first update alone"
    assert row["ratio/std"] > 1e-5
    assert row["clip/high"] + row["clip/low"] > 0.1
