"""The axes: what sections of a recipe mean."""

from __future__ import annotations

import pytest
import torch

from visalign.axes import Ratio
from visalign.config import RatioSection
from visalign.paths import Flow
from visalign.rollout import Condition, Minibatch
from visalign.sampling import Dynamics
from visalign.schedules import flow_match_euler
from visalign.transitions import kernel


@pytest.mark.parametrize("kind", ["plain", "guard", "cps"])
@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "ddim"])
def test_equal_gain_gives_every_step_a_gradient_of_one_size(kind: str, transition: str) -> None:
    grid, dynamics = flow_match_euler(8, 2.0), Dynamics(transition, 0.7)
    ratio = Ratio(RatioSection.model_validate({"kind": kind, "weight": "equal_gain", "clip": 1.0}), Flow(), grid, dynamics)
    rng = torch.Generator().manual_seed(0)
    x, noise, said = (torch.randn(1, 4, 8, 8, generator=rng) for _ in range(3))
    sizes: list[float] = []
    for j in range(7):
        now, after = grid[j : j + 1], grid[j + 1 : j + 2]
        prediction = said.clone().requires_grad_()
        law = kernel(Flow(), x, prediction, now, after, dynamics(Flow(), now, after))
        x_next = law.draw(noise).detach()
        old, one = law.log_prob(x_next).detach(), torch.ones(1)
        none = torch.zeros(1).long()
        batch = Minibatch(x, x_next, now, after, torch.tensor([j]), old, one, Condition(none, {}), none, none, said)
        ratio.loss(batch, law, prediction).value.backward()
        assert prediction.grad is not None
        sizes.append(float(prediction.grad.norm()))
    assert max(sizes) / min(sizes) < 1 + 1e-4
