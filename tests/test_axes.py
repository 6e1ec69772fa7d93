"""The axes: what sections of a recipe mean."""

from __future__ import annotations

import pytest
import torch

from tests.toy_rewards import Brightness
from visalign.axes import Credit, Ratio
from visalign.config import CreditSection, RatioSection
from visalign.errors import UserError
from visalign.paths import Flow
from visalign.rollout import Condition, Minibatch, Prompts, Rollout, Trajectory
from visalign.sampling import Dynamics
from visalign.schedules import flow_match_euler
from visalign.scoring import Panel
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
        batch = Minibatch(x, x_next, now, after, torch.tensor([j]), old, one, Condition(none, {}), none, none, none, none, said)
        ratio.loss(batch, law, prediction).value.backward()
        assert prediction.grad is not None
        sizes.append(float(prediction.grad.norm()))
    assert max(sizes) / min(sizes) < 1 + 1e-4


def drawn(weights: list[float] | None) -> Rollout:
    """Four samples of one group over two steps; the first two share their first step."""
    node = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 2, 2], [0, 3, 3]])
    steps, nothing = torch.tensor([[0, 1]]).expand(4, 2), torch.zeros(4, 3, 1)
    trajectory = Trajectory(nothing, torch.tensor([0, 1]), steps, torch.zeros(3), torch.zeros(4, 2), node, nothing[:, 0], 2.0)
    given = None if weights is None else torch.tensor(weights)
    texts = Prompts(["p"] * 4, [{}] * 4, torch.zeros(4, dtype=torch.int64), *(torch.arange(4) for _ in range(2)))
    none = torch.zeros(4).long()
    rewards = {name: torch.tensor([1.0, 2.0, 3.0, 6.0]) for name in ("bright", "total")}
    return Rollout(texts, Condition(none, {}), trajectory, nothing, rewards, weights=given)


def test_weights_scale_advantages_after_normalisation_and_are_shared_along_a_tree() -> None:
    panel = Panel({"bright": (Brightness(), 1.0)})
    for section in (CreditSection(), CreditSection(std="group"), CreditSection(aggregation="gdpo"), CreditSection(kind="tree")):
        credit = Credit(section, panel)
        plain, same = (credit.advantages(drawn(weights), lambda sums: sums) for weights in (None, [1.0] * 4))
        assert torch.equal(plain, same)
        weighted = credit.advantages(drawn([1.0, 0.5, 0.0, 0.2]), lambda sums: sums)
        factor = torch.tensor([[0.75, 1.0], [0.75, 0.5], [0.0, 0.0], [0.2, 0.2]])
        torch.testing.assert_close(weighted, plain * factor)


def test_a_recipes_noise_floor_holds_advantages_down() -> None:
    panel = Panel({"bright": (Brightness(), 1.0)})
    plain, held = (
        Credit(CreditSection(aggregation="gdpo", noise_floor=floor), panel).advantages(drawn(None), lambda sums: sums)
        for floor in ({}, {"bright": 10 * torch.tensor([1.0, 2.0, 3.0, 6.0]).std(correction=0).item()})
    )
    torch.testing.assert_close(held, plain / 10)
    with pytest.raises(UserError, match=r"credit\.noise_floor\.brigt: no such reward; did you mean bright\?"):
        Credit(CreditSection(noise_floor={"brigt": 1.0}), panel).check()
