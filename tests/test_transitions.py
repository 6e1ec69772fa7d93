"""Transitions: the one kernel equals every published sampler, its densities are right, and its marginals are the ODE's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from visalign.paths import Flow, Path, Trigonometric, VariancePreserving, expand, gain
from visalign.schedules import flow_match_euler, linear, shifted
from visalign.transitions import TRANSITIONS, Gaussian, Step, Transition, cps, dance_sde, ddim, dpm_sde, flow_sde, kernel, log_ratio, ode

FLOW = Flow()
TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
EXACT = {"rtol": 0.0, "atol": 1e-12}
GRID = flow_match_euler(10, 3.0).double()
SIGMA, SIGMA_NEXT = GRID[:-1], GRID[1:]  # from σ = 1 to σ' = 0


def normal(seed: int, rows: int = 10) -> Tensor:
    return torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, V, NOISE = normal(0), normal(1), normal(2)


def moved(path: Path, t: Tensor, t_next: Tensor, step: Step) -> Tensor:
    return kernel(path, X[: len(t)], V[: len(t)], t, t_next, step).draw(NOISE[: len(t)])


def published_flow_sde(level: float) -> Tensor:
    s, s_next = expand(SIGMA, X), expand(SIGMA_NEXT, X)
    dt = s_next - s
    deviation = level * torch.sqrt(s / (1 - torch.where(s == 1, SIGMA_NEXT[0], s)))
    mean = X * (1 + deviation**2 / (2 * s) * dt) + V * (1 + deviation**2 * (1 - s) / (2 * s)) * dt
    return mean + deviation * torch.sqrt(-dt) * NOISE


def published_dance_sde(level: float) -> Tensor:
    s, s_next = expand(SIGMA, X), expand(SIGMA_NEXT, X)
    step = s_next - s
    clean = X - s * V
    score = -(X - (1 - s) * clean) / s**2
    return X + step * V - 0.5 * level**2 * score * step + level * torch.sqrt(-step) * NOISE


def published_cps(level: float) -> Tensor:
    s, s_next = expand(SIGMA, X), expand(SIGMA_NEXT, X)
    deviation = s_next * math.sin(level * math.pi / 2)
    return (X - s * V) * (1 - s_next) + (X + V * (1 - s)) * torch.sqrt(s_next**2 - deviation**2) + deviation * NOISE


def published_dpm_sde(_: float) -> Tensor:
    s, s_next = expand(SIGMA, X), expand(SIGMA_NEXT, X)
    h = torch.log((1 - s_next) / s_next) - torch.log((1 - s) / s)  # infinite at both ends, and exp(-h) is 0 there
    fresh = 1 - torch.exp(-2 * h)
    return s_next / s * torch.exp(-h) * X + (1 - s_next) * fresh * (X - s * V) + s_next * torch.sqrt(fresh) * NOISE


@pytest.mark.parametrize(
    ("name", "level", "published"),
    [
        ("flow_sde", 0.7, published_flow_sde),
        ("dance_sde", 0.3, published_dance_sde),
        ("cps", 0.8, published_cps),
        ("dpm_sde", 1.0, published_dpm_sde),
    ],
)
def test_kernel_equals_the_published_form(name: str, level: float, published: Callable[[float], Tensor]) -> None:
    assert_close(moved(FLOW, SIGMA, SIGMA_NEXT, TRANSITIONS[name](FLOW, SIGMA, SIGMA_NEXT, level)), published(level), **EXACT)


@pytest.mark.parametrize("function", [ode, ddim, cps, dpm_sde])
@pytest.mark.parametrize(("path", "scale"), [(FLOW, 1), (VariancePreserving(TABLE), 999), (Trigonometric(), math.pi / 2)])
def test_coefficient_preserving(function: Transition, path: Path, scale: float) -> None:
    t, t_next = scale * SIGMA, scale * SIGMA_NEXT
    step = function(path, t, t_next, 0.6)
    alpha, sigma = path.coefficients(t_next)
    assert_close(step.c**2 + step.std**2, sigma**2, **EXACT)
    assert_close(step.a, alpha, **EXACT)


def test_flow_sde_is_dance_sde_with_another_diffusion() -> None:
    inner, inner_next = SIGMA[1:], SIGMA_NEXT[1:]
    assert_close(flow_sde(FLOW, inner, inner_next, 0.7), dance_sde(FLOW, inner, inner_next, 0.7 * (inner / (1 - inner)).sqrt()), **EXACT)


@pytest.mark.parametrize("first", [1 - 1e-7, 3 * 0.999 / (1 + 2 * 0.999)])  # one rounding error below 1; Sana's grid
def test_flow_sde_starts_alike_just_below_one(first: float) -> None:
    exact, nearly = (flow_sde(FLOW, torch.tensor([t]).double(), SIGMA_NEXT[:1], 0.7) for t in (1.0, first))
    assert_close(nearly, exact, rtol=0, atol=5e-3)


def test_gain_of_the_sdes() -> None:
    inner, inner_next = SIGMA[1:], SIGMA_NEXT[1:]
    step = flow_sde(FLOW, inner, inner_next, 0.7)
    assert_close(gain(FLOW, step.a, step.c, inner), -(inner - inner_next) * (1 + 0.7**2 / 2), **EXACT)
    step = dance_sde(FLOW, inner, inner_next, 0.3)
    assert_close(gain(FLOW, step.a, step.c, inner), -(inner - inner_next) * (1 + 0.3**2 * (1 - inner) / (2 * inner)), **EXACT)


def test_dpm_sde_is_ddim_of_eta_one() -> None:
    for path, scale in ((FLOW, 1), (VariancePreserving(TABLE), 999)):
        assert_close(dpm_sde(path, scale * SIGMA, scale * SIGMA_NEXT, 0.3), ddim(path, scale * SIGMA, scale * SIGMA_NEXT, 1.0), **EXACT)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "ddim", "cps"])
def test_no_noise_is_the_euler_step(name: str) -> None:
    euler = X + expand(SIGMA_NEXT - SIGMA, X) * V
    assert_close(moved(FLOW, SIGMA, SIGMA_NEXT, ode(FLOW, SIGMA, SIGMA_NEXT, 0.0)), euler, **EXACT)
    assert_close(moved(FLOW, SIGMA, SIGMA_NEXT, TRANSITIONS[name](FLOW, SIGMA, SIGMA_NEXT, 0.0)), euler, **EXACT)
    nearly = TRANSITIONS[name](FLOW, SIGMA, SIGMA_NEXT, 1e-6)
    assert_close(moved(FLOW, SIGMA, SIGMA_NEXT, nearly), euler, rtol=0, atol=1e-4)


def test_flow_ddim_written_out() -> None:
    step = ddim(FLOW, SIGMA, SIGMA_NEXT, 0.5)
    std = 0.5 * SIGMA_NEXT * (1 - ((1 - SIGMA) * SIGMA_NEXT / ((1 - SIGMA_NEXT) * SIGMA)) ** 2).sqrt()
    assert_close(step, Step(1 - SIGMA_NEXT, (SIGMA_NEXT**2 - std**2).sqrt(), std), **EXACT)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_ddpo_on_a_table(eta: float) -> None:
    t, t_next = torch.tensor([981.0, 501.0, 21.0]).double(), torch.tensor([961.0, 481.0, 1.0]).double()
    now, after = TABLE[t.long()], TABLE[t_next.long()]
    std = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
    step = ddim(VariancePreserving(TABLE), t, t_next, eta)
    assert_close(step, Step(after.sqrt(), (1 - after - std**2).sqrt(), std), **EXACT)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_of_diffusers(eta: float, prediction: str, to_one: bool) -> None:
    from diffusers import DDIMScheduler

    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDIMScheduler(**beta, clip_sample=False, set_alpha_to_one=to_one, prediction_type=kind)  # pyright: ignore[reportArgumentType]
    scheduler.set_timesteps(10)
    path = VariancePreserving(scheduler.alphas_cumprod, "v" if prediction == "v" else "epsilon")
    x, said, noise = X.float(), V.float(), NOISE.float()
    for row, t in enumerate(scheduler.timesteps.tolist()):
        now, after = torch.tensor([float(t)]), torch.tensor([float(max(t - 100, -1 if to_one else 0))])
        one = slice(row, row + 1)
        want = scheduler.step(said[one], t, x[one], eta=eta, variance_noise=noise[one] if eta else None).prev_sample
        got = kernel(path, x[one], said[one], now, after, ddim(path, now, after, eta)).draw(noise[one])
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_euler_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    grid = flow_match_euler(10, 3.0)
    x = stock = X.float()
    for j, t in enumerate(scheduler.timesteps):
        stock = scheduler.step(V.float(), t, stock).prev_sample  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        x = kernel(FLOW, x, V, grid[j], grid[j + 1], ode(FLOW, grid[j], grid[j + 1], 0.0)).mean
    assert_close(x.float(), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("start", [1.0, 1 - 1e-16, 1 - 6e-8])
def test_finite_at_both_ends(name: str, start: float) -> None:
    t, t_next = torch.tensor([start, 0.5, 1.0]).double(), torch.tensor([0.96, 0.0, 0.0]).double()
    step = TRANSITIONS[name](FLOW, t, t_next, 0.7)
    assert all(value.dtype == torch.float64 and value.isfinite().all() for value in step)
    assert (step.std < 4).all()
    assert moved(FLOW, t, t_next, step).isfinite().all()


def test_numbers_of_the_published_setting() -> None:
    """SD3.5-M: 10 steps, shift 3, a = 0.7 and η = 0.8, worked out apart from this code."""
    step = flow_sde(FLOW, SIGMA, SIGMA_NEXT, 0.7)
    std = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    share = [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.49, 1.77]
    assert step.std.tolist() == pytest.approx(std, rel=0.01)
    assert (gain(FLOW, step.a, step.c, SIGMA).abs() / step.std).tolist() == pytest.approx(share, rel=0.01)
    assert step.c[8].item() == pytest.approx(-0.082, abs=1e-3)
    step = cps(FLOW, SIGMA, SIGMA_NEXT, 0.8)
    assert step.std.tolist() == pytest.approx([0.913, 0.869, 0.816, 0.752, 0.673, 0.573, 0.442, 0.264, 0.0085, 0.0], rel=0.01)


@pytest.mark.parametrize("function", [flow_sde, dance_sde])
def test_flow_only(function: Transition) -> None:
    with pytest.raises(ValueError, match="rectified flows, not for VariancePreserving"):
        function(VariancePreserving(TABLE), SIGMA, SIGMA_NEXT, 0.7)


def law(prediction: Tensor, level: float = 0.7) -> Gaussian:
    return kernel(FLOW, X, prediction, SIGMA, SIGMA_NEXT, flow_sde(FLOW, SIGMA, SIGMA_NEXT, level))


def test_log_prob_is_that_of_torch() -> None:
    gaussian = law(V)
    x = gaussian.draw(NOISE)
    assert gaussian.std.shape == (10, 1, 1)
    assert_close(gaussian.log_prob(x), Normal(gaussian.mean, gaussian.std).log_prob(x).mean((1, 2)), **EXACT)


def test_half_precision_in_float32_out() -> None:
    step = flow_sde(FLOW, SIGMA.float(), SIGMA_NEXT.float(), 0.7)
    gaussian = kernel(FLOW, X.bfloat16(), V.bfloat16(), SIGMA.float(), SIGMA_NEXT.float(), step)
    assert gaussian.mean.dtype == gaussian.std.dtype == torch.float32
    stored = gaussian.draw(NOISE.float()).bfloat16()
    assert gaussian.log_prob(stored).dtype == torch.float32
    assert torch.equal(gaussian.log_prob(stored), gaussian.log_prob(stored.float()))


def test_no_density_without_noise() -> None:
    gaussian = kernel(FLOW, X, V, SIGMA, SIGMA_NEXT, cps(FLOW, SIGMA, SIGMA_NEXT, 0.8))  # the last step has σ' = 0
    for x in (gaussian.draw(NOISE), gaussian.mean, gaussian.mean + 1):
        assert gaussian.log_prob(x).isnan().tolist() == [False] * 9 + [True]


def test_scalar_step_equals_step_per_row() -> None:
    t, t_next = SIGMA[3], SIGMA_NEXT[3]
    one = kernel(FLOW, X, V, t, t_next, flow_sde(FLOW, t, t_next, 0.7))
    rows = kernel(FLOW, X, V, t.expand(10), t_next.expand(10), flow_sde(FLOW, t.expand(10), t_next.expand(10), 0.7))
    assert torch.equal(one.mean, rows.mean)
    assert torch.equal(one.log_prob(X), rows.log_prob(X))


def test_closed_form_log_ratio_and_the_unbiased_ratio() -> None:
    old, step = law(V), flow_sde(FLOW, SIGMA, SIGMA_NEXT, 0.7)
    delta = 0.1 * normal(3)
    new, x = law(V + delta), old.draw(NOISE)
    kappa = gain(FLOW, step.a, step.c, SIGMA)
    difference = new.log_prob(x) - old.log_prob(x)
    assert_close(log_ratio(NOISE, delta, kappa, step.std), difference, **EXACT)
    bias = (new.mean - old.mean).square().mean((1, 2)) / (2 * step.std**2)
    guarded = (step.std * (difference + bias)).exp()  # GRPO-Guard, arXiv 2510.22319
    assert_close(guarded, (kappa * (NOISE * delta).mean((1, 2))).exp(), **EXACT)


def test_log_prob_is_velocity_matching_to_a_noisy_target() -> None:
    step, old = flow_sde(FLOW, SIGMA, SIGMA_NEXT, 0.7), law(V)
    kappa = gain(FLOW, step.a, step.c, SIGMA)
    target = V + expand(step.std / kappa, V) * NOISE
    other = normal(4)
    got = (old.draw(NOISE) - law(other).mean).square().mean((1, 2))
    assert_close(got, kappa**2 * (other - target).square().mean((1, 2)), **EXACT)


# --- an analytic world: two-dimensional Gaussian data -----------------------------------------------------------------------------------

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64)


def best_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - clean | x], rows (N, 2), for data N(MEAN, COVARIANCE)."""
    eye = torch.eye(2, dtype=torch.float64)
    precision = torch.linalg.inv((1 - sigma) ** 2 * COVARIANCE + sigma**2 * eye)
    residual = (x - (1 - sigma) * MEAN) @ precision
    return sigma * residual - MEAN - (1 - sigma) * residual @ COVARIANCE


def propagated(name: str, level: float, grid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Exact mean and covariance of the chain at every time of the grid: each step is affine, so its action on 0, e1, e2 is all of it."""
    mean, covariance = torch.zeros(2).double(), torch.eye(2).double()
    probes = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    moments: list[tuple[Tensor, Tensor]] = []
    for t, t_next in itertools.pairwise(grid):
        step = TRANSITIONS[name](FLOW, t, t_next, level)
        image = kernel(FLOW, probes, best_velocity(probes, t), t, t_next, step).mean
        matrix = image[1:] - image[0]
        mean = mean @ matrix + image[0]
        covariance = matrix.T @ covariance @ matrix + step.std**2 * torch.eye(2)
        moments.append((mean, covariance))
    return moments


@pytest.mark.parametrize(("name", "level"), [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3), ("ddim", 0.5), ("dpm_sde", 1.0)])
def test_all_samplers_share_the_marginals_of_the_path(name: str, level: float) -> None:
    grid = shifted(linear(400).double(), 3.0)
    for sigma, (mean, covariance) in zip(grid[1:], propagated(name, level, grid), strict=True):
        tolerance = 0.1 if name == "flow_sde" and sigma > 0.9 else 0.02  # its first two steps add too much noise on any grid
        assert_close(mean, (1 - sigma) * MEAN, rtol=0, atol=0.02)
        assert_close(covariance, (1 - sigma) ** 2 * COVARIANCE + sigma**2 * torch.eye(2), rtol=0, atol=tolerance)


def test_cps_keeps_the_noise_level_but_not_the_marginals() -> None:
    """Variance 0.65 instead of 1 however fine the grid: the docstring's warning, and why analytic targets must not use it."""
    variance = torch.ones((), dtype=torch.float64)
    grid = shifted(linear(1000).double(), 3.0)
    step = cps(FLOW, grid[:-1], grid[1:], 0.8)
    total = (1 - grid[:-1]) ** 2 + grid[:-1] ** 2
    slope = (step.a * (1 - grid[:-1]) + step.c * grid[:-1]) / total
    for j in range(1000):
        variance = slope[j] ** 2 * variance + step.std[j] ** 2
    assert variance.item() == pytest.approx(0.647, abs=0.01)
