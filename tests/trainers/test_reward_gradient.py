"""Direct reward gradients: the chain rule by hand, each published method's steps and noise, and what must teach nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign import build, config
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.pathwise import Judged
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.trainers.reward_gradient import RewardGradient

STEPS, COUNT, TARGET = 6, 12, torch.tensor([2.0, 1.0])


class Cusp(Reward):
    """The point's first coordinate, with an infinite slope for the first picture."""

    spec = RewardSpec("cusp", differentiable=True)

    def score(self, batch: RewardInput) -> RewardOutput:
        x = Toy.points(batch.images)[:, 0]
        return RewardOutput.of(x + torch.cat([(x[:1] - x[:1].detach()).sqrt(), torch.zeros_like(x[1:])]))


class Blunt(Reward):
    """Without a gradient, which is known only once it is built."""

    def __init__(self) -> None:
        self.spec = RewardSpec("blunt")

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.mean((1, 2, 3)))


def made(path: Path, **changes: Any) -> RewardGradient:
    prompts = path / "prompts.txt"
    prompts.write_text("\n".join(f"point {n}" for n in range(8)))
    data: dict[str, Any] = {
        "run.path": str(path / "run"),
        "run.device": "cpu",
        "policy.model": "toy:gaussian",
        "policy.options": {"steps": STEPS},
        "policy.lora": None,
        "policy.ema": None,
        "policy.steps": STEPS,
        "prompts.train": str(prompts),
        "prompts.test": str(prompts),
        "rewards.close": {"use": "tests.toy_rewards:Closeness"},
        "eval.images": 8,
        "trainer.name": "reward_gradient",
        "trainer.prompts": COUNT,
        "trainer.micro_batch": COUNT // 2,
        "optimizer.max_grad_norm": 1e9,
        "optimizer.weight_decay": 0.0,
    }
    (path / "recipe.yaml").write_text("run: {steps: 1}\n")
    trainer = build.trainer(config.load(path / "recipe.yaml", data | {key.replace("__", "."): value for key, value in changes.items()}))
    assert isinstance(trainer, RewardGradient)
    shift(trainer).data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return trainer


def shift(trainer: RewardGradient) -> torch.nn.Parameter:
    assert isinstance(trainer.policy.family, Toy)
    return trainer.policy.family.toy.shift


def collected(trainer: RewardGradient, step: int = 1) -> Judged:
    drawn = trainer.collect(trainer.draw(step), step)
    return replace(drawn, advantages=trainer.credit(drawn))


def gradient(trainer: RewardGradient, drawn: Judged) -> Tensor:
    """Of the whole step's mean loss, by the shifts (T, 2)."""
    (batches,) = trainer.minibatches(drawn, 1)
    total = sum(len(batch) for batch in batches)
    losses = [trainer.loss(batch).value * len(batch) / total for batch in batches]
    return torch.autograd.grad(torch.stack(losses).sum(), shift(trainer))[0]


def by_hand(trainer: RewardGradient, drawn: Judged, depth: int) -> Tensor:
    """Gradient of the mean of -R, every step written out: x' = x - Δ·v."""
    network, sigmas = trainer.policy.family.network, trainer.sigmas
    x = trainer._noise(drawn.prompts, 0)
    for j in range(STEPS):
        x = x.detach() if j == STEPS - depth else x
        x = x - (sigmas[j] - sigmas[j + 1]) * network(x, sigmas[j].expand(len(x)))
    loss = (0.5 * (x - TARGET).square().sum(1)).mean()
    return torch.autograd.grad(loss, shift(trainer))[0]


# --- DRaFT, AlignProp ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "steps"), [(1, 1), (3, 3), (STEPS, STEPS), (None, STEPS)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_through_the_last_steps_is_that_of_a_chain_written_out(
    tmp_path: Path, depth: int | None, steps: int, checkpointing: bool
) -> None:
    trainer = made(tmp_path, trainer__depth=depth, trainer__checkpointing=checkpointing)
    drawn = collected(trainer)
    found = gradient(trainer, drawn)
    assert_close(found, by_hand(trainer, drawn, steps), rtol=1e-6, atol=1e-6)
    assert not found[: STEPS - steps].any()
    assert found[STEPS - steps :].any(1).all()


def test_the_gradient_of_the_last_step_is_its_length_times_the_rewards_slope(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    drawn = collected(trainer)
    length = trainer.sigmas[-2] - trainer.sigmas[-1]
    slope = -(drawn.trajectory.final - TARGET)  # of -½‖x - target‖²
    assert_close(drawn.slopes, slope[:, None])
    assert_close(gradient(trainer, drawn)[-1], length * slope.mean(0), rtol=1e-5, atol=1e-6)  # of -R: ∂x/∂v = -Δ twice negated


def test_alignprop_draws_a_depth_for_every_micro_batch(tmp_path: Path) -> None:
    trainer = made(tmp_path, trainer__depth=[2, 5])
    seen: set[tuple[int, ...]] = set()
    for step in range(1, 12):
        steps = trainer.collect(trainer.draw(step), step).trajectory.steps[:, 0]
        halves = steps.reshape(2, -1)
        assert (halves == halves[:, :1]).all()
        seen.add(tuple(halves[:, 0].tolist()))
    assert {depth for pair in seen for depth in pair} == {STEPS - depth for depth in (2, 3, 4, 5)}
    assert any(a != b for a, b in seen)
    drawn = collected(trainer)
    parts = [drawn.prompts.take(rows) for rows in torch.arange(COUNT).split(COUNT // 2)]
    depths = [STEPS - int(n) for n in drawn.trajectory.steps[:: COUNT // 2, 0]]
    by_parts = [by_hand(trainer, replace(drawn, prompts=part), depth) for part, depth in zip(parts, depths, strict=True)]
    assert_close(gradient(trainer, drawn), torch.stack(by_parts).mean(0), rtol=1e-5, atol=1e-6)


def test_draft_lv_teaches_the_last_step_with_the_picture_noised_again(tmp_path: Path) -> None:
    trainer = made(tmp_path, trainer__renoise=2)
    drawn = collected(trainer)
    assert drawn.trajectory.steps.tolist() == [[STEPS - 1] * 3] * COUNT
    starts, ends = drawn.trajectory.latents[:, 0::2], drawn.trajectory.latents[:, 1::2]
    sigma = trainer.sigmas[-2]
    again = (starts[:, 1:] - (1 - sigma) * ends[:, :1]) / sigma
    assert again.std().item() == pytest.approx(1.0, abs=0.3)
    assert not torch.equal(again[:, 0], again[:, 1])
    assert drawn.values is not None
    assert_close(drawn.values, -0.5 * (ends - TARGET).square().sum(2))
    assert_close(gradient(trainer, drawn)[-1], -sigma * (ends - TARGET).mean((0, 1)), rtol=1e-5, atol=1e-6)


# --- ReFL, clean pictures ------------------------------------------------------------------------------------------------


def test_refl_judges_the_estimate_at_the_time_of_its_step(tmp_path: Path) -> None:
    trainer = made(tmp_path, trainer__estimate=[3, 5], trainer__objective="margin", trainer__goal=-1.0)
    drawn = collected(trainer)
    steps, x = drawn.trajectory.steps[:, 0], drawn.trajectory.latents[:, 0]
    assert set(steps.tolist()) <= {3, 4}
    sigma = trainer.sigmas[steps]
    estimate = x - sigma[:, None] * trainer.policy.family.network(x, sigma)
    assert_close(drawn.trajectory.final, estimate)
    reward = -0.5 * (estimate - TARGET).square().sum(1)
    wanted = torch.autograd.grad((-1.0 - reward).relu().mean(), shift(trainer))[0]
    assert 0 < (reward > -1.0).float().mean() < 1, "some are good enough, and teach nothing"
    assert_close(gradient(trainer, drawn), wanted, rtol=1e-5, atol=1e-6)


def test_an_editing_start_takes_the_end_of_the_grid_alone(tmp_path: Path) -> None:
    trainer = made(tmp_path, trainer__clean="own", trainer__strength=0.5, trainer__depth=1)
    before = trainer.policy.nfe
    drawn = collected(trainer)
    assert (trainer.policy.nfe - before) / COUNT == STEPS + STEPS / 2
    whole = made(tmp_path, trainer__clean="own", trainer__strength=1.0, trainer__depth=None)
    assert_close(gradient(whole, collected(whole)), by_hand(whole, collected(whole), STEPS), rtol=1e-5, atol=1e-5)  # all noise
    assert drawn.trajectory.steps.unique().tolist() == [STEPS - 1]


def test_pictures_are_encoded_noised_and_recovered_at_once(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    point = torch.tensor([[1.0, -2.0]])
    folder = tmp_path / "pictures"
    folder.mkdir()
    save(trainer.policy.family.decode(point)[0], folder / "one.png")
    trainer = made(tmp_path, trainer__clean=str(folder), trainer__estimate=[0, STEPS])
    drawn = collected(trainer)
    steps = drawn.trajectory.steps[:, 0]
    assert len(steps.unique()) > 2, "a step for every picture"
    sigma = trainer.sigmas[steps][:, None]
    noise = trainer._noise(drawn.prompts, 0)
    assert_close(drawn.trajectory.latents[:, 0], (1 - sigma) * point + sigma * noise, atol=0.05, rtol=0)  # 8 bits of ± 10
    assert drawn.trajectory.nfe == 1


def save(picture: Tensor, file: Path) -> None:
    from PIL import Image

    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(file)


def test_a_second_view_has_the_same_noise_a_step_earlier_and_teaches_too(tmp_path: Path) -> None:
    twins = {"use": "uncertainty", "of": {"use": "tests.toy_rewards:Closeness"}, "source": "two_views", "kappa": 0.5}
    trainer = made(tmp_path, rewards={"twins": twins}, trainer__clean="own", trainer__estimate=[2, 5], trainer__view=1)
    drawn = collected(trainer)
    first, second = drawn.trajectory.steps.unbind(1)
    assert (second == first - 1).all()
    starts, ends = drawn.trajectory.latents[:, 0::2].clone(), drawn.trajectory.latents[:, 1::2]
    sigma = trainer.sigmas[drawn.trajectory.steps]
    clean, noise = solve(starts, sigma)
    assert_close(noise, trainer._noise(drawn.prompts, 0), rtol=1e-3, atol=1e-3)
    network = trainer.policy.family.network
    estimates = torch.stack([starts[:, n] - sigma[:, n, None] * network(starts[:, n], sigma[:, n]) for n in range(2)], 1)
    assert_close(ends, estimates)
    own, other = (-0.5 * (estimates[:, n] - TARGET).square().sum(1) for n in range(2))
    wanted = torch.autograd.grad(-(own - 0.5 * (own - other).abs()).mean() / 2, shift(trainer))[0]  # the mean is over samples and views
    assert_close(gradient(trainer, drawn), wanted, rtol=1e-4, atol=1e-5)
    assert clean.isfinite().all()


def solve(starts: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and noise of two mixtures (N, 2, D) at sigma (N, 2)."""
    a, b = starts.unbind(1)
    s, t = sigma[:, :1], sigma[:, 1:]
    noise = (a / (1 - s) - b / (1 - t)) / (s / (1 - s) - t / (1 - t))
    return (a - s * noise) / (1 - s), noise


# --- objectives, weights, failures ---------------------------------------------------------------------------------------


def test_objectives() -> None:
    rewards = torch.tensor([0.0, 3.0, math.nan])
    for objective, goal in (("reward", None), ("margin", 2.0), ("distance", 1.0)):
        trainer: Any = object.__new__(RewardGradient)
        trainer.settings = RewardGradient.Config(objective=objective, goal=goal)  # type: ignore[arg-type]
        value, pull = trainer.objective(rewards.requires_grad_())
        assert_close(-torch.autograd.grad(value[:2].sum(), rewards)[0][:2], pull[:2])
        assert pull[2].item() in (0.0, 1.0)


def test_what_fails_teaches_nothing_and_is_counted(tmp_path: Path) -> None:
    flaky = {"use": "tests.toy_rewards:Flaky", "share": 0.5}
    trainer = made(tmp_path, rewards={"close": flaky}, trainer__micro_batch=COUNT, trainer__depth=2)
    drawn = collected(trainer)
    assert drawn.slopes is not None
    assert not drawn.slopes[: COUNT // 2].any()
    assert drawn.slopes[COUNT // 2 :].any(2).all()
    assert drawn.metrics["reward/invalid"] == 0.5
    assert drawn.metrics["gradient/none"] == 0.5
    half = replace(drawn, prompts=drawn.prompts.take(slice(COUNT // 2, COUNT)))
    assert_close(gradient(trainer, drawn), by_hand(trainer, half, 2) / 2, rtol=1e-5, atol=1e-6)
    assert trainer.step(2)["reward/invalid"] == 0.5


def test_a_score_whose_gradient_is_not_finite_teaches_nothing(tmp_path: Path) -> None:
    trainer = made(tmp_path, rewards={"cusp": {"use": "tests.trainers.test_reward_gradient:Cusp"}}, trainer__micro_batch=COUNT)
    drawn = collected(trainer)
    assert drawn.slopes is not None
    assert drawn.metrics["reward/invalid"] == 0
    assert drawn.metrics["gradient/none"] == pytest.approx(1 / COUNT)
    assert drawn.slopes.isfinite().all()
    assert not drawn.slopes[0].any()


def test_doubt_takes_credit_away(tmp_path: Path) -> None:
    twins = {"use": "uncertainty", "of": {"use": "tests.toy_rewards:Closeness"}, "source": "two_views", "form": "weight", "tolerance": 0.5}
    trainer = made(tmp_path, rewards={"twins": twins}, trainer__clean="own", trainer__estimate=[2, 5], trainer__view=1)
    drawn = collected(trainer)
    assert drawn.slopes is not None
    ends = drawn.trajectory.latents[:, 1::2]
    own, other = (-0.5 * (ends[:, n] - TARGET).square().sum(1) for n in range(2))
    weight = torch.exp(-((own - other).abs() / 0.5).square())
    assert weight.min() < 0.9
    assert_close(drawn.slopes[:, 0], -weight[:, None] * (ends[:, 0] - TARGET), rtol=1e-4, atol=1e-5)
    assert not drawn.slopes[:, 1].any(), "how much the first counts is no reason to move the second"


# --- the whole --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1},
        {"depth": None},
        {"depth": [1, STEPS]},
        {"renoise": 2},
        {"estimate": [2, STEPS], "objective": "margin", "goal": 0.0},
        {"clean": "own", "strength": 0.5},
        {"clean": "own", "estimate": [1, STEPS], "kl": 0.01},
    ],
    ids=str,
)
def test_the_reward_rises(tmp_path: Path, options: dict[str, Any]) -> None:
    changes = {f"trainer__{key}": value for key, value in options.items()}
    trainer = made(tmp_path, **changes, trainer__prompts=64, trainer__micro_batch=64, optimizer__lr=0.1)
    first = trainer.judge(0)["eval/close"]
    rows = [trainer.step(step) for step in range(1, 41)]
    assert trainer.judge(40)["eval/close"] > first + 0.3
    assert all(row["replay/max_deviation"] == 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    if options == {"depth": None}:
        assert (rows[0]["nfe"], rows[0]["nfe_train"], rows[0]["nfe_backward"]) == (STEPS, 2 * STEPS, STEPS)
        assert rows[0]["loss"] == pytest.approx(-rows[0]["reward/mean"], rel=1e-5)


def test_a_penalty_holds_the_policy_where_it_was(tmp_path: Path) -> None:
    moved: list[float] = []
    for kl in (0.0, 1.0):
        trainer = made(tmp_path, trainer__kl=kl, trainer__estimate=[0, STEPS], optimizer__lr=0.05)
        trainer.policy.keep_reference()
        start = shift(trainer).detach().clone()
        rows = [trainer.step(step) for step in range(1, 21)]
        moved.append((shift(trainer).detach() - start).norm().item())
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0
    assert moved[1] < 0.8 * moved[0]


def test_a_resumed_run_is_the_run_to_the_bit(tmp_path: Path) -> None:
    ends: list[Tensor] = []
    for name, runs in (("once", [4]), ("twice", [2, 4])):
        for steps in runs:
            trainer = made(
                tmp_path, run__path=str(tmp_path / name), run__steps=steps, run__checkpoint_every=2, trainer__depth=[1, 4], policy__ema=0.9
            )
            trainer.fit()
        ends.append(shift(trainer).detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {"mine": {"use": "toybox"}}}, "rewards.mine: toybox has no gradient"),
        ({"rewards": {"mine": {"use": "shaped", "of": {"use": "toybox"}}}}, "rewards.mine.of: toybox has no gradient"),
        ({"rewards": {"mine": {"use": "tests.trainers.test_reward_gradient:Blunt"}}}, "rewards.mine: blunt has no gradient"),
        ({"trainer__depth": STEPS + 1}, f"depth=7: at most {STEPS} steps"),
        ({"trainer__depth": [4, 2]}, "depth"),
        ({"trainer__clean": "own", "trainer__strength": 0.5, "trainer__depth": 4}, "depth=4: at most 3 steps"),
        ({"trainer__estimate": [4, 9]}, "estimate=\\[4, 9\\]"),
        ({"trainer__estimate": [1, 3], "trainer__renoise": 1}, "renoise"),
        ({"trainer__view": 1}, "view: needs clean and estimate"),
        ({"trainer__clean": "own", "trainer__estimate": [1, 3], "trainer__view": 1}, "no reward compares views"),
        (
            {"rewards": {"two": {"use": "uncertainty", "of": {"use": "tests.toy_rewards:Closeness"}, "source": "two_views"}}},
            "a reward compares views",
        ),
        ({"trainer__objective": "margin"}, "goal: objective=margin needs a number"),
        ({"trainer__goal": 1.0}, "goal: objective=reward needs none"),
        ({"trainer__updates": 2}, "updates"),
        ({"trainer__clean": "nowhere"}, "trainer.clean: references 'nowhere'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, **changes)
