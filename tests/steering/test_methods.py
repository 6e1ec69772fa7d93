"""What every method keeps to: one evaluation is the plain sample, budgets hold, seeds repeat, failures don't spread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.steering.conftest import Run
from tests.toy_rewards import Closeness, Flaky
from visalign import registry, sources
from visalign.drawing import listed
from visalign.errors import UserError
from visalign.findings import Budget
from visalign.guiding import Method
from visalign.policy import Policy
from visalign.sampling import pictures
from visalign.scoring import Panel, RewardInput, RewardOutput
from visalign.tasks import MANY, Task

METHODS = [name for name in registry.names("steering") if issubclass(registry.load("steering", name), Method)]
SEARCHES = [name for name in METHODS if name not in ("plain", "hybrid")]
STEPS = 6


def test_every_file_is_a_method_that_says_what_it_is() -> None:
    assert registry.names("steering") == METHODS
    for name in METHODS:
        assert sources.summary("steering", name).strip()
        assert registry.load("steering", name)().name == name


@pytest.mark.parametrize("budget", [{"nfe": STEPS}, {"reward_calls": 1}, {"nfe": 1.4 * STEPS, "reward_calls": 1}])
@pytest.mark.parametrize("method", METHODS)
def test_one_evaluation_is_the_plain_sample(run: Run, policy: Policy, method: str, budget: dict[str, Any]) -> None:
    task, states = run(method, budget=budget)
    assert (task.nfe, task.nfe_backward, task.scored) == (STEPS, 0, 4)
    assert task.best is not None
    assert torch.equal(task.best.images, pictures(policy, task.prompts, steps=STEPS, seed=0))
    assert states[-1].best is task.best


@pytest.mark.parametrize("budget", [{"nfe": 40}, {"nfe": 61.5}, {"reward_calls": 17}, {"nfe": 200, "reward_calls": 11}])
@pytest.mark.parametrize("method", SEARCHES)
def test_budgets_hold_and_searching_helps(run: Run, method: str, budget: dict[str, Any]) -> None:
    task, states = run(method, n=16, budget=budget)
    plain, _ = run("plain", n=16)
    assert task.best is not None
    assert plain.best is not None
    assert task.nfe + 2 * task.nfe_backward <= budget.get("nfe", MANY) + 1e-6
    assert task.scored / 16 <= budget.get("reward_calls", MANY)
    assert max(task.nfe / budget.get("nfe", MANY), task.scored / 16 / budget.get("reward_calls", MANY)) > 0.3, "most of it is used"
    assert task.best.total.mean() > plain.best.total.mean()
    costs = [(state.nfe, state.reward_calls) for state in states]
    assert costs == sorted(costs)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_and_no_picture_depends_on_its_batch(run: Run, method: str) -> None:
    budget = {"nfe": 60}
    first, _ = run(method, budget=budget)
    again, _ = run(method, budget=budget, sampler={"steps": STEPS, "batch": 3})
    other, _ = run(method, budget=budget, sampler={"steps": STEPS, "seed": 1})
    alone, _ = run(method, n=2, budget=budget)
    assert first.best is not None
    assert again.best is not None
    assert other.best is not None
    assert alone.best is not None
    assert torch.allclose(first.best.latents, again.best.latents, atol=1e-5)
    assert torch.allclose(first.best.latents[:2], alone.best.latents, atol=1e-5)
    assert not torch.allclose(first.best.latents, other.best.latents, atol=1e-2)


@pytest.mark.parametrize("method", SEARCHES)
def test_without_a_budget_a_search_ends_by_itself_and_by_time_soon(run: Run, method: str) -> None:
    own, states = run(method)
    assert own.best is not None
    assert all(state.steps for state in states)
    timed, _ = run(method, budget={"seconds": 0.05})
    assert timed.best is not None
    assert timed.seconds < 5


@pytest.mark.parametrize("method", METHODS)
def test_failed_scores_lose_but_break_nothing(run: Run, method: str) -> None:
    for share in (0.5, 1.0):
        task, _ = run(method, budget={"nfe": 60}, panel=Panel({"flaky": (Flaky(first=2, share=share), 1.0)}))
        assert task.best is not None
        assert task.best.images.isfinite().all()


class Compared(Closeness):
    """Ranks the pictures of a group: only the order within it counts."""

    spec = replace(Closeness.spec, scope="group", needs=frozenset({"groups"}))

    def score(self, batch: RewardInput) -> RewardOutput:
        assert batch.groups is not None
        assert len(batch.groups.unique()) * 4 == len(batch), "whole groups, and the candidates apart"
        return super().score(batch)


@pytest.mark.parametrize("method", SEARCHES)
def test_rewards_that_compare_see_whole_groups_or_are_refused(run: Run, method: str) -> None:
    refusal = ""
    try:
        run(method, budget={"nfe": 60}, panel=Panel({"ranked": (Compared(), 1.0)}), sampler={"steps": STEPS, "batch": 3})
    except UserError as error:
        refusal = str(error)
    assert not refusal or "compares pictures" in refusal


class Narrow(torch.nn.Module):
    """A network that fits so many latents into memory."""

    def __init__(self, inner: torch.nn.Module, most: int):
        super().__init__()
        self.inner, self.most, self.tries = inner, most, 0

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.tries += 1
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory, tried to allocate more")
        return self.inner(x, sigma)


@pytest.mark.parametrize("method", ["plain", "feynman_kac", "gradient"])
def test_batches_shrink_to_what_fits(run: Run, policy: Policy, method: str) -> None:
    free, _ = run(method, budget={"nfe": 40})
    policy.network = Narrow(policy.network, 3)
    task, _ = run(method, budget={"nfe": 40}, sampler={"steps": STEPS, "batch": 16})
    assert free.best is not None
    assert task.best is not None
    assert task.batch <= 3
    assert task.nfe == free.nfe, "what did not fit is not counted"
    assert torch.allclose(task.best.latents, free.best.latents, atol=1e-5)


def test_what_never_fits_is_one_line(run: Run, policy: Policy) -> None:
    policy.network = Narrow(policy.network, 0)
    with pytest.raises(UserError, match="one picture at a time does not fit"):
        run("plain")
    with pytest.raises(UserError, match=r"budget\.memory: only a CUDA device"):
        run("plain", budget={"memory": 4})


def test_a_budget_below_one_picture_is_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match=r"budget\.nfe=5 is less than one picture: 6 steps at guidance 1 are 6 NFE"):
        Task(policy, listed("a", 1), steps=6, budget=Budget(nfe=5))
