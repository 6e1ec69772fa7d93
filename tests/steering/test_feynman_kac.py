"""Sequential Monte Carlo draws from p·exp(λ r), and its parts do what their formulas say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.steering.conftest import Run
from tests.toy_rewards import Closeness, Slope
from visalign.findings import Stochastic
from visalign.scoring import Panel
from visalign.steering.feynman_kac import Particles, resample, spread
from visalign.tasks import Task

STEPS, PICTURES, PARTICLES = 12, 200, 48


def law_of_the_chain(task: Task) -> tuple[Tensor, float]:
    """Mean (2,) and variance of what the stochastic sampler draws: every step is linear here, and the last has no noise."""
    mean, variance, options = torch.zeros(2), 1.0, Stochastic()
    for step in range(task.steps):
        x = torch.stack([torch.zeros(2), torch.ones(2)])
        said = task.predict(x, step, torch.zeros(2, dtype=torch.int64))
        last = step + 1 == task.steps
        law = None if last else task.law(x, said, step, options)
        carry, end = task.euler(x, said, step) if law is None else law.mean
        push = (end - carry)[0].item()
        mean, variance = push * mean + carry, push**2 * variance + (0.0 if law is None else law.std[0, 0].item() ** 2)
    return mean, variance


@pytest.mark.parametrize(
    "options",
    [
        {"potential": "difference"},
        {"potential": "max", "ess": 0.5},
        {"potential": "sum", "resampling": "multinomial", "at": [0.4, 0.8]},
        {"potential": "current", "at": [0.5]},
        {"potential": "difference", "at": []},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_samples_follow_the_tilted_gaussian(run: Run, options: dict[str, Any]) -> None:
    strength = 1.0
    sampler = {"steps": STEPS, "batch": PICTURES * PARTICLES}
    task, _ = run("feynman_kac", PICTURES, None, None, sampler, particles=PARTICLES, strength=strength, pick="sample", **options)
    mean, variance = law_of_the_chain(task)
    precision = 1 / variance + strength  # of p(x)·exp(-λ‖x - target‖²/2)
    wanted, std = (mean / variance + strength * Closeness().target) / precision, precision**-0.5
    assert task.best is not None
    x = task.best.latents
    error = std / PICTURES**0.5
    assert (x.mean(0) - wanted).abs().max() < 4 * error
    assert (x.std(0) - std).abs().max() < 4 * error / 2**0.5
    assert (mean - wanted).abs().max() > 5 * error, "the tilt is larger than the error"


def test_a_tilt_along_one_dimension_moves_it_alone(run: Run) -> None:
    sampler = {"steps": STEPS, "batch": PICTURES * PARTICLES}
    along = Panel({"along": (Slope((1.0, 0.0)), 1.0)})
    task, _ = run("feynman_kac", PICTURES, None, along, sampler, particles=PARTICLES, strength=1.0, pick="sample")
    mean, variance = law_of_the_chain(task)
    wanted = mean + variance * torch.tensor([1.0, 0.0])  # p(x)·exp(λ·x₀) of a Gaussian shifts the mean by λ·variance
    assert task.best is not None
    x, error = task.best.latents, (variance / PICTURES) ** 0.5
    assert (x.mean(0) - wanted).abs().max() < 4 * error
    assert (x.std(0) - variance**0.5).abs().max() < 4 * error / 2**0.5
    assert variance > 5 * error, "the tilt is larger than the error"


def test_more_pull_scores_higher(run: Run) -> None:
    means: list[float] = []
    for strength in (0.01, 1.0, 100.0):
        task, _ = run("feynman_kac", 64, particles=16, strength=strength, pick="sample")
        assert task.best is not None
        means.append(task.best.total.mean().item())
    assert means == sorted(means)


def test_the_unit_of_the_strength_may_be_the_scores_spread(run: Run) -> None:
    found: list[Tensor] = []
    for factor in (1.0, 1000.0):
        task, _ = run("feynman_kac", panel=Panel({"close": (Closeness(), factor)}), particles=8, unit="spread", strength=2.0)
        assert task.best is not None
        found.append(task.best.latents)
    assert torch.allclose(found[0], found[1], atol=1e-5)


# --- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "current"])
def test_potentials_multiply_to_the_tilt(potential: Any) -> None:
    rewards = torch.tensor([[[0.3, -1.0]], [[1.2, 0.5]], [[0.7, 2.0]]])
    particles = Particles.fresh(1, 2)
    for r in rewards[:-1]:
        particles = particles.weighed(r, 3.0, "score", potential)
    after_two = {"difference": [1.2, 0.5], "max": [0.3 + 1.2, -1 + 0.5], "sum": [0.3 + 1.5, -1 - 0.5], "current": [1.5, -0.5]}[potential]
    assert particles.log_weights[0].tolist() == pytest.approx([3 * value for value in after_two])
    ended = particles.weighed(rewards[-1], 3.0, "score", "last")
    assert ended.log_weights[0].tolist() == pytest.approx([3 * 0.7, 3 * 2.0])


def test_effective_sample_size_and_when_particles_are_drawn_anew() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    particles = Particles.fresh(3, 4).weighed(rewards, 1.0, "score", "current")
    assert particles.effective.tolist() == pytest.approx([4.0, 36 / 12, 1.0])  # (Σw)²/Σw²
    place, drawn = particles.drawn(torch.full((3, 4), 0.5), 0.5, "systematic")
    assert place.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8]
    assert drawn.log_weights[1].tolist() == pytest.approx([math.log(3.0), 0, 0, 0]), "kept where nothing was drawn"
    assert drawn.log_weights[2].tolist() == [0.0] * 4
    assert drawn.paid[2].tolist() == [50.0] * 4, "what a lineage was paid goes with it"


@pytest.mark.parametrize("how", ["systematic", "multinomial"])
def test_resampling_is_unbiased(how: str) -> None:
    shares = torch.tensor([[0.05, 0.6, 0.25, 0.1]]).expand(20000, -1)
    chance = torch.rand(20000, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(resample(shares, chance, how), 4).double().sum(1)
    assert torch.allclose(counts.mean(0), 4 * shares[0].double(), atol=0.03)
    if how == "systematic":
        assert ((counts - 4 * shares).abs() < 1).all(), "never off by a whole particle"


def test_failures_weigh_nothing_while_others_have_weight() -> None:
    rewards = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]])
    particles = Particles.fresh(2, 2).weighed(rewards, 1.0, "spread", "max")
    assert particles.shares.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert spread(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])).item() == 1.0


def test_what_a_run_costs(run: Run) -> None:
    task, states = run("feynman_kac", particles=3)
    assert task.nfe == 3 * 6, "weighing uses the forward of the step that follows"
    assert task.scored == 4 * 3 * 5
    assert [round(state.figures["ess"], 3) for state in states if "ess" in state.figures][-1] <= 3
