"""Noise optimisation on worlds with known answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toy_rewards import Closeness, Flaky
from visalign.backprop import denoise
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.scoring import Panel, Reward, RewardInput, RewardOutput, RewardSpec
from visalign.steering.noise_optimization import Search, Settings, State, clipped, langevin

STEPS = 4
TARGET = torch.tensor([2.0, 1.0])


class Verdict(Closeness):
    """Closeness that tells no gradient."""

    spec = RewardSpec("verdict")

    @torch.no_grad()
    def score(self, batch: RewardInput) -> RewardOutput:
        return super().score(batch)


class Widest(Reward):
    spec = RewardSpec("widest", scope="group", differentiable=True)

    def score(self, batch: RewardInput) -> RewardOutput:
        raise AssertionError("never asked")


def search(reward: Reward | None = None, world: str = "gaussian", **changes: Any) -> Search:
    policy = Policy(Toy(world, steps=STEPS), name=f"toy:{world}")
    plain = {"length": 0.0, "max_grad_norm": None, "lr": 2.0, "momentum": 0.0, "iterations": 25}
    return Search(policy, Panel({"close": (reward or Closeness(), 1.0)}), Settings(**plain | changes), steps=STEPS, seed=3)


def last(states: Iterable[State]) -> State:
    *_, state = states
    return state


def prompts(count: int) -> Prompts:
    return Prompts.of([f"point {n}" for n in range(count)], first_id=7)


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.5, "lr": 1.0, "iterations": 35}, {"method": "adam", "lr": 0.3, "iterations": 80}])
def test_a_quadratic_reward_is_climbed_to_its_top(changes: dict[str, Any]) -> None:
    state = last(search(**changes)(prompts(5)))
    assert torch.allclose(Toy.points(state.best.images), TARGET.expand(5, 2), atol=0.03)
    assert state.best.scores["total"].min() > -1e-3
    assert (state.best.iteration > 0).all()


def test_the_length_pulls_back_as_far_as_the_closed_form_says() -> None:
    """g(ε) = m + sε is linear: the optimum of -½‖g - t‖² - w·K(ε) lies on the line through t, where s(t - m - sε) = w(1 - 1/‖ε‖²)ε."""
    made, weight = search(length=0.3, iterations=80, lr=1.0), 0.3
    states = list(made(prompts(3)))
    final, three = states[-1].now, prompts(3)
    condition = made.policy.family.encode(three.texts)
    ends = denoise(made.policy, torch.eye(3, 2), condition, steps=STEPS).detach()  # of (1, 0), (0, 1) and (0, 0)
    mean, scale = ends[2], (ends[0] - ends[2])[0]
    force = scale * (TARGET - mean - scale * final.noise) - weight * (1 - 1 / final.noise.square().sum(1, keepdim=True)) * final.noise
    assert force.abs().max() < 1e-3
    assert (final.scores["total"] < states[-1].best.scores["total"]).any(), "the best is chosen by the reward alone"


def test_the_first_iteration_is_the_plain_sample_and_one_is_all_it_costs() -> None:
    made = search(iterations=1, world="mixture")
    asked = prompts(4)
    state = last(made(asked))
    assert torch.equal(state.best.images, pictures(made.policy, asked, steps=STEPS, seed=3))
    assert vars(state.spent) == {"nfe": STEPS, "nfe_backward": 0, "reward_calls": 1}


def test_pictures_do_not_depend_on_their_batch_neighbours() -> None:
    for changes in ({}, {"method": "langevin"}, {"gradient": "antithetic"}, {"max_grad_norm": 0.1, "length": 0.01, "whiteness": 1.0}):
        made = search(world="mixture", iterations=6, momentum=0.9, **changes)
        together, asked = last(made(prompts(3))), prompts(3)
        for row in range(3):
            alone = last(made(asked.take(torch.tensor([row]))))
            assert torch.allclose(alone.best.noise[0], together.best.noise[row], atol=1e-5), changes
            assert torch.allclose(alone.now.images[0], together.now.images[row], atol=1e-5)


def test_the_same_seed_gives_the_same_search() -> None:
    one, two = (last(search(method="langevin", iterations=5)(prompts(2))) for _ in range(2))
    assert torch.equal(one.now.noise, two.now.noise)


def test_every_gradient_is_cut_by_itself() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    assert torch.allclose(clipped(rows, 0.1), torch.tensor([[0.06, 0.08], [0.03, 0.04], [0.0, 0.0]]))
    assert clipped(rows, None) is rows


def test_nesterov_by_hand() -> None:
    states = list(search(iterations=3, lr=0.1, momentum=0.9, max_grad_norm=1e-3)(prompts(1)))
    moves = [b.now.noise - a.now.noise for a, b in pairwise(states)]
    norms = [move.norm().item() for move in moves]  # the gradient hardly turns: g·(1 + μ), then g·(1 + μ·(1 + μ))
    assert norms == pytest.approx([1.9e-4, 2.71e-4], rel=1e-2)


def test_langevin_leaves_the_gaussian_alone_and_a_linear_reward_shifts_it() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20000, 2, generator=generator)  # noqa: E731
    for drift in (torch.zeros(2), torch.tensor([1.5, -0.5])):
        x = draw() + drift  # the stationary law
        for _ in range(5):
            x = langevin(x, drift, draw(), 0.4)
        assert torch.allclose(x.mean(0), drift, atol=0.03)
        assert torch.allclose(x.T.cov(), torch.eye(2), atol=0.03)
    x = torch.full((20000, 2), 8.0)
    for _ in range(40):
        x = langevin(x, torch.zeros(2), draw(), 0.4)
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=0.03), "and it gets there from anywhere"


def test_langevin_samples_the_tilted_noise() -> None:
    """With r = -½‖m + sε - t‖² the law N(0, I)·exp(r) is Gaussian: variance 1/(1 + s²), mean s(t - m)/(1 + s²)."""
    made = search(method="langevin", refresh=0.1, iterations=40)
    found = last(made(prompts(600))).now
    points = Toy.points(found.images)
    scale = (points.std(0) / found.noise.std(0)).mean()
    mean = points.mean(0) - scale * found.noise.mean(0)
    assert torch.allclose(found.noise.mean(0), scale * (TARGET - mean) / (1 + scale**2), atol=0.12)
    assert torch.allclose(found.noise.var(0), (1 / (1 + scale**2)).expand(2), rtol=0.15)


def test_a_reward_without_gradient_is_climbed_by_pairs() -> None:
    with pytest.raises(UserError, match=r"rewards\.close: verdict has no gradient"):
        search(Verdict())
    state = last(search(Verdict(), gradient="antithetic", pairs=2, iterations=30, lr=1.0)(prompts(5)))
    assert torch.allclose(Toy.points(state.best.images), TARGET.expand(5, 2), atol=0.1)
    assert state.spent.nfe_backward == 0
    assert state.spent.reward_calls == 30 + 29 * 4
    assert state.spent.nfe == STEPS * state.spent.reward_calls


def test_pairs_follow_the_exact_gradient() -> None:
    exact = search(iterations=2)
    many = search(gradient="antithetic", pairs=60, radius=0.05, iterations=2)
    one, two = (list(made(prompts(3)))[1].now.noise for made in (exact, many))
    start = next(exact(prompts(3))).now.noise
    assert torch.nn.functional.cosine_similarity(one - start, two - start).min() > 0.9


def test_what_cannot_be_climbed_is_refused() -> None:
    with pytest.raises(UserError, match=r"rewards\.close: widest compares pictures"):
        search(Widest())
    policy = Policy(Toy("gaussian"))
    with pytest.raises(UserError, match="none has a weight"):
        Search(policy, Panel({"close": (Closeness(), 0.0)}), Settings(), steps=1)
    mixed = Panel({"close": (Closeness(), 1.0), "seen": (Verdict(), 0.0)})
    state = last(Search(policy, mixed, Settings(iterations=2), steps=1)(prompts(2)))
    assert set(state.best.scores) == {"close", "seen", "total"}, "without a weight a reward is only watched"


def test_a_failed_score_moves_nothing_and_never_is_the_best() -> None:
    states = list(search(Flaky(first=1, last=3, share=0.5), iterations=6)(prompts(4)))
    noises = torch.stack([state.now.noise for state in states])
    assert torch.equal(noises[3, :2], noises[0, :2]), "three times without a score"
    assert (noises[1, 2:] != noises[0, 2:]).all()
    assert states[0].best.scores["total"].isnan().tolist() == [True, True, False, False]
    assert states[-1].best.scores["total"].isfinite().all()
    assert states[-1].best.iteration.min() >= 3


def test_costs_are_counted() -> None:
    state = last(search(iterations=5)(prompts(3)))
    assert vars(state.spent) == {"nfe": 5 * STEPS + 4 * STEPS, "nfe_backward": 4 * STEPS, "reward_calls": 5}  # each step is recomputed
    assert math.isnan(state.figures["gradient"][0])


def test_grad_mode_is_left_as_it_was() -> None:
    with torch.no_grad():
        for state in search(iterations=3)(prompts(2)):
            assert not torch.is_grad_enabled()
            assert isinstance(state.now.noise, Tensor)
            assert not state.now.images.requires_grad
