"""Search over paths: where it branches, what it keeps, what it costs."""

from __future__ import annotations

import pytest
import torch

from tests.steering.conftest import Run
from visalign.errors import UserError
from visalign.paths import Flow, VariancePreserving, mix, renoise
from visalign.steering.path_search import PathSearch, best


def test_the_rounds_overlap_and_arrive() -> None:
    assert PathSearch().plan(10) == (3, [(2, 5), (4, 7), (6, 9), (8, 10)])
    assert PathSearch(options={"start": 0.0, "back": 2, "ahead": 4}).plan(6) == (1, [(0, 4), (2, 6)])
    assert PathSearch().plan(2) == (1, [(0, 2)])
    assert PathSearch().plan(1)[1] == []


def test_what_it_costs_and_that_it_helps(run: Run) -> None:
    task, _ = run("path_search", n=16, paths=2, branches=3)
    start, plan = PathSearch().plan(6)
    assert task.nfe == 2 * (start + 3 * sum(last - first for first, last in plan))
    assert task.scored == 16 * 2 * 3 * len(plan)
    single, _ = run("best_of_n", n=16, candidates=2)
    assert task.best is not None
    assert single.best is not None
    assert task.best.total.mean() > single.best.total.mean()


def test_paths_that_never_arrive_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match="ahead=2 must be more than back=2"):
        run("path_search", ahead=2, back=2)


def test_the_best_of_all_branches_of_a_picture_go_on() -> None:
    totals = torch.tensor([[0.1, 0.9, 0.5, 0.9], [-torch.inf, 2.0, -torch.inf, 1.0]])
    assert best(totals, 2).tolist() == [[1, 3], [5, 7]]


@pytest.mark.parametrize("path", [Flow(), VariancePreserving(torch.linspace(0.999, 0.001, 100))], ids=["flow", "vp"])
def test_renoised_states_have_the_marginals_of_the_noisier_time(path: Flow | VariancePreserving) -> None:
    rng = torch.Generator().manual_seed(0)
    times = torch.tensor([0.3, 0.7]) if isinstance(path, Flow) else torch.tensor([30.0, 70.0])
    clean, first, second = torch.full((50000, 2), 1.5), *(torch.randn(50000, 2, generator=rng) for _ in range(2))
    back = renoise(path, mix(path, clean, first, times[0]), times[0], times[1], second)
    direct = mix(path, clean, second, times[1])
    assert torch.allclose(back.mean(0), direct.mean(0), atol=0.02)
    assert torch.allclose(back.std(0), direct.std(0), atol=0.02)
    end = torch.tensor(0.0 if isinstance(path, Flow) else -1.0)
    assert torch.allclose(renoise(path, clean, end, times[1], second), direct, atol=1e-5), "from clean latents it is the forward process"
