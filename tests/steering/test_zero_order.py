"""Zero-order search stays on the shell on which noise lies, and climbs."""

from __future__ import annotations

import torch

from tests.steering.conftest import Run
from visalign.steering.zero_order import neighbours


def test_neighbours_have_the_pivots_length_and_the_cosine_asked_for() -> None:
    rng = torch.Generator().manual_seed(0)
    pivot, noise = torch.randn(3, 4, 16, 16, generator=rng), torch.randn(15, 4, 16, 16, generator=rng)
    around = neighbours(pivot, noise, 0.95)
    own = pivot.repeat_interleave(5, 0)
    length, wanted = (x.flatten(1).double().norm(dim=1) for x in (around, own))
    assert ((length / wanted - 1).abs() < 1e-6).all()
    cosine = torch.cosine_similarity(around.flatten(1).double(), own.flatten(1).double())
    assert (cosine - 0.95).abs().max() < 1e-6
    apart = torch.cdist(around.flatten(1), around.flatten(1)) > 1
    assert int(apart.sum()) == 15 * 14, "each in a direction of its own"


def test_the_length_survives_many_moves() -> None:
    rng = torch.Generator().manual_seed(0)
    first = pivot = torch.randn(2, 64, generator=rng)
    for _ in range(200):
        pivot = neighbours(pivot, torch.randn(2, 64, generator=rng), 0.9)
    assert ((pivot.double().norm(dim=1) / first.double().norm(dim=1) - 1).abs() < 1e-6).all()


def test_it_climbs_from_iteration_to_iteration(run: Run) -> None:
    task, states = run("zero_order", n=8, iterations=12, neighbours=3, similarity=0.9)
    best = [state.record()["best"] for state in states]
    assert best == sorted(best)
    assert best[-1] > best[0]
    assert task.nfe == 6 * (1 + 12 * 3)
    assert [state.step for state in states] == list(range(13))
