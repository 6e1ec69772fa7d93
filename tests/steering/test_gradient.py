"""Gradient guidance: how far a step is pushed, where to, and what it costs."""

from __future__ import annotations

import pytest
import torch

from tests.steering.conftest import Run
from tests.toy_rewards import Closeness
from visalign.scoring import Panel, RewardInput
from visalign.steering.gradient import Gradient, rms


def test_the_push_is_a_share_of_the_step_along_the_gradient_whatever_the_rewards_scale(run: Run) -> None:
    pushes: list[torch.Tensor] = []
    for weight in (1.0, 1000.0):
        task, _ = run("plain", panel=Panel({"close": (Closeness(), weight)}))
        x, rows = task.noise(), task.rows()
        stepped = task.euler(x, task.predict(x, 3, rows), 3)
        pushed, clean, mean = Gradient(options={"strength": 0.3}).push(task, x, 3, rows)
        assert torch.allclose(rms(pushed - stepped), 0.3 * rms(stepped - x), rtol=1e-4)
        assert mean == pytest.approx(weight * Closeness().score(RewardInput(task.decode(clean), ["a"] * 4)).scores.mean().item())
        pushes.append(pushed - stepped)
        towards = Closeness().target - clean  # in this world ∂x̂0/∂x is a positive number, so the gradient points at the target
        assert torch.allclose(torch.cosine_similarity(pushes[-1], towards), torch.ones(4), atol=1e-4)
    assert torch.allclose(*pushes, rtol=1e-3, atol=1e-6)


def test_what_it_costs(run: Run) -> None:
    task, _ = run("gradient", range=(0.0, 1.0))
    assert (task.nfe, task.nfe_backward, task.scored) == (6, 6, 4 * 7)
    again, _ = run("gradient", range=(0.0, 0.5), repeats=3)
    assert (again.nfe, again.nfe_backward, again.scored) == (6 + 3 * 2, 9, 4 * 10)
    cheap, _ = run("gradient", range=(0.0, 1.0), through="estimate")
    assert (cheap.nfe, cheap.nfe_backward) == (6, 0)


def test_as_many_steps_as_the_budget_pays_for_spread_over_the_range(run: Run) -> None:
    task, _ = run("plain")
    method = Gradient(options={"range": (0.0, 1.0)})
    assert method.pushed(task, list(range(6))) == set(range(6))
    for spare, steps in ((0, set[int]()), (2, {3}), (4, {1, 4}), (6, {1, 3, 5}), (11.9, {0, 1, 3, 4, 5})):
        task.budget = type(task.budget)(nfe=12 + spare)  # 6 are spent, 6 are the plain picture's
        assert method.pushed(task, list(range(6))) == steps


def test_stronger_pushes_score_higher(run: Run) -> None:
    totals: list[float] = []
    for strength in (0.01, 0.2, 0.5):
        task, _ = run("gradient", n=16, strength=strength)
        assert task.best is not None
        totals.append(task.best.total.mean().item())
    assert totals == sorted(totals)


@pytest.mark.parametrize("through", ["network", "estimate"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_every_form_climbs(run: Run, through: str, repeats: int) -> None:
    plain, _ = run("plain", n=8)
    task, _ = run("gradient", n=8, through=through, repeats=repeats)
    assert task.best is not None
    assert plain.best is not None
    assert task.best.total.mean() > plain.best.total.mean() + 0.1
