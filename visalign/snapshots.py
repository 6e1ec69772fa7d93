"""Other values of the weights that learn: a policy of before, or the average of all policies so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Snapshot:
    """Other values of the trainable weights: a policy of before, which may follow the current one."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def follow(self, keep: float = 0.0) -> None:
        """Move to keep·own + (1 - keep)·current weights; 0 copies them."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - keep)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """These weights in place of the current ones."""
        with swapped(self.parameters, self.values):
            yield


class Average(Snapshot):
    """Exponential moving average of the trainable weights, for rollouts, evaluation and export.

    The decay warms up, min(decay, (1 + n) / (10 + n)), and `update` is called once per optimizer step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        super().__init__(parameters)
        self.decay, self.updates = decay, 0

    def update(self) -> None:
        self.follow(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """`values` in place of the parameters' data, and back."""
    shared = any(isinstance(p, DTensor) for p in parameters)  # what gathers a sharded weight keeps to its storage
    current = [p.data.clone() if shared else p.data for p in parameters]
    _put(parameters, values)
    try:
        yield
    finally:
        _put(parameters, current)


def _put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    if any(isinstance(p, DTensor) for p in parameters):
        overwrite(parameters, values)
        return
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


@torch.no_grad()
def overwrite(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy `values` into the parameters; a module that has gathered its sharded weights already must do so again."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    forgetting: set[Any] = {getattr(parameter, "forget", None) for parameter in parameters}
    for forget in forgetting - {None}:
        forget()
