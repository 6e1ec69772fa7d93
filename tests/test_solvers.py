"""Solvers: their order on a Gaussian whose flow is known, and completions equal to one chain at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.families.toy import Toy
from visalign.noise import gaussian
from visalign.paths import Trigonometric, VariancePreserving, endpoints
from visalign.policy import Policy
from visalign.rollout import Prompts, Trajectory
from visalign.sampling import Dynamics, rollout
from visalign.schedules import StepPlan, all_steps, linear, span, tail
from visalign.solvers import Solver, complete, dpm2m, predict_all, solve

MEAN, STD = torch.tensor([1.0, -0.5]), 0.6  # of the toy's Gaussian world
STEPS, COUNT = 10, 6
SDE = Dynamics("flow_sde", 0.7)


def toy(world: str = "mixture") -> Policy:
    return Policy(Toy(world, STEPS))


def prompts(shared: bool = False) -> Prompts:
    given = Prompts.of(["a"] * COUNT)
    return replace(given, groups=given.ids // 3, noise_ids=given.ids // 3 * 3) if shared else given


def draw(policy: Policy, plan: StepPlan, shared: bool = False, keep: bool = True) -> Trajectory:
    given = prompts(shared)
    condition = policy.family.encode(given.texts)
    return rollout(policy, given, condition, steps=STEPS, seed=0, batch=4, plan=plan, dynamics=SDE, keep_predictions=keep)


def finished(policy: Policy, trajectory: Trajectory, **options: object) -> tuple[Tensor, int]:
    """The completions, and the forwards that they took."""
    spent = policy.nfe
    done = complete(policy, trajectory, policy.family.encode(["a"] * COUNT), 1.0, batch=4, **options)  # pyright: ignore[reportArgumentType]
    return done, policy.nfe - spent


@torch.no_grad()
def one_by_one(policy: Policy, trajectory: Trajectory, steps: int, solver: Solver) -> Tensor:
    """The same without sharing anything: every stored state by itself, with all of its forwards."""
    done = trajectory.latents.clone()
    for n, k in torch.cartesian_prod(*map(torch.arange, trajectory.node.shape)).tolist():
        at = int(trajectory.at[n, k])
        if at < STEPS:
            times = tail(trajectory.sigmas, at, min(steps, STEPS - at))
            x, condition = trajectory.latents[n : n + 1, k], policy.family.encode(["a"])
            done[n, k] = solve(policy, x, times, condition, 1.0, solver=solver)[0]
    return done


def order(errors: list[float]) -> float:
    """Mean exponent of a sequence of errors at doubled numbers of steps."""
    return float(torch.tensor(errors).log2().diff().mean().neg())


@torch.no_grad()
def errors(solver: Solver, start: float, end: float) -> list[float]:
    """Distance of 16, 32, 64 and 128 even steps to where the Gaussian's ODE leads: x keeps its distance to the mean in stds."""
    policy = toy("gaussian")
    x, condition = gaussian((2,), 0, torch.arange(64), 0), policy.family.encode(["a"] * 64)
    (mean, std), (mean_end, std_end) = (((1 - t) * MEAN, (((1 - t) * STD) ** 2 + t**2) ** 0.5) for t in (start, end))
    truth = mean_end + std_end * (x - mean) / std
    grids = [end + (start - end) * linear(n) for n in (16, 32, 64, 128)]
    return [float((solve(policy, x, grid, condition, 1.0, solver=solver) - truth).square().mean().sqrt()) for grid in grids]


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("dpm2m", 2)])
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_order_on_the_gaussian(solver: Solver, expected: int, start: float) -> None:
    assert order(errors(solver, start, 0.1)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("start", [1.0, 0.8])
def test_the_last_step_to_clean_data_costs_dpm2m_little(start: float) -> None:
    assert order(errors("dpm2m", start, 0.0)[1:]) > 1.6
    assert all(fine < coarse / 6 for fine, coarse in zip(errors("dpm2m", start, 0.0), errors("euler", start, 0.0), strict=True))


@pytest.mark.parametrize("end", [39, -1])
def test_dpm2m_on_a_variance_preserving_path(end: int) -> None:
    path, missed = VariancePreserving(torch.linspace(0.999, 0.01, 200, dtype=torch.float64)), []
    spread = lambda t: ((a := path.coefficients(t))[0].square() * STD**2 + a[1].square()).sqrt()  # noqa: E731
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for n in (16, 32, 64, 128):
        x, previous = x0, None
        times = torch.linspace(180, end, n + 1, dtype=torch.float64)  # -1 is clean data
        for t, t_next in pairwise(times):
            alpha = path.coefficients(t)[0]
            clean = 1 + alpha * STD**2 / spread(t).square() * (x - alpha)  # E[clean | x] where the data are N(1, STD²)
            x, previous = dpm2m(path, x, clean, t, t_next, previous), (t, clean)
        truth = path.coefficients(times[-1])[0] + spread(times[-1]) * (x0 - path.coefficients(times[0])[0]) / spread(times[0])
        missed.append(float((x - truth).square().mean().sqrt()))
    assert missed[-1] < 2e-3
    if end > 0:
        assert order(missed) == pytest.approx(2, abs=0.1)


def test_dpm2m_after_a_start_just_beyond_pure_noise_is_of_first_order() -> None:
    path, x, clean = Trigonometric(), torch.ones(2, 3), torch.full((2, 3), 0.5)
    before, t, t_next = torch.tensor([1.5708, 1.3, 0.9])  # the first is more than π/2, as SANA-Sprint's is
    first = dpm2m(path, x, clean, t, t_next, None)
    assert torch.equal(dpm2m(path, x, clean, t, t_next, (before, clean + 1)), first)


@torch.no_grad()
def test_euler_is_the_rollouts_ode_to_the_bit() -> None:
    policy, given = toy(), prompts()
    condition = policy.family.encode(given.texts)
    still = rollout(policy, given, condition, steps=STEPS, seed=0, batch=COUNT)
    x = gaussian((2,), 0, given.noise_ids, 0)
    assert torch.equal(solve(policy, x, still.sigmas, condition, 1.0, solver="euler"), still.final)
    assert_close(solve(policy, x, still.sigmas, condition, 1.0, solver="euler", batch=4), still.final)


@torch.no_grad()
def test_known_prediction_and_memory() -> None:
    policy = toy()
    condition, sigmas = policy.family.encode(["a"] * 4), linear(6)
    x = gaussian((2,), 0, torch.arange(4), 0)
    whole = solve(policy, x, sigmas, condition, 1.0, solver="dpm2m")
    before, half = (solve(policy, x, sigmas[:n], condition, 1.0, solver="dpm2m") for n in (3, 4))
    said, prediction = (predict_all(policy, state, sigmas[k], condition, 1.0, 4) for k, state in ((2, before), (3, half)))
    memory = sigmas[2], endpoints(policy.family.path, before, said, sigmas[2])[0]
    spent = policy.nfe
    rest = solve(policy, half, sigmas[3:], condition, 1.0, solver="dpm2m", prediction=prediction, previous=memory)
    assert policy.nfe - spent == 4 * 2, "three steps, the first of them known"
    assert torch.equal(rest, whole)
    assert not torch.equal(solve(policy, half, sigmas[3:], condition, 1.0, solver="dpm2m"), whole)


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
@pytest.mark.parametrize("steps", [None, 1, 2, 4])
@pytest.mark.parametrize("plan", [all_steps(STEPS), all_steps(STEPS, last=True), span(STEPS, 3, 2)])
def test_completions_are_those_of_every_state_by_itself(plan: StepPlan, steps: int | None, solver: Solver) -> None:
    policy = toy()
    trajectory = draw(policy, plan)
    expected = one_by_one(policy, trajectory, steps or STEPS, solver)
    assert_close(finished(policy, trajectory, steps=steps, solver=solver)[0], expected)
    without = replace(trajectory, predictions=None)
    assert_close(finished(policy, without, steps=steps, solver=solver)[0], expected)


def test_forwards_of_completions() -> None:
    policy = toy()
    chain, window = draw(policy, all_steps(STEPS)), draw(policy, span(STEPS, 3, 2))
    assert finished(policy, chain)[1] == 45 * COUNT
    assert finished(policy, chain, steps=1)[1] == 0
    assert finished(policy, chain, steps=2)[1] == 9 * COUNT, "all but the last of ten states have a second step"
    assert finished(policy, replace(chain, predictions=None))[1] == 55 * COUNT
    assert finished(policy, window)[1] == (6 + 5 + 4) * COUNT
    assert finished(policy, window, reuse_final=True)[1] == (6 + 5) * COUNT
    assert finished(policy, window, steps=3, solver="dpm2m")[1] == 3 * 2 * COUNT


def test_the_last_completion_is_the_picture() -> None:
    policy = toy()
    trajectory = draw(policy, span(STEPS, 3, 2))
    assert_close(finished(policy, trajectory)[0][:, -1], trajectory.final)
    for steps in (None, 1):
        assert torch.equal(finished(policy, trajectory, steps=steps, reuse_final=True)[0][:, -1], trajectory.final)


def test_a_state_that_pictures_share_is_completed_once() -> None:
    policy = toy()
    trajectory = draw(policy, span(STEPS, 3, 2), shared=True)
    done, forwards = finished(policy, trajectory)
    assert forwards == 6 * 2 + (5 + 4) * COUNT, "two initial noises"
    assert_close(done, one_by_one(policy, trajectory, STEPS, "euler"))
    assert torch.equal(done[:3, 0], done[:1, 0].expand(3, -1))
