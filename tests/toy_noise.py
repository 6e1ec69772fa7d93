"""The toy's Gaussian as variance-preserving diffusion with an ε-predicting network: `policy.family: tests.toy_noise:NoisePlane`."""

from __future__ import annotations

import torch
from torch import Tensor

from visalign.families.toy import WORLDS, Toy, ToyNetwork
from visalign.paths import VariancePreserving

PATH = VariancePreserving(torch.linspace(0.995, 0.005, 100, dtype=torch.float64))


def times(steps: int) -> Tensor:
    return torch.linspace(99, -1, steps + 1)


class NoiseNetwork(ToyNetwork):
    """Exact noise E[x1 | x] of one Gaussian plus `shift`."""

    def base(self, x: Tensor, sigma: Tensor) -> Tensor:
        alpha, noise = (part[:, None] for part in PATH.coefficients(sigma))
        return noise * (x - alpha * self.means) / ((alpha * self.std) ** 2 + noise**2)


class NoisePlane(Toy):
    def __init__(self, world: str = "gaussian", steps: int = 8):
        super().__init__(world, steps)
        weights, means, std = WORLDS[world]
        self.path = PATH
        self.toy = self.network = NoiseNetwork(torch.tensor(weights), torch.tensor(means), std, times(steps))

    def grid(self, steps: int) -> Tensor:
        return times(steps)
