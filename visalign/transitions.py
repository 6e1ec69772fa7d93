"""One Gaussian kernel for every sampler: x' = a·clean + c·noise + ς·ε, three scalars per step.

Flow-SDE, Dance-SDE, CPS, DDIM(η) and DPM-Solver++(SDE) are published as unrelated updates of x; in endpoint coordinates a = α' for all of
them, and they differ in c and ς alone. Log-densities are averaged over latent axes, not summed: a ratio is then the D-th root of the
density ratio, which is why its clip ranges are 1e-3 … 1e-6.

Notation: α, σ at the time `t`, α', σ' at `t_next`, Δ = σ - σ' > 0, e^{-h} = α·σ'/(α'·σ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visalign.paths import Flow, Path, combine, expand, wide

Level = Tensor | float
START = 0.998  # σ above it is a grid's first; some start a rounding error below 1, or a shifted thousandth (Sana), where s would explode


class Step(NamedTuple):
    """Coefficients on the clean sample and on the predicted noise, and the std of the fresh noise: (N,) or () float64 each."""

    a: Tensor
    c: Tensor
    std: Tensor


Transition = Callable[[Path, Tensor, Tensor, Level], Step]


@dataclass(frozen=True)
class Gaussian:
    """Where a transition may go.

    Attributes:
        mean: (N, ...) at least float32.
        std: (N, 1, ...) of the same dtype; 0 for a deterministic step.
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std·noise (N, ...); round it to the dtype that is stored before asking for its density."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `x` (N, ...) averaged over latent axes, (N,) float32.

        A step with std = 0 has no density: its rows are NaN, whatever `x` is. Nothing is raised here, since looking at std would stop the
        accelerator in the hot loop; plans don't record such steps (`visalign.schedules.StepPlan`).
        """
        distance = ((wide(x) - self.mean) / self.std).square().flatten(1).mean(1)
        return -distance / 2 - self.std.flatten().log() - math.log(2 * math.pi) / 2


def ode(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """Euler's step of the probability-flow ODE, c = σ' (for variance-preserving paths DDIM with η = 0); `level` is not used."""
    _, _, alpha_next, sigma_next = _schedule(path, t, t_next)
    return Step(alpha_next, sigma_next, torch.zeros_like(sigma_next))


def ddim(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """DDIM (arXiv 2010.02502, Eqs. 12 and 16) with η = `level` in [0, 1], for any path: ς = η·σ'·√(1 - e^{-2h}), c = √(σ'² - ς²)."""
    _, _, alpha_next, sigma_next = _schedule(path, t, t_next)
    std = level * sigma_next * (1 - _decay(path, t, t_next).square()).sqrt()
    return Step(alpha_next, _preserving(sigma_next, std), std)


def dpm_sde(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """SDE-DPM-Solver++ of order 1 (arXiv 2211.01095, Eq. 18): c = σ'·e^{-h}, ς = σ'·√(1 - e^{-2h}); it is DDIM with η = 1.

    `level` is not used: the schedule fixes the noise.
    """
    _, _, alpha_next, sigma_next = _schedule(path, t, t_next)
    decay = _decay(path, t, t_next)
    return Step(alpha_next, sigma_next * decay, sigma_next * (1 - decay.square()).sqrt())


def cps(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """Coefficient-preserving sampling (arXiv 2509.05952): ς = σ'·sin(η·π/2), c = √(σ'² - ς²) with η = `level` in [0, 1].

    It keeps the amount of noise but not the marginals: on Gaussian data of variance 1, η = 0.8 ends at variance 0.65 for any large T, where
    `ddim` reaches 1. Its published log-prob drops 1/(2ς²); ours does not, so a clip range tuned there is 2ς² times a range here.
    """
    _, _, alpha_next, sigma_next = _schedule(path, t, t_next)
    angle = torch.as_tensor(level, dtype=torch.float64, device=t.device) * (math.pi / 2)
    return Step(alpha_next, sigma_next * angle.cos(), sigma_next * angle.sin())


def dance_sde(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """DanceGRPO's SDE (arXiv 2505.07818) with the diffusion s = η = `level` at all times: c = σ' - s²Δ/(2σ), ς = s·√Δ.

    Raises:
        ValueError: the path is not a rectified flow.
    """
    return _marginal_sde(path, t, t_next, level * torch.ones_like(t, dtype=torch.float64))


def flow_sde(path: Path, t: Tensor, t_next: Tensor, level: Level) -> Step:
    """Flow-GRPO's SDE (arXiv 2505.05470, Eq. 9): `dance_sde` with the diffusion s = a·√(σ/(1 - σ)), a = `level`.

    At σ = 1 (above `START`) the denominator takes σ', as the authors' code does. However fine the grid, that first step leaves 1 + a⁴/4
    times the variance it should; later steps forget it.

    Raises:
        ValueError: the path is not a rectified flow.
    """
    sigma, sigma_next = t.double(), t_next.double()
    denominator = 1 - torch.where(sigma > START, sigma_next, sigma)
    return _marginal_sde(path, t, t_next, level * (sigma / denominator).sqrt())


TRANSITIONS: dict[str, Transition] = {
    "ode": ode,
    "ddim": ddim,
    "dance_sde": dance_sde,
    "flow_sde": flow_sde,
    "cps": cps,
    "dpm_sde": dpm_sde,
}


def kernel(path: Path, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, step: Step) -> Gaussian:
    """The Gaussian over the next latents.

    Args:
        path: the model's.
        x, prediction: (N, ...) latents and what the network said of them, any float dtype; the arithmetic is in float32.
        t, t_next: (N,) or () times before and after; the mean needs only the first, `step` knows of the second.
        step: from a function of `TRANSITIONS`, on the device of `t`.
    """
    mean = combine(path, x, prediction, step.a, step.c, t)
    return Gaussian(mean, expand(step.std.to(mean), mean).expand(len(mean), *(1 for _ in mean.shape[1:])))


def log_ratio(noise: Tensor, delta: Tensor, kappa: Tensor, std: Tensor) -> Tensor:
    """log p_θ(x')/p_old(x') per sample, averaged over latent axes, from x' = μ_old + ς·noise, without any density: (N,).

    κ·mean(ε⊙δ)/ς - κ²·mean(δ²)/(2ς²). Exact where a difference of two rounded log-densities loses its digits.

    Args:
        noise: (N, ...) the ε that was drawn.
        delta: (N, ...) prediction_θ - prediction_old.
        kappa, std: (N,) or () `visalign.paths.gain` and the std of the step.
    """
    delta = wide(delta)
    kappa, std = kappa.to(delta), std.to(delta)
    signal, square = (wide(noise) * delta).flatten(1).mean(1), delta.square().flatten(1).mean(1)
    return kappa * signal / std - (kappa / std).square() * square / 2


def _schedule(path: Path, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(α, σ, α', σ') in float64."""
    return (*path.coefficients(t.double()), *path.coefficients(t_next.double()))


def _decay(path: Path, t: Tensor, t_next: Tensor) -> Tensor:
    """e^{-h}, h = λ(t') - λ(t) > 0 the gain in half the log signal-to-noise ratio; 0 where x is pure noise or x' is clean."""
    alpha, sigma, alpha_next, sigma_next = _schedule(path, t, t_next)
    return alpha * sigma_next / (alpha_next * sigma)


def _preserving(sigma_next: Tensor, std: Tensor) -> Tensor:
    """c with c² + ς² = σ'²: the noise after the step is what the model expects there."""
    return (sigma_next.square() - std.square()).clamp(min=0).sqrt()


def _marginal_sde(path: Path, t: Tensor, t_next: Tensor, diffusion: Tensor) -> Step:
    """One Euler-Maruyama step of the SDE with the ODE's marginals and diffusion s: exact marginals as Δ → 0, excess noise before."""
    if not isinstance(path, Flow):
        raise ValueError(f"this SDE is defined for rectified flows, not for {type(path).__name__}; use ddim, cps or dpm_sde")
    _, sigma, alpha_next, sigma_next = _schedule(path, t, t_next)
    delta = sigma - sigma_next
    return Step(alpha_next, sigma_next - diffusion.square() * delta / (2 * sigma), diffusion * delta.sqrt())
