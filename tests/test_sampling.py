"""Rollouts: what a plan stores, and the higher-order end of MixGRPO-Flash."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from visalign.families.toy import Toy
from visalign.paths import endpoints
from visalign.policy import Policy
from visalign.rollout import Condition, Prompts, Rollout, Trajectory
from visalign.sampling import Dynamics, rollout
from visalign.schedules import StepPlan, all_steps, flash, span, tail, tree
from visalign.solvers import solve

STEPS, COUNT = 10, 6


def draw(policy: Policy, plan: StepPlan, batch: int = 4) -> Trajectory:
    given = Prompts.of(["a"] * COUNT)
    condition = policy.family.encode(given.texts)
    dynamics = Dynamics("flow_sde", 0.7)
    return rollout(policy, given, condition, steps=STEPS, seed=0, batch=batch, plan=plan, dynamics=dynamics, keep_predictions=True)


@pytest.mark.parametrize(("start", "share", "nfe"), [(0, 0.25, 4), (0, 1.0, 10), (3, 0.4, 7), (7, 0.4, 10)])
def test_a_finished_chain_costs_less_and_explores_the_same(start: int, share: float, nfe: int) -> None:
    policy, plan = Policy(Toy("mixture", STEPS)), span(STEPS, start, 2)
    slow, fast = draw(policy, plan), draw(policy, flash(plan, share))
    assert slow.nfe == STEPS
    assert fast.nfe == nfe
    for name in ("latents", "predictions", "log_probs", "steps", "node"):
        assert torch.equal(getattr(slow, name), getattr(fast, name)), name


@torch.no_grad()
def test_the_finish_remembers_the_last_stochastic_step() -> None:
    policy, plan = Policy(Toy("mixture", STEPS)), span(STEPS, 3, 2)
    trajectory = draw(policy, flash(plan, 0.6), batch=COUNT)
    assert trajectory.predictions is not None
    clean, _ = endpoints(policy.family.path, trajectory.latents[:, 1], trajectory.predictions[:, 1], trajectory.sigmas[4])
    condition, times = policy.family.encode(["a"] * COUNT), tail(trajectory.sigmas, 5, 3)
    x, memory = trajectory.latents[:, 2], (trajectory.sigmas[4], clean)
    assert torch.equal(solve(policy, x, times, condition, 1.0, solver="dpm2m", previous=memory), trajectory.final)


def test_predictions_are_what_the_network_says_at_the_stored_states() -> None:
    policy, plan = Policy(Toy("mixture", STEPS)), StepPlan(all_steps(STEPS, last=True).stochastic, (0, 1, 4, 9))
    trajectory = draw(policy, plan)
    assert trajectory.predictions is not None
    assert trajectory.at[0].tolist() == list(plan.stored) == [0, 1, 2, 4, 5, 9, 10]
    for k, point in enumerate(plan.stored[:-1]):
        with torch.no_grad():
            said = policy.predict(trajectory.latents[:, k], trajectory.sigmas[point].expand(COUNT), policy.family.encode(["a"] * COUNT))
        assert torch.equal(said, trajectory.predictions[:, k])
    assert not trajectory.predictions[:, -1].any(), "nothing is said of a final state"


class Shaped(Policy):
    """What it says depends on the size of the batch: as rounding does, but for all to see."""

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        return super().predict(x, sigma, condition, guidance) + 0.1 * len(x)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("size", [3, 4, 6, 12, 24])
@torch.no_grad()
def test_a_group_shares_its_first_draw_and_replays_to_the_bit(start: int, size: int) -> None:
    count, unique, width = 12, 4, 2
    policy, plan, dynamics = Shaped(Toy("mixture", STEPS)), span(STEPS, start, width), Dynamics("flow_sde", 0.7)
    given = Prompts.of(["a"] * count)
    given = replace(given, noise_ids=given.ids // (count // unique) * 100)
    condition = policy.family.encode(given.texts)
    drawn = rollout(policy, given, condition, steps=STEPS, seed=0, batch=size, plan=plan, dynamics=dynamics, keep_predictions=True)
    assert drawn.nfe * count == (start + 1) * unique + (STEPS - start - 1) * count
    collected = Rollout(given, condition, drawn, drawn.final, advantages=torch.zeros(count, width))
    columns, rows = torch.ones(width, count).nonzero().unbind(1)
    batches = list(collected.minibatches(rows, columns, size))
    assert sum(map(len, batches)) == width * count
    assert sum(len(batch.first) for batch in batches) == unique + count  # forwards of the replay
    for batch in batches:
        first = batch.first
        said = policy.predict(batch.x[first], batch.sigma[first], batch.condition.take(first))[batch.start]
        assert batch.prediction is not None
        assert torch.equal(said, batch.prediction)
        assert torch.equal(batch.x[first][batch.start], batch.x)


def test_half_precision_replays_a_choice_in_the_shape_of_the_rollout() -> None:
    policy, plan, dynamics, count, size = Shaped(Toy("mixture", STEPS)), span(STEPS, 1, 2), Dynamics("flow_sde", 0.7), 7, 4
    given = Prompts.of(["a"] * count)
    condition = policy.family.encode(given.texts)
    drawn = rollout(policy, given, condition, steps=STEPS, seed=0, batch=size, plan=plan, dynamics=dynamics, keep_predictions=True)
    collected = Rollout(given, condition, drawn, drawn.final, advantages=torch.zeros(count, 2))
    columns, rows = torch.tensor([[1, 0, 1], [0, 1, 0]]).nonzero().unbind(1)
    for batch in collected.minibatches(rows, columns, size, whole=True):
        first = batch.first
        said = policy.predict(batch.x[first], batch.sigma[first], batch.condition.take(first))[batch.start]
        assert batch.prediction is not None
        assert torch.equal(said, batch.prediction)
        assert len(first) == size


def test_a_tree_is_for_another_function() -> None:
    with pytest.raises(ValueError, match="tree_rollout"):
        draw(Policy(Toy("gaussian", STEPS)), tree(STEPS, (0,)))
