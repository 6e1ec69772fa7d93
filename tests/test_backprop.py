"""Chains with a graph: the same pictures as without, the same gradient with and without checkpointing, and truncation where asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visalign.backprop import denoise
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


def test_depth_cuts_the_graph_before_the_last_steps(policy: Policy) -> None:
    x = torch.randn(3, 2)
    whole, (by_weights, by_x) = gradient(policy, x)[0], gradient(policy, x, depth=2)
    assert not by_weights[:2].any()
    assert torch.allclose(by_weights[2:], whole[2:])
    assert not by_x.any()


def test_truncated_predictions_are_constants_and_states_are_not(policy: Policy) -> None:
    x = torch.randn(2, 2)
    by_weights, by_x = gradient(policy, x, truncated=torch.tensor([STEPS, STEPS]))
    assert not by_weights.any()
    assert torch.allclose(by_x, 2 * denoise(policy, x, policy.family.encode(["", ""]), steps=STEPS), atol=1e-5)  # x' = x - Δ·constant
