"""Search over paths: where it branches, what it keeps, what it costs."""

from __future__ import annotations

import pytest
import torch

from tests.steering.conftest import Run
from visalign.errors import UserError
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
