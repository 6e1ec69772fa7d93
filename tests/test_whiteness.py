"""Is it still noise? Minima of the energies, figures of fresh noise, and noise that only looks right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visalign.noise import gaussian
from visalign.whiteness import band, describe, length_energy, whiteness_energy

SHAPE = (4, 16, 16)


def fresh(count: int, seed: int = 0) -> Tensor:
    return gaussian(SHAPE, seed, torch.arange(count), "fresh")


def slope(energy: Tensor, noise: Tensor) -> Tensor:
    return torch.autograd.grad(energy.sum(), noise)[0]


@pytest.mark.parametrize("shape", [(2,), (3, 8), SHAPE])
def test_the_length_costs_least_at_the_mode_of_the_chi_law(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    way = gaussian(shape, 1, torch.arange(1), 0).double()
    way /= way.norm()
    at = (math.sqrt(size - 1) * way).requires_grad_()
    assert slope(length_energy(at), at).abs().max() < 1e-12
    lengths = torch.linspace(0.5, 1.5, 41, dtype=torch.float64) * math.sqrt(size - 1)
    energies = length_energy(lengths.reshape(-1, *(1 for _ in shape)) * way)
    assert energies.argmin() == 20
    chi = (size - 1) * lengths.log() - lengths.square() / 2  # log density of the length but for a constant
    assert torch.allclose(energies + chi, torch.zeros(41, dtype=torch.float64), atol=1e-9)


def test_figures_of_fresh_noise_are_standard_normal_and_its_band_holds_99_percent() -> None:
    found = describe(fresh(2000))
    for name in ("length", "mean", "neighbours", "kurtosis"):
        assert abs(found[name].mean()) < 0.1, name
        assert abs(found[name].std() - 1) < 0.1, name
    limits = band(SHAPE, draws=2000, seed=5)
    for name, values in found.items():
        low, high = limits[name]
        assert ((values >= low) & (values <= high)).float().mean() > 0.975, name


@pytest.mark.parametrize(
    ("spoilt", "figure"),
    [
        (lambda x: 1.2 * x, "length"),
        (lambda x: x + 0.2, "mean"),
        (lambda x: x.sign(), "kurtosis"),
        (lambda x: (x + x.roll(1, -1)) / math.sqrt(2), "neighbours"),
        (lambda x: (x + x.roll(1, -1)) / math.sqrt(2), "covariance"),
    ],
)
def test_a_figure_tells_what_is_wrong(spoilt: object, figure: str) -> None:
    assert callable(spoilt)
    values = describe(spoilt(fresh(20)))[figure]
    low, high = band(SHAPE, draws=500)[figure]
    assert ((values < low) | (values > high)).all()


def test_whiteness_hardly_touches_fresh_noise_and_pulls_patterns_apart() -> None:
    energy = whiteness_energy(fresh(64), 0)
    assert energy.median() < 0.2
    assert energy.max() < 4
    pattern = gaussian((4, 8, 8), 0, torch.arange(8), 0).repeat_interleave(2, -1).repeat_interleave(2, -2)  # the right length, in blocks
    assert describe(pattern)["length"].abs().max() < 6
    x = pattern.clone().requires_grad_()
    before = whiteness_energy(x, 0)
    assert (before > 10).all()
    way = slope(before, x)
    after = whiteness_energy(x - 0.1 * way / way.flatten(1).norm(dim=1)[:, None, None, None], 0)
    assert (after < before).all()
    off = fresh(4) + 0.3
    assert (whiteness_energy(off, 0) > 5).all(), "the mean counts, too"


def test_energies_of_a_batch_are_those_of_its_rows() -> None:
    noise = fresh(3) + torch.tensor([0.0, 0.3, 0.6])[:, None, None, None]
    for energy in (length_energy, lambda x: whiteness_energy(x, 3)):
        assert torch.allclose(energy(noise), torch.cat([energy(row[None]) for row in noise]), rtol=1e-5)
