"""DiffusionNFT in the Gaussian world, where the minimiser of a step has a closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.toy_recipes import closeness, forward
from visalign.forward_process import ForwardTrainer
from visalign.paths import mix, prediction_from
from visalign.rollout import Noised
from visalign.schedules import linear

MEAN, STD = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.6  # of the Gaussian world's data, for which its velocity is exact
GRID = linear(8)[:-1].double()
SLOPE = 0.1  # r - 1/2 = SLOPE · (first coordinate - its mean): linear, and far from 0 and 1


def gaussian_world(trainer: ForwardTrainer, nodes: int = 6) -> Noised:
    """The first coordinate of the world's data and its noise at the nodes of a Gauss-Hermite rule, at every time of the grid.

    Weighted as the rule says, so that averages are those over the world, not estimates; the second coordinate is its mean, without noise.
    """
    place, share = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(nodes))
    times, first, second = (axis.flatten() for axis in torch.meshgrid(GRID, place, place, indexing="ij"))
    clean = MEAN + STD * torch.stack([first, torch.zeros_like(first)], 1)
    noise = torch.stack([second, torch.zeros_like(second)], 1)
    weight = (share[:, None] * share / share.sum() ** 2 * nodes**2).repeat(len(GRID), 1).flatten()
    path, condition = trainer.policy.family.path, trainer.policy.family.encode([""] * len(clean))
    x, target, times = mix(path, clean, noise, times).float(), prediction_from(path, clean, noise, times).float(), times.float()
    return Noised(x, clean.float(), target, times, condition, 2 * SLOPE * (clean - MEAN)[:, 0].float(), weight.float())


def test_the_minimiser_of_a_step_is_the_covariance_of_optimality_and_target(tmp_path: Path) -> None:
    beta = 0.5
    trainer = forward(tmp_path, "nft", trainer__space="prediction", trainer__beta=beta, trainer__kl=0.0, credit__clip=1.0)
    batch, shift = gaussian_world(trainer), trainer.parameters[0]

    def gradient(at: Tensor) -> Tensor:
        shift.data = at
        return torch.autograd.grad(trainer.loss(batch).value, shift)[0]

    here = gradient(torch.zeros_like(shift))  # the loss is quadratic in every free vector by itself: one step of Newton's
    found = -here / (gradient(torch.ones_like(shift)) - here)
    variance = STD**2 * GRID**2 / ((1 - GRID) ** 2 * STD**2 + GRID**2)  # of clean samples given the mixture
    expected = torch.stack([2 / beta * SLOPE * -variance / GRID, torch.zeros_like(GRID)], 1)  # target = (x - clean)/t
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert expected.norm() > 0.4


def test_it_raises_the_reward_and_its_old_policy_draws(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "nft", optimizer__lr=0.05, trainer__old={"rate": 0.01, "most": 0.5})
    before = closeness(trainer)
    rows = [trainer.step(n) for n in range(1, 41)]
    assert closeness(trainer) > before + 1.0
    assert rows[0]["old/distance"] == rows[0]["kl"] == 0
    assert rows[-1]["kl"] > rows[-1]["old/distance"] > 0
    assert (rows[0]["nfe"], rows[0]["nfe_train"], rows[0]["nfe_backward"]) == (8, 6, 2)  # old, reference and current at two times
    old = mean_of(trainer)
    for value in trainer.old.values:
        value.zero_()
    assert (mean_of(trainer) - old).norm() > 0.3, "the old policy's pictures are the rollout"


def test_without_a_penalty_the_reference_costs_nothing(tmp_path: Path) -> None:
    row = forward(tmp_path, "nft", trainer__kl=0.0).step(1)
    assert row["nfe_train"] == 4
    assert "kl" not in row


def mean_of(trainer: ForwardTrainer) -> Tensor:
    return trainer.collect(trainer.draw(99), 99).trajectory.final.mean(0)
