"""Random numbers that depend on names, not on order: every row of noise is a function of (seed, id, stream).

Splitting a batch, adding ranks or resuming therefore changes no picture, which a generator shared by the rows cannot promise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """A 64-bit seed from a list of names, the same on every platform and in every version of Python.

    `seed_for(1, 23)` and `seed_for(12, 3)` differ, as do `seed_for(1)` and `seed_for("1")`.
    """
    names = [part if isinstance(part, str) else int(part) for part in parts]
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little")


def gaussian(
    shape: Sequence[int],
    seed: int,
    ids: Tensor,
    stream: int | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal rows (N, *shape).

    Drawn in float32 on the CPU, whatever `dtype` and `device` are, so that both only round and move the same numbers.

    Args:
        shape: of one row.
        seed: the run's.
        ids: (N,) int64, one per row; equal ids get equal rows.
        stream: tells the draws for one id apart: "initial", the number of a step, …
    """
    return _rows(torch.randn, shape, seed, ids, stream).to(device, dtype)


def uniform(shape: Sequence[int], seed: int, ids: Tensor, stream: int | str, device: torch.device | str = "cpu") -> Tensor:
    """Rows (N, *shape) of float32 in [0, 1); arguments as in `gaussian`."""
    return _rows(torch.rand, shape, seed, ids, stream).to(device)


def _rows(draw: Callable[..., Tensor], shape: Sequence[int], seed: int, ids: Tensor, stream: int | str) -> Tensor:
    rows = torch.empty(len(ids), *shape)
    generator = torch.Generator()
    for row, name in zip(rows, ids.cpu(), strict=True):
        generator.manual_seed(seed_for(seed, int(name), stream))
        draw(tuple(shape), generator=generator, out=row)
    return rows
