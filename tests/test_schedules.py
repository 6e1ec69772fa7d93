"""Schedules: grids equal to the diffusers scheduler's, and plans that keep their promises."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from visalign.schedules import StepPlan, all_steps, deterministic, flow_match_euler, linear, shifted, span, window


def test_linear() -> None:
    assert_close(linear(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.1581929, 0.5])
def test_shift_keeps_the_ends_exactly(shift: float) -> None:
    grid = shifted(linear(7).double(), shift)
    assert grid[0] == 1
    assert grid[-1] == 0
    middle = linear(7).double()[1:-1]
    assert_close(grid[1:-1], shift * middle / (1 + (shift - 1) * middle), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [2, 6, 10, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("terminal", [None, 0.02, 0.1])
def test_grid_of_diffusers(steps: int, shift: float, terminal: float | None) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)  # pyright: ignore[reportArgumentType]
    scheduler.set_timesteps(steps)
    grid = flow_match_euler(steps, shift, terminal)
    assert grid.dtype == torch.float32
    assert_close(grid, scheduler.sigmas, rtol=0, atol=3e-7)
    if terminal is not None:
        assert grid[-2].item() == pytest.approx(terminal, abs=1e-6)


def test_one_step() -> None:
    assert flow_match_euler(1, 3.0).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 2 steps"):
        flow_match_euler(1, 3.0, 0.02)


def test_all_steps_leave_the_last_to_the_ode() -> None:
    assert all_steps(4) == StepPlan((True, True, True, False), range(3))
    assert all_steps(4, last=True) == StepPlan((True,) * 4, range(4))
    assert deterministic(4) == StepPlan((False,) * 4, range(0))
    assert len(all_steps(4)) == 4


def test_window_is_uniform_and_a_function_of_seed_and_step() -> None:
    plans = [window(10, 3, 0, 5, seed=1, step=step) for step in range(3000)]
    starts = torch.tensor([plan.recorded.start for plan in plans])
    assert_close(starts.bincount() / 3000, torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    assert plans == [window(10, 3, 0, 5, seed=1, step=step) for step in range(3000)]
    assert plans[:50] != [window(10, 3, 0, 5, seed=2, step=step) for step in range(50)]
    for plan in plans[:20]:
        assert [j for j, stochastic in enumerate(plan.stochastic) if stochastic] == list(plan.recorded)
        assert len(plan.recorded) == 3


@pytest.mark.parametrize(("size", "low", "high"), [(0, 0, 5), (6, 0, 5), (3, -1, 5), (3, 4, 11)])
def test_no_such_window(size: int, low: int, high: int) -> None:
    with pytest.raises(ValueError, match="no window"):
        window(10, size, low, high, 0, 0)


@pytest.mark.parametrize("recorded", [range(2, 4), range(0, 5), range(-1, 2), range(0, 3, 2)])
def test_a_plan_records_consecutive_stochastic_steps_only(recorded: range) -> None:
    with pytest.raises(ValueError, match="stochastic"):
        StepPlan((True, True, True, False), recorded)


def test_span() -> None:
    assert span(4, 1, 2) == StepPlan((False, True, True, False), range(1, 3))
    with pytest.raises(ValueError, match="recorded"):
        span(4, 3, 2)
