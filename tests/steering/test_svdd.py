"""SVDD chooses among the model's own steps."""

from __future__ import annotations

import torch

from tests.steering.conftest import Run
from visalign.steering.svdd import SVDD


def test_a_step_costs_as_many_forwards_as_it_has_places(run: Run) -> None:
    task, states = run("svdd", proposals=5)
    assert task.nfe == 1 + 5 * 5, "the chosen place's prediction is known"
    assert task.scored == 4 * (5 * 5 + 1)
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6]


def test_the_more_to_choose_from_the_better(run: Run) -> None:
    totals: list[float] = []
    for proposals in (2, 4, 16):
        task, _ = run("svdd", n=32, proposals=proposals)
        assert task.best is not None
        totals.append(task.best.total.mean().item())
    assert totals == sorted(totals)


def test_a_temperature_chooses_by_shares(run: Run) -> None:
    task, _ = run("plain", n=1000)
    values = torch.tensor([[0.0, 1.0, 2.0]]).expand(1000, -1)
    cold, warm = (SVDD(options={"temperature": heat}).choose(values, task, "choice") % 3 for heat in (0.0, 1.0))
    assert (cold == 2).all()
    share = torch.nn.functional.one_hot(warm, 3).double().mean(0)
    assert torch.allclose(share, values[0].double().softmax(0), atol=0.06)
