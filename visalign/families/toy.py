"""Flows over the plane with known answers: a Gaussian, and a mixture of Gaussians.

The base velocity is exact; what learns is one free vector per step of the grid, added to it. On the Gaussian every mean is then a linear
recursion, so the optimum of a trainer has a closed form (`Toy.optimum`). Loads as `toy:gaussian` or `toy:mixture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import Flow, mean_weights
from visalign.policy import Family
from visalign.rollout import Condition
from visalign.sampling import Dynamics
from visalign.schedules import linear

WORLDS = {  # weights, means and std of the data's components
    "gaussian": ((1.0,), ((1.0, -0.5),), 0.6),
    "mixture": ((0.4, 0.3, 0.3), ((2.0, 0.0), (-1.0, 1.5), (-1.0, -1.5)), 0.35),
}
SPAN = 20.0  # a "picture" is (3, 16, 16), all of one colour: the point's coordinates, ± SPAN / 2 mapped to [0, 1], and a constant


class ToyNetwork(nn.Module):
    """Exact velocity E[x1 - x0 | x] of the mixture plus `shift` (T, 2), read at the grid time nearest to sigma."""

    weights: Tensor
    means: Tensor
    grid: Tensor

    def __init__(self, weights: Tensor, means: Tensor, std: float, grid: Tensor):
        super().__init__()
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("grid", grid)
        self.std = std
        self.shift = nn.Parameter(torch.zeros(len(grid) - 1, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.base(x, sigma) + self.shift[(sigma[:, None] - self.grid[:-1]).abs().argmin(1)]

    def base(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(N, 2): the mean of x1 - x0 under each component's posterior, weighted by its responsibility."""
        s = sigma[:, None, None]
        offset = x[:, None] - (1 - s) * self.means  # (N, K, 2)
        variance = ((1 - s) * self.std) ** 2 + s**2
        slope = (s - (1 - s) * self.std**2) / variance  # Cov(x1 - x0, x) / Var(x)
        share = (self.weights.log() - (offset**2 / variance).sum(-1) / 2 - variance[..., 0].log()).softmax(1)
        return (share[..., None] * (slope * offset - self.means)).sum(1)


class Toy(Family):
    """Args:
    world: "gaussian" or "mixture".
    steps: T of the grid on which the free vectors live.
    guided: whether it takes guidance, which changes nothing, as its unconditional half says the same.
    """

    def __init__(self, world: str = "gaussian", steps: int = 8, guided: bool = False):
        if world not in WORLDS:
            raise UserError(f"no toy world {world!r}; known: {', '.join(WORLDS)}")
        weights, means, std = WORLDS[world]
        self.path, self.latent_shape, self.steps = Flow(), (2,), steps
        self.negative: dict[str, Tensor] | None = {} if guided else None
        self.toy = self.network = ToyNetwork(torch.tensor(weights), torch.tensor(means), std, linear(steps))

    @classmethod
    def load(cls, source: str, **options: Any) -> Toy:
        return cls(source.partition(":")[2], **options)

    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        return Condition(torch.zeros(len(texts), dtype=torch.int64), {}, self.negative)

    def grid(self, steps: int) -> Tensor:
        return linear(steps)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, sigma)

    def decode(self, latents: Tensor) -> Tensor:
        flat = latents / SPAN + 0.5
        return torch.cat([flat, torch.full_like(flat[:, :1], 0.5)], 1)[:, :, None, None].expand(-1, -1, 16, 16)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.points(images)

    @staticmethod
    def points(images: Tensor) -> Tensor:
        """(N, 2) coordinates back from `decode`'s pictures."""
        return (images[:, :2, 0, 0] - 0.5) * SPAN

    def optimum(self, dynamics: Dynamics, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Best `shift` (T, 2) and the mean (2,) it reaches, for r = -½‖x - target‖² less beta times the path KL; the Gaussian world.

        The last step is an ODE step and keeps its shift of 0. With P_j = Π_{i>j} ∂μ_i/∂x the shift moves the final mean by Σ κ_j P_j θ_j,
        at a price of beta Σ κ_j² ‖θ_j‖² / 2ς_j²; so θ_j = ς_j² P_j (target - mean) / (beta κ_j), a linear equation in the mean.
        """
        grid = self.toy.grid.double()
        t, t_next = grid[:-1], grid[1:]
        step = dynamics(self.path, t, t_next)
        last = torch.arange(len(t)) == len(t) - 1
        a, c, std = step.a, torch.where(last, self.path.coefficients(t_next)[1], step.c), torch.where(last, 0.0, step.std)
        x = torch.zeros(len(t), 2, dtype=torch.float64)
        base = self.toy.double().base
        offset, slope = base(x, t), (base(x + 1, t) - base(x, t))[:, 0]
        self.toy.float()
        gamma, kappa = mean_weights(self.path, a, c, t)
        push, carry = gamma + kappa * slope, kappa[:, None] * offset  # μ_{j+1} = push μ_j + carry
        later = torch.stack([push[j + 1 :].prod() for j in range(len(t))])
        mean = (later[:, None] * carry).sum(0)  # the initial noise has mean 0
        reach = ((std * later) ** 2).sum() / beta
        final = (mean + reach * target) / (1 + reach)
        return (std**2 * later / (beta * kappa))[:, None] * (target - final), final
