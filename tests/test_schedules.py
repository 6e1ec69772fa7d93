"""Schedules: grids equal to the diffusers scheduler's, and plans that keep their promises."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from visalign.schedules import (
    StepPlan,
    all_steps,
    deterministic,
    flash,
    flow_match_euler,
    linear,
    mixed_tree,
    shifted,
    span,
    tail,
    tree,
    window,
    window_start,
)


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
    assert all_steps(4) == StepPlan((True, True, True, False), tuple(range(3)))
    assert all_steps(4, last=True) == StepPlan((True,) * 4, tuple(range(4)))
    assert deterministic(4) == StepPlan((False,) * 4, tuple(range(0)))
    assert len(all_steps(4)) == 4


def test_window_is_uniform_and_a_function_of_seed_and_step() -> None:
    plans = [window(10, 3, 0, 5, seed=1, step=step) for step in range(3000)]
    starts = torch.tensor([plan.recorded[0] for plan in plans])
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


@pytest.mark.parametrize("recorded", [(2, 3), (0, 1, 2, 3, 4), (-1, 0, 1), (2, 0), (1, 1)])
def test_a_plan_records_increasing_stochastic_steps_only(recorded: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stochastic"):
        StepPlan((True, True, True, False), recorded)


def test_span() -> None:
    assert span(4, 1, 2) == StepPlan((False, True, True, False), tuple(range(1, 3)))
    with pytest.raises(ValueError, match="recorded"):
        span(4, 3, 2)


def test_progressive_window_moves_rolls_over_and_is_never_empty() -> None:
    starts = [window_start("progressive", step, 3, 1, 8, every=2, stride=2) for step in range(1, 15)]
    assert starts == [1, 1, 3, 3, 5, 5, 1, 1, 3, 3, 5, 5, 1, 1]
    starts = [window_start("progressive", step, 4, 0, 7, every=1, stride=2) for step in range(1, 7)]
    assert starts == [0, 2, 0, 2, 0, 2], "from 4 the window would leave [0, 7)"
    plans = {window(10, 3, 0, 9, 0, step, "progressive", every=1).recorded for step in range(1, 100)}
    assert plans == {(start, start + 1, start + 2) for start in range(7)}


def test_exponentially_decaying_stay() -> None:
    starts = [window_start("exp_decay", step, 2, 11, 19, every=10, rate=0.5) for step in range(1, 200)]
    stays = [10, 10, 10, 7, 4, 3, 2]  # ceil(10·exp(-max(0, start - 13) / 2)) at 11 … 17
    cycle = [start for start, stay in zip(range(11, 18), stays, strict=True) for _ in range(stay)]
    assert starts == (cycle * 5)[:199]


def test_fixed_window() -> None:
    assert {window(10, 2, 3, 8, 0, step, "fixed") for step in range(1, 40)} == {span(10, 3, 2)}


def test_tail_is_the_grid_where_it_has_as_many_steps() -> None:
    grid = flow_match_euler(10, 3.0)
    for start in range(10):
        assert torch.equal(tail(grid, start, 10 - start), grid[start:])
        assert torch.equal(tail(grid, start, 1), grid[[start, 10]])
    assert_close(tail(linear(10), 4, 4), torch.tensor([0.6, 0.45, 0.3, 0.15, 0.0]))
    assert torch.equal(tail(grid, 4, 3), grid[[4, 6, 8, 10]])


def test_tree() -> None:
    plan = tree(6, (0, 2))
    assert plan == StepPlan((True,) * 5 + (False,), tuple(range(5)), (2, 1, 2, 1, 1, 1))
    assert (plan.leaves, plan.splits, plan.stored) == (4, (0, 2), tuple(range(6)))
    assert tree(4, (0,), 3).leaves == 3
    assert tree(4, ()).leaves == all_steps(4).leaves == 1
    for branches in ((5,), (6,)):
        with pytest.raises(ValueError, match="branching"):
            tree(6, branches)
    assert tree(6, (5,), last=True).leaves == 2


def test_mixed_tree() -> None:
    plan = mixed_tree(10, (0, 3), size=1, interval=4)
    assert plan.recorded == (0, 3, 4, 8)
    assert plan.stored == (0, 1, 3, 4, 5, 8, 9)
    assert [plan.stored[k] for k in plan.before] == list(plan.recorded)
    assert plan.leaves == 4
    assert mixed_tree(9, (), size=2, interval=4).recorded == (0, 1, 4, 5), "the last step is never stochastic"


@pytest.mark.parametrize("widths", [(1, 2, 1), (0, 1, 1, 1), (1, 1, 1, 2)])
def test_widths_that_make_no_tree(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"widths|branching"):
        StepPlan((True, True, True, False), (0, 1, 2), widths)


def test_flash() -> None:
    plan = flash(span(25, 0, 4), 0.2)
    assert (plan.handover, plan.finish) == (4, 4)
    assert flash(span(25, 20, 4), 0.4).finish == 1
    assert flash(span(25, 6, 4), 0.4).finish == 6
    assert span(25, 0, 4).handover == 25
    for nothing in (deterministic(4), all_steps(4, last=True)):
        with pytest.raises(ValueError, match="finish"):
            flash(nothing, 0.5)
