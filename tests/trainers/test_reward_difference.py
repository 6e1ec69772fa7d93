"""PRDP on worlds with known answers: its optimum, its exact gradient, what it remembers of the policy before, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.trainers.test_flow_grpo import toy
from visalign import check, tracking
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.losses import reward_difference
from visalign.rollout import Rollout
from visalign.sampling import Dynamics
from visalign.trainers.reward_difference import RewardDifference

BETA = 0.5
NOISE = {"policy__family": "tests.toy_noise:NoisePlane"}
SLOPE = {"rewards": {"slope": {"use": "tests.toy_rewards:Slope"}}, "transition__kind": "ddim", "transition__level": 1.0}


def prdp(path: Path, **changes: Any) -> RewardDifference:
    path.mkdir(exist_ok=True)
    small = {"trainer__prompts": 2, "trainer__group_size": 4, "trainer__micro_batch": 8, "trainer__stacked_timesteps": 1}
    options: dict[str, Any] = {"trainer__name": "reward_difference", "trainer__kl": BETA} | small
    trainer = toy(path, **options | changes)
    assert isinstance(trainer, RewardDifference)
    return trainer


def drawn(trainer: RewardDifference, step: int = 1) -> Rollout:
    rollout = trainer.collect(trainer.draw(step), step)
    return replace(rollout, advantages=trainer.credit(rollout))


def shifted(trainer: RewardDifference, size: float) -> None:
    noise = torch.randn(trainer.parameters[0].shape, generator=torch.Generator().manual_seed(1))
    trainer.parameters[0].data += size * noise


def at_the_optimum(trainer: RewardDifference) -> RewardDifference:
    """Its shifts those that are best for the linear reward, the limit of -½‖x - target‖²/M for target = M·slope and large M."""
    family, dynamics = trainer.policy.family, trainer.dynamics
    assert isinstance(family, Toy)
    far = 1e9
    shift, _ = family.optimum(dynamics, far * torch.tensor([1.0, 0.5], dtype=torch.float64), BETA * far)
    family.toy.shift.data = shift.float()
    return trainer


def gradient(trainer: RewardDifference) -> Tensor:
    found = trainer.parameters[0].grad
    assert found is not None
    trainer.parameters[0].grad = None
    return found


def two_passes(trainer: RewardDifference, rollout: Rollout) -> Tensor:
    (batches,) = trainer.minibatches(rollout, 1)
    total = sum(map(len, batches))
    for batch in batches:
        (trainer.loss(batch).value * (len(batch) / total)).backward()
    return gradient(trainer)


def one_pass(trainer: RewardDifference, rollout: Rollout) -> Tensor:
    """The gradient of the whole loss from one graph over all steps."""
    path = rollout.trajectory
    everything = trainer.transitions(rollout, torch.ones_like(path.steps, dtype=torch.bool), torch.arange(len(path)))
    found = torch.cat([trainer.law(b, trainer.predict(b)).log_prob(b.x_next) for b in everything])
    place = torch.cat([b.row * path.steps.shape[1] + b.column for b in everything]).argsort()
    table = found[place].view_as(path.log_probs)
    reference = trainer.reference_log_probs(rollout, everything)
    credit, weight, answers = trainer.targets(rollout)
    low, high = (side[path.steps] for side in trainer.ratio.bounds)
    groups, bounds = rollout.prompts.groups, {"clip_low": low, "clip_high": high}
    beta = trainer.settings.kl * math.prod(trainer.policy.family.latent_shape)
    old = path.log_probs - reference
    reward_difference(table - reference, old, credit, weight, groups, answers, beta=beta, **bounds).value.backward()
    return gradient(trainer)


# --- the optimum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "level", "family"), [("flow_sde", 0.7, {}), ("ddim", 1.0, {}), ("ddim", 0.8, NOISE)])
def test_prdp_reaches_the_closed_form_optimum_of_the_discrete_chain(
    tmp_path: Path, kind: str, level: float, family: dict[str, Any]
) -> None:
    steps, target = 40, torch.tensor([2.0, 1.0], dtype=torch.float64)
    size = {"trainer__prompts": 8, "trainer__group_size": 32, "trainer__micro_batch": 256, "trainer__stacked_timesteps": 8}
    rate = {"optimizer__lr": 0.05, "optimizer__decay_steps": steps, "optimizer__final_lr": 0.001, "trainer__passes": 4}
    trainer = prdp(tmp_path, transition__kind=kind, transition__level=level, **size, **rate, **family)
    rows = [trainer.step(step) for step in range(1, steps + 1)]
    world = trainer.policy.family
    assert isinstance(world, Toy)
    shift, _ = world.optimum(Dynamics(kind, level), target, BETA)  # pairs leave no member in its own baseline: no factor 1 - 1/K
    learnt = world.toy.shift.detach().double()
    assert shift.norm() > 1
    assert (learnt - shift).norm() / shift.norm() < 0.05
    assert rows[-1]["explained"] > 0.7
    assert max(row["ratio/max_deviation"] for row in rows) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"transition__level": 1.0},  # memoryless: at σ = 1 DDIM's c is 0, and the mean a constant
        {"transition__level": 0.8, "exploration__shared_noise": True},
        {"transition__kind": "flow_sde", "transition__level": 0.7, "exploration__shared_noise": True},
        {"credit__kind": "gain", "credit__completion": 1},
        {"credit__kind": "residual", "credit__completion": 1},
        {"exploration__kind": "tree", "exploration__branches": [0, 3]},
        NOISE | {"exploration__shared_noise": True},
    ],
)
def test_the_loss_is_zero_at_the_optimum_where_the_initial_noise_is_forgotten_or_shared(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = prdp(tmp_path, **SLOPE | changes)
    start = drawn(trainer)
    next(trainer.minibatches(start, 1))
    before = trainer.whole.value.item()
    rollout = drawn(at_the_optimum(trainer))
    next(trainer.minibatches(rollout, 1))
    assert before > 1e-3
    assert trainer.whole.value.item() < 1e-10 * before
    assert trainer.whole.metrics["explained"] > 1 - 1e-6


def test_elsewhere_the_initial_noise_stays_unexplained(tmp_path: Path) -> None:
    errors: list[float] = []
    for kind, level in (("flow_sde", 0.7), ("flow_sde", math.sqrt(2)), ("dance_sde", 0.3)):
        trainer = at_the_optimum(prdp(tmp_path / kind, **SLOPE | {"transition__kind": kind, "transition__level": level}))
        next(trainer.minibatches(drawn(trainer), 1))
        errors.append(1 - trainer.whole.metrics["explained"].item())
    assert errors[0] > 0.03
    assert errors[1] < 1e-4, "memoryless for many steps; with eight all but it"
    assert errors[2] > 0.5


def test_offline_pictures_lead_to_the_same_optimum_where_the_error_can_be_zero(tmp_path: Path) -> None:
    steps = 60
    rate = {"optimizer__lr": 0.2, "optimizer__decay_steps": steps, "optimizer__final_lr": 0.001}
    trainer = prdp(tmp_path, **SLOPE, **rate, trainer__offline=steps, trainer__group_size=16, trainer__micro_batch=32)
    rows = [trainer.step(step) for step in range(1, steps + 1)]
    learnt = trainer.parameters[0].detach().clone()
    best = at_the_optimum(trainer).parameters[0]
    assert (learnt - best).norm() / best.norm() < 0.05
    assert rows[-1]["explained"] > 0.99
    assert len({row["reward/mean"] for row in rows}) == 1, "one rollout serves all"
    assert [row["nfe"] for row in rows[:3]] == [8.0, 0.0, 0.0]
    assert [row["nfe_train"] for row in rows[:3]] == [14.0, 14.0, 14.0], "π_old and the replay; the reference is the rollout"


# --- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio__clip": 0.02},
        {"trainer__stacked_timesteps": 3, "trainer__micro_batch": 4},
        {"credit__kind": "gain"},
        {"credit__kind": "residual", "ratio__clip": 0.02},
        {"exploration__kind": "tree", "exploration__branches": [0, 3], "trainer__micro_batch": 4},
        {"exploration__kind": "window", "exploration__size": 3, "exploration__shared_noise": True},
        {"rewards": {"close": {"use": "tests.toy_rewards:Flaky", "share": 0.3}}, "credit__keep": [1, 2]},
        NOISE | {"transition__kind": "ddim", "ratio__clip": 0.02},
    ],
)
def test_two_passes_give_the_gradient_of_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = prdp(tmp_path, **changes)
    rollout = drawn(trainer)
    shifted(trainer, 0.1)
    expected = one_pass(trainer, rollout)
    assert expected.norm() > 1e-3
    assert (two_passes(trainer, rollout) - expected).norm() / expected.norm() < 1e-6


def test_the_first_gradient_is_that_of_group_advantages(tmp_path: Path) -> None:
    trainer = prdp(tmp_path / "a")
    rollout = drawn(trainer)
    other = toy(tmp_path / "a", trainer__prompts=2, trainer__group_size=4, trainer__micro_batch=8)
    for batches in other.minibatches(rollout, 1):
        for batch in batches:
            (other.loss(batch).value / len(batches)).backward()
    found = other.parameters[0].grad
    assert found is not None
    assert torch.allclose(two_passes(trainer, rollout), found * 4 / 3, rtol=1e-5), "the mean of the others instead of the group's"


class Live:
    """Bytes that graphs keep for their backward passes, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(tensor, self)

    def measure(self, run: Callable[[], object]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor):
            run()
        return self.most


class Kept:
    def __init__(self, tensor: Tensor, live: Live):
        self.tensor, self.live, self.bytes = tensor.detach(), live, tensor.numel() * tensor.element_size()
        live.now += self.bytes
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self.live.now -= self.bytes


def test_memory_does_not_grow_with_the_number_of_steps(tmp_path: Path, tiny_sd3: Path) -> None:
    sd3 = {"policy__model": str(tiny_sd3), "policy__options": {"max_sequence_length": 10}, "policy__train": ["context_embedder"]}
    bright = {"rewards": {"bright": {"use": "tests.toy_rewards:Brightness"}}}
    kept: dict[str, list[int]] = {"two": [], "one": []}
    for steps in (4, 8, 16):
        size = {"policy__steps": steps, "trainer__prompts": 1, "trainer__group_size": 2, "trainer__micro_batch": 2}
        trainer = prdp(tmp_path / str(steps), **sd3, **bright, **size)
        rollout = drawn(trainer)
        kept["two"].append(Live().measure(lambda t=trainer, r=rollout: t.learn(r, 1)))
        kept["one"].append(Live().measure(lambda t=trainer, r=rollout: one_pass(t, r)))
    assert max(kept["two"]) < 1.01 * min(kept["two"])  # the numbers of the table (N, S) are all that grows
    for steps, bytes_kept in zip((4, 8, 16), kept["one"], strict=True):
        assert bytes_kept == pytest.approx((steps - 1) * kept["two"][0], rel=0.1)


# --- the policy before -------------------------------------------------------------------------------------------------


def test_every_pass_holds_on_to_the_policy_that_drew_the_pictures(tmp_path: Path) -> None:
    free, held = (prdp(tmp_path / str(clip), trainer__passes=8, ratio__clip=clip, optimizer__lr=0.05) for clip in (1e9, 1e-3))
    rows = [trainer.step(1) for trainer in (free, held)]
    assert rows[0]["kl/approximate"] > rows[1]["kl/approximate"] > 0
    assert (rows[0]["clip/pairs"], rows[0]["clip/high"]) == (0, 0)
    assert rows[1]["clip/pairs"] > 0
    assert [row["ratio/max_deviation"] for row in rows] == [0, 0]
    assert [row["nfe_train"] for row in rows] == [7 * (1 + 8 + 7)] * 2, "the reference once, 8 replays, 7 first passes"
    assert [row["nfe_backward"] for row in rows] == [7 * 8] * 2


def test_updates_share_a_rollout_by_prompts(tmp_path: Path) -> None:
    trainer = prdp(tmp_path, trainer__updates=2, trainer__passes=2, trainer__micro_batch=4)
    rollout, rows = drawn(trainer), []
    for batches in trainer.minibatches(rollout, 1):
        rows.append(sorted({int(r) for b in batches for r in b.row}))
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    with pytest.raises(UserError, match=r"trainer.updates=2 must divide the 1 prompts"):
        prdp(tmp_path, trainer__updates=2, trainer__prompts=1, trainer__micro_batch=2)


@pytest.mark.parametrize("changes", [{"trainer__passes": 2}, {"trainer__offline": 4, "trainer__passes": 2}])
def test_six_steps_are_three_and_three_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    common = changes | {"policy__ema": 0.9, "eval__every": 3, "run__checkpoint_every": 3, "optimizer__lr": 0.05, "ratio__clip": 1e-2}
    for name, pieces in (("once", [6]), ("twice", [3, 6])):
        for steps in pieces:
            prdp(tmp_path / name, **common, run__steps=steps).fit()
    once, twice = (
        [{k: v for k, v in row.items() if k not in ("seconds", "nfe", "reward_calls")} for row in tracking.read(tmp_path / name / "run")]
        for name in ("once", "twice")
    )  # offline, the run that resumes pays for the reference's pictures again
    assert once == twice
    weights = [load_file(tmp_path / name / "run/checkpoints/step_6/trainable.safetensors") for name in ("once", "twice")]
    assert torch.equal(weights[0]["shift"], weights[1]["shift"])
    assert weights[0]["shift"].norm() > 0.01


@pytest.mark.parametrize("changes", [{"trainer__passes": 2}, {"trainer__offline": 2}])
def test_the_preflight_passes(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = prdp(tmp_path, **changes).config
    findings = {finding.name: finding for finding in check.run(recipe)}
    assert all(finding.passed for finding in findings.values()), [str(finding) for finding in findings.values()]
    assert "kl" in findings["gradients"].figure


# --- members and refusals ----------------------------------------------------------------------------------------------


def test_a_reward_that_learns_needs_fresh_pictures(tmp_path: Path, dino: str) -> None:
    critic = {"critic": {"use": "adversarial", "checkpoint": dino, "references": "toybox", "count": 2}}
    with pytest.raises(UserError, match=r"trainer.offline=3: rewards.critic learns"):
        prdp(tmp_path, rewards=critic, trainer__offline=3)


def test_weights_make_pairs_count_less_and_rewards_no_smaller(tmp_path: Path) -> None:
    trainer = prdp(tmp_path)
    rollout = replace(drawn(trainer), weights=torch.tensor([1.0, 0.5, 0.0, 1.0] * 2))
    credit, weight, _ = trainer.targets(replace(rollout, advantages=trainer.credit(rollout)))
    assert torch.equal(credit, trainer.targets(rollout)[0])
    assert weight.flatten().tolist() == [1.0, 0.5, 0.0, 1.0] * 2


def test_members_without_a_score_are_in_no_pair(tmp_path: Path) -> None:
    trainer = prdp(tmp_path)
    rollout = drawn(trainer)
    shifted(trainer, 0.1)
    rewards = {name: torch.where(torch.arange(8) == 2, math.nan, values) for name, values in rollout.rewards.items()}
    less = replace(rollout, rewards=rewards)
    less = replace(less, advantages=trainer.credit(less))
    rows = torch.arange(8) != 2
    table = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    slope = trainer.regress(less, table, torch.zeros(8, 7), torch.arange(8))
    assert (slope[2] == 0).all()
    assert (slope[rows] != 0).all()
    changed = torch.where(rows[:, None], table, 9.0)
    assert torch.equal(trainer.regress(less, changed, torch.zeros(8, 7), torch.arange(8)), slope)
    alone = replace(less, rewards=rewards | {"total": torch.where(torch.arange(8) == 5, rewards["total"], math.nan)})
    assert (trainer.regress(alone, table, torch.zeros(8, 7), torch.arange(8)) == 0).all(), "one valid member makes no pair"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"trainer__kl": 0.0}, "trainer.kl"),
        ({"trainer__kl_form": "velocity"}, "trainer.kl_form=velocity.*use path"),
        ({"credit__kind": "value", "rewards": {"bright": {"use": "tests.toy_rewards:Brightness"}}}, "credit.kind=value.*use terminal"),
        ({"ratio__kind": "guard"}, "ratio.kind=guard"),
        ({"ratio__weight": "equal_gain"}, "ratio.weight=equal_gain"),
        ({"exploration__kind": "tree", "exploration__prune__width": "extremes"}, "exploration.prune.width=extremes"),
    ],
)
def test_what_has_no_density_of_whole_paths_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        prdp(tmp_path, **changes)
