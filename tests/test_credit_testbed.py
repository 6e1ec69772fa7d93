"""The testbed of credit: its truth is true, its counts are the formulas, and dense credit and trees beat the terminal reward in it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks.credit import ESTIMATORS, HERE, collect, gradients, judged, transitions
from benchmarks.credit_report import report
from benchmarks.credit_truth import STEPS, World


def moved(name: str) -> World:
    """A world whose policy is not the base."""
    world = World.of(name)
    with torch.no_grad():
        world.family.toy.shift.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return world


def test_closed_form_of_the_value_is_nested_monte_carlo() -> None:
    world, generator = moved("gaussian"), torch.Generator().manual_seed(1)
    x, k = torch.randn(33, 2, generator=generator), torch.arange(33) % (STEPS + 1)
    drawn = world.nested(x, k, 4000, generator)
    error = drawn.std(1) / 4000**0.5
    random = k < STEPS - 1  # what follows the last stochastic step has one outcome
    assert ((drawn.mean(1) - world.closed(x, k)).abs()[random] < 4 * error[random]).all()
    assert_close(drawn.mean(1)[~random].double(), world.closed(x, k)[~random], atol=1e-5, rtol=0)


def test_gradient_in_closed_form_along_paths_and_from_the_truth() -> None:
    world = moved("gaussian")
    exact = world.gradient()
    assert ((world.pathwise(20_000) - exact).norm() / exact.norm()).item() < 0.03
    drawn = collect(world, ESTIMATORS["terminal, own noise"], 250, seed=0)
    before, values = drawn.trajectory.before, world.values(drawn.trajectory)[0]
    truth = replace(drawn, advantages=values[:, before + 1] - values[:, before])
    assert ((gradients(world, truth).mean(0) - exact).norm() / exact.norm()).item() < 0.1  # the policy gradient theorem


def test_values_of_the_mixture_come_twice_with_independent_errors() -> None:
    world = World.of("mixture")
    drawn = collect(world, ESTIMATORS["tree"], 4, seed=0)
    one, two = world.values(drawn.trajectory)
    shared = drawn.trajectory.node[:, None] == drawn.trajectory.node
    assert torch.equal((one[:, None] == one)[shared], torch.ones_like(one[:, None] == one)[shared]), "a shared state has one value"
    assert_close(one[:, -1], two[:, -1])  # nothing random follows
    assert 0 < (one - two)[:, 0].abs().max() < 0.3


@pytest.mark.parametrize(("name", "groups"), [("gaussian", 80), ("mixture", 40)])
def test_gain_and_tree_tell_more_of_the_truth_than_terminal_credit(name: str, groups: int) -> None:
    world = World.of(name)
    found = {n: judged(world, ESTIMATORS[n], groups) for n in ("terminal", "terminal, mean of 2", "gain, n = t", "tree")}
    terminal, averaged, dense, tree = found.values()
    assert dense["correlation"] > averaged["correlation"] + 0.3
    assert dense["nfe"] == pytest.approx(averaged["nfe"], rel=0.02)
    assert tree["correlation"] > terminal["correlation"] + 2 * math.hypot(tree["error"], terminal["error"])
    assert tree["nfe"] < 0.62 * terminal["nfe"]
    assert terminal["bias"] < 0.15 < dense["bias"]


def test_cost_is_the_formula() -> None:
    world = World.of("gaussian")
    chain = STEPS - 1 + 1 / 16  # a group shares its noise, and what the network says of it
    later = (STEPS - 1) * (STEPS - 2) / 2  # first steps reuse the rollout's predictions
    want = {
        "terminal": (chain, 1),
        "terminal, mean of 2": (chain + later, 1 + STEPS - 2),
        "gain, n = 1": (chain, 1 + STEPS - 1 + 1 / 16),
        "gain, n = t": (chain + later + (STEPS - 1) / 16, 1 + STEPS - 2 + 1 / 16),  # that noise is completed once
        "tree": ((1 + 2 + 2 + 4 + 8 + 8 + 4 * 16) / 16, 1),
        "own_branch": ((STEPS - 1 + 4 * STEPS * (STEPS - 1) / 2) / (4 * (STEPS - 1)), 1),
    }
    for name, (nfe, scored) in want.items():
        drawn = collect(world, ESTIMATORS[name], 2, seed=0)
        assert (drawn.metrics["nfe"], drawn.metrics["scored"]) == (pytest.approx(nfe), pytest.approx(scored)), name
        assert len(transitions(drawn)[0]) == int(drawn.trajectory.distinct().sum())


def test_the_page_is_made_from_the_result() -> None:
    found = json.loads((HERE / "results" / "credit.json").read_text())
    assert (HERE / "credit.md").read_text() == report(found), "run python -m benchmarks.credit"
