"""A Gaussian world whose guided velocity is that of another Gaussian, so that what distillation should end at has a closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visalign.families.toy import Toy
from visalign.rollout import Condition


class GuidedToy(Toy):
    """A prompt's data have their mean at `CENTRE`, the unconditional half's at 0; the velocity is affine in the mean.

    So the velocity at guidance w is that of data around w·CENTRE, and differs from the prompt's by a vector for each time, which `shift`
    can learn exactly.
    """

    CENTRE = (1.0, -0.5)

    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        index = torch.zeros(len(texts), dtype=torch.int64)
        return Condition(index, {"mean": torch.tensor([self.CENTRE])}, {"mean": torch.zeros(1, 2)})

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, sigma) + self.velocity(condition["mean"], sigma) - self.velocity(torch.tensor([self.CENTRE]), sigma)

    def velocity(self, mean: Tensor, sigma: Tensor) -> Tensor:
        """(N, 2): the part of the velocity that depends on the mean (N, 2)."""
        s, std = sigma[:, None], self.toy.std
        slope = (s - (1 - s) * std**2) / (((1 - s) * std) ** 2 + s**2)
        return -mean * (1 + slope * (1 - s))

    def taught(self, guidance: float) -> Tensor:
        """(T, 2): the shift that makes the prompt's velocity the guided one."""
        times, centre = self.toy.grid[:-1], torch.tensor([self.CENTRE]).expand(len(self.toy.grid) - 1, 2)
        return (guidance - 1) * self.velocity(centre, times)
