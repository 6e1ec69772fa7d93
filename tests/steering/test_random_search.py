"""Random search goes on in doubling rounds where a picture is not good enough yet."""

from __future__ import annotations

import torch

from tests.steering.conftest import Run


def test_rounds_double_and_equal_best_of_n(run: Run) -> None:
    task, states = run("random_search", rounds=4, sampler={"steps": 6, "batch": 16})
    best, _ = run("best_of_n", candidates=15)
    assert [state.step for state in states] == [1, 3, 7, 11, 15], "a batch holds four candidates of four pictures"
    assert task.nfe == best.nfe == 15 * 6
    assert task.best is not None
    assert best.best is not None
    assert torch.allclose(task.best.latents, best.best.latents)


def test_what_is_good_enough_is_left_alone(run: Run) -> None:
    whole, _ = run("best_of_n", n=16, candidates=31)
    task, _ = run("random_search", n=16, rounds=5, target=-1.0)
    assert task.best is not None
    assert whole.best is not None
    assert task.nfe < whole.nfe
    assert torch.equal(task.best.total >= -1, whole.best.total >= -1), "whoever can reach it does"
    easy, _ = run("random_search", n=16, rounds=5, target=-1e9)
    assert easy.nfe == 6
