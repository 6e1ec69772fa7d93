"""Probability paths x_t = α(t)·clean + σ(t)·noise, and what a network predicts along them.

Rectified flow and variance-preserving diffusion differ in two scalars per time and in the meaning of the prediction. Unlike the textbooks,
which give each parametrisation its own formulas, every prediction here is p·noise + q·clean: two linear equations in two unknowns, solved
once. Every function works elementwise in the times, on any device, in the dtype of its tensors (at least float32).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "epsilon", "v"]


class Path(ABC):
    """Two curves α(t), σ(t) between data (σ = 0) and noise, and the quantity that the network predicts."""

    prediction: Prediction

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the times `t`, each of the shape and dtype of `t`."""

    def target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) with prediction = p·noise + q·clean, each of the shape and dtype of `t`."""
        if self.prediction == "v":  # Salimans & Ho 2022 (arXiv 2202.00512), Eq. 13
            alpha, sigma = self.coefficients(t)
            return alpha, -sigma
        one = torch.ones_like(t)
        return one, -one if self.prediction == "velocity" else torch.zeros_like(t)


class Flow(Path):
    """Rectified flow: x = (1 - σ)·clean + σ·noise; times are σ in [0, 1]; predicts the velocity noise - clean."""

    prediction: Prediction = "velocity"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t


class Trigonometric(Path):
    """TrigFlow (arXiv 2410.11081, Sec. 3): x = cos t·clean + sin t·noise; times are angles from π/2 to 0; predicts v = dx/dt.

    Published with clean and noise of a standard deviation σ_d, and a network F(x/σ_d, t) = v/σ_d; here everything is in units of σ_d, which
    is then nowhere to be seen. A student of SANA-Sprint (arXiv 2503.09641) draws by x' = cos t'·x̂0 + sin t'·ε: `visalign.transitions.cps`
    at level 1.
    """

    prediction: Prediction = "v"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t.cos(), t.sin()


@dataclass(frozen=True, eq=False)
class VariancePreserving(Path):
    """Discrete diffusion: x = √ᾱ·clean + √(1-ᾱ)·noise.

    Times are table indices in [-1, len - 1]; fractional ones interpolate ᾱ linearly, and -1 is clean data (ᾱ = 1).

    Attributes:
        alphas_cumprod: (L,) decreasing in [0, 1], the training schedule.
        prediction: "epsilon" or "v". At ᾱ = 0 only "v" has finite endpoints.

    Raises:
        ValueError: the table is not a decreasing one-dimensional tensor in [0, 1].
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or not bool((table.diff() < 0).all() & (table >= 0).all() & (table <= 1).all()):
            raise ValueError(f"alphas_cumprod {tuple(table.shape)} must be one-dimensional and decrease within [0, 1]")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = torch.nn.functional.pad(self.alphas_cumprod.double(), (1, 0), value=1.0).to(t.device)
        position = (t.double() + 1).clamp(0, len(table) - 1)
        below = position.floor().clamp(max=len(table) - 2).long()
        square = torch.lerp(table[below], table[below + 1], position - below)
        return square.sqrt().to(t.dtype), (1 - square).sqrt().to(t.dtype)


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Per-sample numbers (N,) as (N, 1, ...), to multiply `like` (N, ...); a scalar becomes (1, 1, ...)."""
    return t.reshape(-1, *(1 for _ in like.shape[1:]))


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if that is what it is: half precision is for networks, not for arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def mean_weights(path: Path, a: Tensor | float, c: Tensor | float, t: Tensor) -> tuple[Tensor, Tensor]:
    """(γ, κ) with a·clean + c·noise = γ·x + κ·prediction: the mean of a transition straight from what the network saw and said."""
    alpha, sigma = path.coefficients(t)
    p, q = path.target(t)
    determinant = alpha * p - sigma * q  # 1 for velocity and v, α for epsilon
    return (a * p - c * q) / determinant, (c * alpha - a * sigma) / determinant


def gain(path: Path, a: Tensor | float, c: Tensor | float, t: Tensor) -> Tensor:
    """κ = ∂(a·clean + c·noise)/∂prediction, of the shape of `t`.

    c·α - a·σ for velocity and v, c - a·σ/α for epsilon. Negative for every step towards data; Euler's is σ' - σ.
    """
    return mean_weights(path, a, c, t)[1]


def noise_gap(path: Path, t: Tensor, t_next: Tensor) -> Tensor:
    """Δ = σ - σ' of steps from `t` to `t_next`, float64 of their shape: how much noise they take away, whatever the unit of times."""
    return path.coefficients(t.double())[1] - path.coefficients(t_next.double())[1]


def combine(path: Path, x: Tensor, prediction: Tensor, a: Tensor | float, c: Tensor | float, t: Tensor) -> Tensor:
    """a·clean + c·noise (N, ...) of the endpoints that `prediction` (N, ...) implies for `x` (N, ...) at `t` (N,) or ().

    The scalars are worked out in float64, so that near σ = 1 no digits cancel; the latents in float32.
    """
    x, prediction = wide(x), wide(prediction)
    on_x, on_prediction = mean_weights(path, a, c, t.double())
    return expand(on_x.to(x), x) * x + expand(on_prediction.to(x), x) * prediction


def endpoints(path: Path, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise, (N, ...) each, that `prediction` implies for `x` at the times `t` (N,) or ()."""
    return combine(path, x, prediction, 1.0, 0.0, t), combine(path, x, prediction, 0.0, 1.0, t)


def prediction_from(path: Path, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should say (N, ...) where the endpoints are known: the inverse of `endpoints`, and the training target."""
    clean, noise = wide(clean), wide(noise)
    p, q = path.target(t.double())
    return expand(p.to(noise), noise) * noise + expand(q.to(noise), noise) * clean


def mix(path: Path, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = α·clean + σ·noise (N, ...) at the times `t` (N,) or ()."""
    clean, noise = wide(clean), wide(noise)
    alpha, sigma = path.coefficients(t.double())
    return expand(alpha.to(clean), clean) * clean + expand(sigma.to(clean), clean) * noise


def renoise(path: Path, x: Tensor, t: Tensor, t_back: Tensor, noise: Tensor) -> Tensor:
    """x (N, ...) at `t` taken back to the noisier `t_back`, (N,) or () each, by the forward process: (α'/α)·x + √(σ'² - (α'σ/α)²)·noise.

    Where x is clean, this is `mix`; where α' = 0, it is pure noise.
    """
    x, noise = wide(x), wide(noise)
    (alpha, sigma), (alpha_back, sigma_back) = (path.coefficients(time.double()) for time in (t, t_back))
    keep = alpha_back / alpha
    fresh = (sigma_back.square() - (keep * sigma).square()).clamp(min=0).sqrt()
    return expand(keep.to(x), x) * x + expand(fresh.to(x), x) * noise
