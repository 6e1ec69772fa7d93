"""A policy whose adapter moves the initial noise instead of the weights: the noise hypernetwork of HyperNoise (arXiv 2508.09968).

    x̂ = ε + f(ε, c),   picture = g(x̂, c)

g is the model as it was. f is the same network with an adapter, asked once at the noise's own time, of which only what the adapter adds to
the output layer is taken: 0 in the beginning, and one forward more than the plain sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.policy import Policy
from visalign.rollout import Condition


class ShiftedNoise(Policy):
    """Like `Policy`, whose arguments it takes; `start` moves the noise and `predict` knows no adapter."""

    bare = False  # whether the adapter is off right now

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
        """As in `Policy`, and on the output layer, whose adapter's output is the shift.

        Raises:
            UserError: the family doesn't say which layer that is.
        """
        if not self.family.output_layer:
            raise UserError(
                f"{self.name}: {type(self.family).__name__} names no output layer, whose adapter would predict the noise's shift"
            )
        super().add_lora(rank, alpha, [*(targets or self.family.lora_targets), self.family.output_layer])

    def start(self, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return noise + self.shift(noise, sigma, condition)

    def shift(self, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """f(ε, c), (N, ...) float32 of noise (N, ...) at its time sigma (N,)."""
        network: Any = self.family.network
        base: Any = network.get_submodule(self.family.output_layer).base_layer
        handle = base.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        try:
            return super()._forward(noise, sigma, condition.positive())
        finally:
            handle.remove()

    def _forward(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        wrapped, self.network = self.network, self.family.network  # what synchronises gradients need not know of a frozen network
        try:
            with self.reference():
                return super()._forward(x, sigma, condition)
        finally:
            self.network = wrapped

    @contextmanager
    def reference(self) -> Iterator[None]:
        """As in `Policy`, and may be nested: a backward pass that recomputes activations needs it around itself, too."""
        if self.bare:
            yield
            return
        self.bare = True
        try:
            with super().reference():
                yield
        finally:
            self.bare = False
