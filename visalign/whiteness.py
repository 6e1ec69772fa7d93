"""Is noise that was optimised still noise? Energies that pull it back to where fresh noise lies, and figures that say how far off it is.

Unlike a penalty on the length alone, which a pattern of the right length passes, mean, neighbours and covariance are looked at too.

Legend: N noises of d elements each, `...` latent axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.noise import gaussian
from visalign.paths import wide

WIDTH = 4  # elements of the sub-vectors whose covariance is looked at


def length_energy(noise: Tensor) -> Tensor:
    """½‖ε‖² - (d - 1)·log‖ε‖, (N,): -log density of a Gaussian vector's length, but for a constant (ReNO, arXiv 2406.04312).

    Its minimum lies at ‖ε‖ = √(d - 1); it knows no direction.
    """
    flat = wide(noise).flatten(1)
    square = flat.square().sum(1)
    return square / 2 - (flat.shape[1] - 1) * square.log() / 2


def whiteness_energy(noise: Tensor, seed: int, shuffles: int = 10, width: int = WIDTH) -> Tensor:
    """-log of a bound on the probability of so large a mean and covariance, (N,): the regulariser of DNO (arXiv 2405.18881).

    The noise is cut into n vectors of k = `width` elements, once as it lies and once per shuffle, whose energies are averaged. For fresh
    noise P(‖m‖ > M) ≤ 2·exp(-n·M²/2k) of their mean m, and P(‖C - I‖ > M) ≤ 2·exp(-n·max(√(1 + M) - 1 - √(k/n), 0)²/2) of their
    covariance C in spectral norm. Where a bound says nothing (≥ 1) its energy is 0: typical noise is hardly pulled.

    Args:
        seed: of the shuffles, the same for all N.
    """
    flat = wide(noise).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in range(shuffles)]) if shuffles else None
    energy = _energy(flat[:, None], width)[:, 0]
    return energy if orders is None else energy + _energy(flat[:, orders.to(flat.device)], width).mean(1)


def _energy(flat: Tensor, width: int) -> Tensor:
    """(N, P): of noises (N, P, d)."""
    vectors = _vectors(flat, width)
    count, width = vectors.shape[-2:]
    far = count * vectors.mean(-2).square().sum(-1) / (2 * width)
    spread = ((1 + _distortion(vectors)).sqrt() - 1 - math.sqrt(width / count)).clamp_min(0)
    return (far - math.log(2)).clamp_min(0) + (count * spread.square() / 2 - math.log(2)).clamp_min(0)


def _vectors(flat: Tensor, width: int) -> Tensor:
    """(…, n, k): sub-vectors of (…, d); what is left over at the end is dropped."""
    width = min(width, flat.shape[-1])
    count = flat.shape[-1] // width
    return flat[..., : count * width].unflatten(-1, (count, width))


def _distortion(vectors: Tensor) -> Tensor:
    """(…,): ‖C - I‖ of vectors (…, n, k), the largest factor by which a direction's variance is off."""
    covariance = vectors.mT @ vectors / vectors.shape[-2]
    return torch.linalg.eigvalsh(covariance - torch.eye(vectors.shape[-1]).to(covariance)).abs().amax(-1)


def describe(noise: Tensor) -> dict[str, Tensor]:
    """Figures (N,) of noises (N, ...), of which fresh noise has mean 0 and std 1 but for `covariance`:

    `length` (‖ε‖), `mean` and `kurtosis` (of the elements), `neighbours` (their correlation along the last two axes), and `covariance`, the
    spectral norm ‖C - I‖ of sub-vectors of four.
    """
    x = wide(noise)
    flat = x.flatten(1)
    size = flat.shape[1]
    axes = [-1] if x.ndim == 2 else [-1, -2]
    products = [(x.narrow(a, 1, x.shape[a] - 1) * x.narrow(a, 0, x.shape[a] - 1)).flatten(1) for a in axes]
    pairs = sum(product.shape[1] for product in products)
    square = flat.square().mean(1)
    return {
        "length": math.sqrt(2) * (flat.norm(dim=1) - math.sqrt(size - 0.5)),
        "mean": flat.mean(1) * math.sqrt(size),
        "neighbours": torch.stack([product.sum(1) for product in products]).sum(0) / math.sqrt(pairs),
        "kurtosis": (flat.pow(4).mean(1) / square.square() - 3) * math.sqrt(size / 24),
        "covariance": _distortion(_vectors(flat, WIDTH)),
    }


def band(shape: Sequence[int], share: float = 0.99, draws: int = 4000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Between which values `describe`'s figures of fresh noise of a shape lie, in a share of all cases, as many above as below."""
    ids = torch.arange(draws)
    found = [describe(gaussian(shape, seed, rows, "band")) for rows in ids.split(256)]
    ends = torch.tensor([(1 - share) / 2, (1 + share) / 2])
    limits = {name: torch.cat([figures[name] for figures in found]).quantile(ends).tolist() for name in found[0]}
    return {name: (low, high) for name, (low, high) in limits.items()}
