"""Chains with a graph: the same pictures as without, the same gradient with and without checkpointing, and no more than asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visalign.backprop import denoise, predict
from visalign.families.toy import Toy
from visalign.noise import gaussian
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import rollout

STEPS = 4


@pytest.fixture
def policy() -> Policy:
    made = Policy(Toy("mixture", steps=STEPS), name="toy:mixture")
    made.family.network.shift.data.normal_(generator=torch.Generator().manual_seed(1))
    return made


def gradient(policy: Policy, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Of the final states' sum of squares: by the weights, and by x."""
    x = x.clone().requires_grad_()
    final = denoise(policy, x, policy.family.encode([""] * len(x)), steps=STEPS, **options)  # type: ignore[arg-type]
    shift = policy.family.network.shift
    by_weights, by_x = torch.autograd.grad(final.square().sum(), [shift, x], allow_unused=True)
    return by_weights, torch.zeros_like(x) if by_x is None else by_x


def test_it_ends_where_the_rollout_does(policy: Policy) -> None:
    prompts = Prompts.of(["", "", ""])
    drawn = rollout(policy, prompts, policy.family.encode(prompts.texts), steps=STEPS, seed=0, batch=3)
    x = gaussian(policy.family.latent_shape, 0, prompts.noise_ids, 0)
    assert torch.equal(denoise(policy, x, policy.family.encode(prompts.texts), steps=STEPS), drawn.final)


def test_checkpointing_changes_no_gradient(policy: Policy) -> None:
    x = torch.randn(5, 2)
    for own, other in zip(gradient(policy, x), gradient(policy, x, checkpointing=False), strict=True):
        assert torch.equal(own, other)


def test_the_gradient_is_the_finite_difference(policy: Policy) -> None:
    x, way = torch.randn(1, 2), torch.randn(1, 2)
    condition = policy.family.encode([""])
    ends = [denoise(policy, x + sign * 1e-3 * way, condition, steps=STEPS).square().sum() for sign in (1, -1)]
    assert (gradient(policy, x)[1] * way).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 2e-3, rel=1e-2)


def test_a_chain_in_two_parts_is_the_chain_and_the_part_without_a_graph_teaches_nothing(policy: Policy) -> None:
    x, condition, shift = torch.randn(3, 2), policy.family.encode([""] * 3), policy.family.network.shift
    whole = denoise(policy, x, condition, steps=STEPS)
    with torch.no_grad():
        half = denoise(policy, x, condition, steps=STEPS, last=2)
    final = denoise(policy, half, condition, steps=STEPS, first=2)
    assert torch.equal(final, whole)
    (by_weights,) = torch.autograd.grad(final.square().sum(), shift)
    assert not by_weights[:2].any()
    torch.testing.assert_close(by_weights[2:], gradient(policy, x)[0][2:])


def test_a_known_prediction_saves_a_forward(policy: Policy) -> None:
    x, condition = torch.randn(3, 2), policy.family.encode([""] * 3)
    whole, before = denoise(policy, x, condition, steps=STEPS), policy.nfe
    said = predict(policy, x, torch.ones(3), condition, 1.0)
    assert torch.equal(denoise(policy, x, condition, steps=STEPS, prediction=said), whole)
    assert policy.nfe - before == 3 * STEPS


def test_several_steps_are_taken_twice_and_a_single_one_is_not(policy: Policy) -> None:
    x, condition = torch.randn(3, 2), policy.family.encode([""] * 3)
    for first, forwards in ((0, 2 * STEPS), (STEPS - 1, 1)):
        before = policy.nfe
        denoise(policy, x, condition, steps=STEPS, first=first).sum().backward()
        assert policy.nfe - before == 3 * forwards
