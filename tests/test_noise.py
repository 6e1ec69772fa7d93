"""Noise: a function of (seed, id, stream) and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from visalign.noise import gaussian, seed_for, uniform

IDS = torch.tensor([5, 0, 123456789012, 5, 7])


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8)])
def test_rows_do_not_depend_on_the_split(shape: tuple[int, ...]) -> None:
    whole = gaussian(shape, 3, IDS, "initial")
    assert torch.equal(whole, torch.cat([gaussian(shape, 3, IDS[rows], "initial") for rows in (slice(0, 2), slice(2, 5))]))
    assert torch.equal(whole.flip(0), gaussian(shape, 3, IDS.flip(0), "initial"))
    assert torch.equal(whole[0], whole[3])


def test_seed_id_and_stream_each_matter() -> None:
    base = gaussian((16,), 3, IDS, 0)
    for other in (gaussian((16,), 4, IDS, 0), gaussian((16,), 3, IDS + 1, 0), gaussian((16,), 3, IDS, 1), gaussian((16,), 3, IDS, "0")):
        assert not (base == other).any()


def test_standard_normal() -> None:
    rows = gaussian((8, 8), 0, torch.arange(2000), 0)
    assert_close(rows.mean((0, 1, 2)), torch.tensor(0.0), rtol=0, atol=0.01)
    assert_close(rows.std((0, 1, 2)), torch.tensor(1.0), rtol=0, atol=0.01)
    neighbours = (rows[1:] * rows[:-1]).mean()
    assert abs(neighbours.item()) < 0.01


def test_uniform() -> None:
    rows = uniform((16,), 0, torch.arange(2000), "choice")
    assert 0 <= rows.min() <= rows.max() < 1
    assert_close(rows.mean((0, 1)), torch.tensor(0.5), rtol=0, atol=0.01)
    assert_close(rows.var((0, 1)), torch.tensor(1 / 12), rtol=0, atol=0.005)
    assert torch.equal(rows[3:5], uniform((16,), 0, torch.tensor([3, 4]), "choice"))


def test_precision_only_rounds() -> None:
    assert torch.equal(gaussian((16,), 3, IDS, 0, torch.bfloat16), gaussian((16,), 3, IDS, 0).bfloat16())
    assert gaussian((4, 2), 3, IDS[:0], 0).shape == (0, 4, 2)


def test_seeds_are_stable_and_apart() -> None:
    assert seed_for(1, 23, "x") == 2270658292890480766
    parts: list[tuple[int | str, ...]] = [(1, 23), (12, 3), (1,), ("1",), ("1", "2"), ("1', '2",), ()]
    assert len({seed_for(*part) for part in parts}) == len(parts)
    assert all(0 <= seed_for(*part) < 2**64 for part in parts)
