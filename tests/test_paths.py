"""Paths: endpoints and predictions are inverse to one another, and the gain is the derivative it claims to be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.paths import (
    Flow,
    Path,
    Trigonometric,
    VariancePreserving,
    combine,
    endpoints,
    expand,
    gain,
    mix,
    noise_gap,
    prediction_from,
    renoise,
)
from visalign.transitions import cps, kernel

TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
CASES: dict[str, tuple[Path, Tensor]] = {
    "flow": (Flow(), torch.tensor([1.0, 0.7, 0.01], dtype=torch.float64)),
    "epsilon": (VariancePreserving(TABLE, "epsilon"), torch.tensor([999.0, 400.5, 0.0], dtype=torch.float64)),
    "v": (VariancePreserving(TABLE, "v"), torch.tensor([999.0, 400.5, -1.0], dtype=torch.float64)),
    "trigonometric": (Trigonometric(), torch.tensor([1.5708, 1.3, 0.0], dtype=torch.float64)),
}


def latents(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_the_prediction(name: str) -> None:
    path, t = CASES[name]
    clean, noise = latents(0), latents(1)
    found = endpoints(path, mix(path, clean, noise, t), prediction_from(path, clean, noise, t), t)
    assert_close(found, (clean, noise), rtol=0, atol=1e-12)


def test_predictions_are_the_published_ones() -> None:
    clean, noise = latents(0), latents(1)
    path, t = CASES["flow"]
    assert_close(prediction_from(path, clean, noise, t), noise - clean)
    path, t = CASES["epsilon"]
    assert_close(prediction_from(path, clean, noise, t), noise)
    path, t = CASES["v"]
    alpha, sigma = (expand(value, clean) for value in path.coefficients(t))
    assert_close(prediction_from(path, clean, noise, t), alpha * noise - sigma * clean)


@pytest.mark.parametrize("name", CASES)
def test_gain_is_the_derivative_of_the_mean(name: str) -> None:
    path, t = CASES[name]
    prediction = latents(1).requires_grad_()
    a, c = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), torch.tensor([0.2, -0.3, 0.8], dtype=torch.float64)
    combine(path, latents(0), prediction, a, c, t).sum().backward()
    assert prediction.grad is not None
    assert_close(prediction.grad, expand(gain(path, a, c, t), prediction).expand_as(prediction), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gain_in_the_closed_form_of_each_prediction(name: str) -> None:
    path, t = CASES[name]
    alpha, sigma = path.coefficients(t)
    want = 0.3 - 0.6 * sigma / alpha if name == "epsilon" else 0.3 * alpha - 0.6 * sigma
    assert_close(gain(path, 0.6, 0.3, t), want, rtol=1e-12, atol=1e-12)


def test_gain_of_euler_is_the_step() -> None:
    t, t_next = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([0.8, 0.0], dtype=torch.float64)
    assert_close(gain(Flow(), 1 - t_next, t_next, t), t_next - t)


def test_the_angle_is_the_time_and_the_derivative_the_prediction() -> None:
    path, t = CASES["trigonometric"]
    clean, noise = latents(0), latents(1)
    x, slope = torch.func.jvp(lambda time: mix(path, clean, noise, time), (t,), (torch.ones_like(t),))
    assert_close(slope, prediction_from(path, clean, noise, t), rtol=1e-12, atol=1e-12)
    turned = combine(path, x, slope, (t - 0.2).cos(), (t - 0.2).sin(), t)  # the exact solution of the ODE for one clean sample
    assert_close(turned, mix(path, clean, noise, t - 0.2), rtol=0, atol=1e-12)
    t_next = torch.tensor([1.3, 0.9, -0.4], dtype=torch.float64)
    assert_close(gain(path, t_next.cos(), t_next.sin(), t), -(t - t_next).sin(), rtol=0, atol=1e-12)


def test_steps_of_the_stock_consistency_scheduler_are_cps_at_level_one() -> None:
    from diffusers import SCMScheduler

    scheduler, path = SCMScheduler(sigma_data=0.5), Trigonometric()
    scheduler.set_timesteps(4, max_timesteps=1.57080, intermediate_timesteps=None)
    x, generator = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    own, stock, again = x, x * 0.5, torch.Generator().manual_seed(1)
    for t, t_next in pairwise(scheduler.timesteps):
        said = torch.sin(3 * own + t)
        stock, clean = scheduler.step(torch.sin(6 * stock + t) * 0.5, t, stock, generator=generator, return_dict=False)
        law = kernel(path, own, said, t, t_next, cps(path, t, t_next, 1.0))
        assert_close(endpoints(path, own, said, t)[0], clean / 0.5, rtol=0, atol=1e-5)
        own = law.draw(torch.randn(x.shape, generator=again))
        assert_close(own, stock / 0.5, rtol=0, atol=1e-5)


def test_table_times() -> None:
    path = VariancePreserving(TABLE)
    t = torch.tensor([999.0, 10.0, 10.25, 0.0, -1.0, -99.0], dtype=torch.float64)
    square = path.coefficients(t)[0].square()
    assert_close(square, torch.stack([TABLE[999], TABLE[10], TABLE[10].lerp(TABLE[11], 0.25), TABLE[0], *torch.ones(2).double()]))
    assert path.coefficients(t.float())[1].dtype == torch.float32


def test_one_time_for_all_samples_and_half_precision_inputs() -> None:
    x, prediction = latents(0, torch.bfloat16), latents(1, torch.bfloat16)
    clean, noise = endpoints(Flow(), x, prediction, torch.tensor(0.3))
    assert clean.dtype == noise.dtype == torch.float32
    assert_close(clean, x.float() - 0.3 * prediction.float())
    assert_close(noise, x.float() + 0.7 * prediction.float())


@pytest.mark.parametrize("table", [torch.tensor([0.1, 0.9]), torch.tensor([1.5, 0.9]), torch.rand(2, 2)])
def test_bad_table(table: Tensor) -> None:
    with pytest.raises(ValueError, match="decrease"):
        VariancePreserving(table)


def test_the_noise_gap_is_a_difference_of_noise_whatever_times_are() -> None:
    now, after = torch.tensor([1.0, 0.7]), torch.tensor([0.7, 0.0])
    assert_close(noise_gap(Flow(), now, after), (now - after).double(), rtol=0, atol=1e-7)
    gap = noise_gap(VariancePreserving(TABLE), torch.tensor([981.0, 1.0]), torch.tensor([961.0, -1.0]))
    wanted = [(1 - TABLE[981]) ** 0.5 - (1 - TABLE[961]) ** 0.5, (1 - TABLE[1]) ** 0.5]
    assert_close(gap, torch.stack(wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", [Flow(), VariancePreserving(torch.linspace(0.999, 0.001, 100))], ids=["flow", "vp"])
def test_renoised_states_have_the_marginals_of_the_noisier_time(path: Flow | VariancePreserving) -> None:
    rng = torch.Generator().manual_seed(0)
    times = torch.tensor([0.3, 0.7]) if isinstance(path, Flow) else torch.tensor([30.0, 70.0])
    clean, first, second = torch.full((50000, 2), 1.5), *(torch.randn(50000, 2, generator=rng) for _ in range(2))
    back = renoise(path, mix(path, clean, first, times[0]), times[0], times[1], second)
    direct = mix(path, clean, second, times[1])
    assert torch.allclose(back.mean(0), direct.mean(0), atol=0.02)
    assert torch.allclose(back.std(0), direct.std(0), atol=0.02)
    end = torch.tensor(0.0 if isinstance(path, Flow) else -1.0)
    assert torch.allclose(renoise(path, clean, end, times[1], second), direct, atol=1e-5), "from clean latents it is the forward process"
