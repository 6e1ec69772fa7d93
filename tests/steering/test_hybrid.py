"""The hybrid sampler: early steps with what was learned, late ones without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visalign
from tests.steering.conftest import Run
from visalign.errors import UserError
from visalign.policy import Policy


def shifted(policy: Policy) -> Policy:
    """The policy after it has learned to move by one unit at every step."""
    network: Any = policy.family.network
    with torch.no_grad():
        network.shift += 1.0
    return policy


def test_each_part_of_the_chain_has_its_own_weights(run: Run, policy: Policy) -> None:
    base, _ = run("plain")
    shifted(policy)
    aligned, _ = run("plain")
    ends = {switch: run("hybrid", switch=switch)[0].best for switch in (0.0, 0.5, 1.0)}
    assert base.best is not None
    assert aligned.best is not None
    found = {switch: best.latents for switch, best in ends.items() if best is not None}
    assert torch.equal(found[0.0], base.best.latents)
    assert torch.equal(found[1.0], aligned.best.latents)
    task, _ = run("plain")
    half = task.walk(task.noise(), task.rows(), 0, 3)
    with policy.reference():
        assert torch.equal(found[0.5], task.walk(half, task.rows(), 3))


def test_it_needs_something_learned_and_a_reward_to_choose_by() -> None:
    policy = visalign.load("toy:gaussian", device="cpu")
    with pytest.raises(UserError, match="toy:gaussian has nothing learned to mix with its base; load a run folder"):
        visalign.sample(policy, "a", method="hybrid")
    policy.keep_reference()
    assert visalign.sample(policy, "a", method="hybrid").nfe == 10
    with pytest.raises(UserError, match=r"hybrid.candidates=2: nothing to choose by"):
        visalign.sample(policy, "a", method="hybrid", candidates=2)
