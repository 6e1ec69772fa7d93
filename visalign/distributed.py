"""Processes and devices. With `trainer.py` and `checkpoint.py`, the only modules that know accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor

from visalign.errors import UserError

Row = TypeVar("Row")


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"run.device: {name!r} can't be used here ({str(error).splitlines()[0][:120]}); try auto or cpu") from None
    return torch.device(name)


class Processes:
    """The processes of a run: rank, sums and gathers over all of them.

    Args:
        device: as in `run.device`; several processes on CUDA take one device each.
        precision: "fp16" gets a gradient scaler; autocast belongs to the policy.
    """

    def __init__(self, device: str = "auto", precision: str = "fp32"):
        picked = pick_device(device)
        if picked.type == "cpu":
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        mixed = "fp16" if precision == "fp16" and picked.type == "cuda" else "no"
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # SD3's last block leaves its text half unused
        self.accelerator = Accelerator(cpu=picked.type == "cpu", mixed_precision=mixed, kwargs_handlers=[unused])
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes; `values` is left alone."""
        if self.count == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.count

    def max(self, values: Tensor) -> Tensor:
        if self.count == 1:
            return values
        largest = values.clone()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of ranks; every process brings as many."""
        return values if self.count == 1 else self.accelerator.gather(values.contiguous())  # pyright: ignore[reportReturnType]

    def gather_list(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other."""
        return values if self.count == 1 else gather_object(values)

    def broadcast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main process's tensors, on all of them; every process brings the same names and shapes."""
        if self.count == 1:
            return tensors
        shared = {name: value.detach().to(self.device, copy=True).contiguous() for name, value in tensors.items()}
        for value in shared.values():
            torch.distributed.broadcast(value, 0)
        return {name: value.to(tensors[name].device) for name, value in shared.items()}

    def agree(self, value: str) -> str:
        """The main process's value, on all of them."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def shard(self, count: int, what: str) -> slice:
        """This process's share of `count` rows."""
        if count % self.count:
            raise UserError(f"{what}={count} can't be split over {self.count} processes; use a multiple of {self.count}")
        share = count // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This process's part of any rows, as long on every process: of what `gather` brings back, the first `len(rows)` count."""
        share = -(-len(rows) // self.count)
        return [rows[n % len(rows)] for n in range(self.rank * share, (self.rank + 1) * share)]
