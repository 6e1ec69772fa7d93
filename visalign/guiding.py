"""What a guided-sampling method is, and how one is run.

A method is a file of `visalign/steering/` with one `Method`. It asks its task what it can still afford before it spends, so that NFE and
reward calls stay within the budget; time and memory are watched here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from visalign.config import Section, validate
from visalign.errors import UserError
from visalign.findings import State
from visalign.tasks import MANY, Task


class Method(ABC):
    """Base of all guided-sampling methods: a file of `visalign/steering/` holds one.

    Its nested `Config` holds its options. With a budget of one evaluation a method returns the plain sample.
    """

    Config: ClassVar[type[Section]] = Section
    needs_reward: ClassVar[bool] = True

    settings: Any  # of the subclass's own Config

    def __init__(self, name: str = "", options: Mapping[str, Any] | None = None):
        self.name = name or type(self).__module__.rpartition(".")[2]
        self.settings = validate(type(self).Config, dict(options or {}), self.name)

    @property
    def needs_gradient(self) -> bool:
        """Whether, with its options, it climbs the gradients of rewards."""
        return False

    @abstractmethod
    def run(self, task: Task) -> Iterator[State]:
        """Search; yield a state after every part of the work that takes time, `task.keep` whatever is finished. Runs without autograd."""

    def fresh(self, task: Task, first: int, last: int, rows: Tensor | None = None) -> Iterator[State]:
        """Look at plain pictures from the noises of candidates `first` to `last` - 1, as many at a time as fill a batch."""
        rows = task.rows() if rows is None else rows
        stride = max(1, task.batch // len(rows))
        for low in range(first, last, stride):
            high = min(low + stride, last)
            own = rows.repeat_interleave(high - low)
            found = task.look(task.walk(task.noises(low, high, rows), own), own)
            task.keep(found, rows)
            assert task.best is not None
            yield task.state(high, last if last < MANY else 0, task.best, **found.figures)


def search(method: Method, task: Task) -> Iterator[State]:
    """The states of a method until it or the budget ends; the result is `task.best`.

    Raises:
        UserError: not even one picture fits into memory.
    """
    with limited(task.budget.memory, task.policy.device):
        states = method.run(task)
        while not (task.over and task.best is not None):
            try:
                with torch.no_grad(), task.counting():
                    state = next(states)
            except StopIteration:
                break
            except torch.OutOfMemoryError as error:
                if task.best is not None:
                    break
                limit = f"budget.memory={task.budget.memory:g}: " if task.budget.memory else ""
                raise UserError(f"{limit}one picture at a time does not fit ({str(error).splitlines()[0][:120]})") from None
            yield state


@contextmanager
def limited(memory: float | None, device: torch.device) -> Iterator[None]:
    """At most so many GB of a CUDA device for this process within the block, all of it afterwards; beyond, PyTorch raises."""
    if memory is None:
        yield
        return
    if device.type != "cuda":
        raise UserError(f"budget.memory: only a CUDA device's memory can be limited, and this is {device}")
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory * 1e9 / torch.cuda.get_device_properties(number).total_memory), number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, number)
