"""CFG distillation where the guided teacher is another Gaussian: nothing to learn at it, the way to it, and weights in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.guided_toy import GuidedToy
from visalign import build, config, registry
from visalign.errors import UserError
from visalign.policy import interpolated
from visalign.trainers.cfg_distillation import CFGDistillation, Still

STEPS, TEACHER = 6, 2.5


def made(path: Path, **changes: Any) -> CFGDistillation:
    prompts = path / "prompts.txt"
    prompts.write_text("\n".join(f"point {n}" for n in range(8)))
    data: dict[str, Any] = {
        "run.path": str(path / "run"),
        "run.device": "cpu",
        "policy.model": "toy:gaussian",
        "policy.family": "tests.guided_toy:GuidedToy",
        "policy.options": {"steps": STEPS},
        "policy.lora": None,
        "policy.ema": None,
        "policy.steps": STEPS,
        "prompts.train": str(prompts),
        "prompts.test": str(prompts),
        "rewards.diversity": {"use": "diversity", "measure": "tonal", "weight": 0.0},
        "eval.images": 8,
        "trainer.name": "cfg_distillation",
        "trainer.teacher": TEACHER,
        "trainer.prompts": 4,
        "trainer.group_size": 4,
        "trainer.micro_batch": 8,
        "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 1e9,
    }
    (path / "recipe.yaml").write_text("run: {steps: 1}\n")
    trainer = build.trainer(config.load(path / "recipe.yaml", data | {key.replace("__", "."): value for key, value in changes.items()}))
    assert isinstance(trainer, CFGDistillation)
    return trainer


def family(trainer: CFGDistillation) -> GuidedToy:
    assert isinstance(trainer.policy.family, GuidedToy)
    return trainer.policy.family


def test_the_world_is_what_it_says(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    x, sigma, condition = torch.randn(STEPS, 2), family(trainer).toy.grid[:-1], trainer.policy.family.encode([""] * STEPS)
    own = trainer.policy.predict(x, sigma, condition)
    assert_close(trainer.policy.predict(x, sigma, condition, TEACHER), own + family(trainer).taught(TEACHER), atol=1e-5, rtol=1e-5)
    assert_close(own, family(trainer).toy.base(x, sigma))


def test_there_is_nothing_to_learn_where_the_student_is_the_guided_teacher(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    row = trainer.step(1)
    assert row["kl"] > 0.1
    family(trainer).toy.shift.data.copy_(family(trainer).taught(TEACHER))
    drawn = trainer.collect(trainer.draw(1), 1)
    drawn = replace(drawn, advantages=trainer.credit(drawn))
    (batches,) = trainer.minibatches(drawn, 1)
    losses = [trainer.loss(batch) for batch in batches]
    assert all(loss.metrics["kl"] < 1e-10 for loss in losses)
    assert sum(isinstance(batch, Still) for batch in batches) == 2
    gradients = torch.autograd.grad(torch.stack([loss.value for loss in losses]).sum(), family(trainer).toy.shift)
    assert gradients[0].abs().max() < 1e-4


def test_the_distance_is_that_of_velocities_at_every_step_of_the_students_own_chain(tmp_path: Path) -> None:
    trainer = made(tmp_path, trainer__kl=2.0)
    drawn = trainer.collect(trainer.draw(1), 1)
    drawn = replace(drawn, advantages=trainer.credit(drawn))
    (batches,) = trainer.minibatches(drawn, 1)
    steps = torch.cat([batch.step for batch in batches])
    assert steps.bincount().tolist() == [16] * STEPS, "the last step too, which is never stochastic"
    wanted = family(trainer).taught(TEACHER).square().mean(1)
    for batch in batches:
        assert_close(trainer.loss(batch).metrics["kl"], wanted[batch.step].mean(), rtol=1e-4, atol=1e-5)
    still = next(batch for batch in batches if isinstance(batch, Still))
    assert_close(trainer.loss(still).value, 2 * wanted[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(still.x, drawn.trajectory.latents[:8, -1])
    row = trainer.learn(drawn, 1)
    assert row["ratio/mean"] == pytest.approx(1.0), "states without a ratio have no part in its mean"
    assert row["nfe_backward"] == STEPS


def test_the_student_comes_to_draw_as_the_guided_teacher(tmp_path: Path) -> None:
    trainer = made(tmp_path, optimizer__lr=0.1, optimizer__decay_steps=150, optimizer__final_lr=1e-3)
    rows = [trainer.step(step) for step in range(1, 151)]
    taught = family(trainer).taught(TEACHER)
    assert (family(trainer).toy.shift - taught).norm() < 0.02 * taught.norm()
    assert rows[-1]["kl"] < 1e-3 * rows[0]["kl"]
    assert rows[0]["nfe"] == STEPS, "no guidance in the rollout"


def test_diversity_is_paid_by_its_weight_and_by_what_a_picture_adds_to_its_group(tmp_path: Path) -> None:
    trainer = made(tmp_path, rewards={"diversity": {"use": "diversity", "measure": "tonal", "weight": 300.0}})
    family(trainer).toy.shift.data.copy_(family(trainer).taught(TEACHER))
    drawn = trainer.collect(trainer.draw(1), 1)
    drawn = replace(drawn, advantages=trainer.credit(drawn))
    groups = drawn.rewards["diversity"].reshape(4, 4)
    wanted = 300 * (groups - groups.mean(1, keepdim=True)).flatten()
    assert drawn.advantages is not None
    assert_close(drawn.advantages, wanted[:, None].expand(-1, STEPS - 1), rtol=1e-4, atol=1e-5)
    (batches,) = trainer.minibatches(drawn, 1)
    losses = {kind: [trainer.loss(batch).value for batch in batches if isinstance(batch, Still) == kind] for kind in (True, False)}
    shift = family(trainer).toy.shift
    slopes = {kind: torch.autograd.grad(torch.stack(some).sum(), shift)[0].norm() for kind, some in losses.items()}
    assert slopes[True] < 1e-4 < 1e-3 < slopes[False], "at the teacher only diversity pulls, and not at the last step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy__guidance": 2.0}, "policy.guidance=2: the student draws without guidance"),
        ({"policy__family": "toy"}, "toy:gaussian has no unconditional half"),
        ({"trainer__kl_form": "path"}, "trainer.kl_form"),
        ({"trainer__kl": 0.0}, "trainer.kl"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, **changes)


# --- weights in between ------------------------------------------------------------------------------------------------------


def test_interpolated_weights_are_the_ends_at_the_ends_and_the_mean_between(tmp_path: Path) -> None:
    first, second = (registry.load_policy("toy:gaussian") for _ in range(2))
    for number, policy in enumerate((first, second)):
        policy.family.network.shift.data.normal_(generator=torch.Generator().manual_seed(number))
    a, b = (policy.family.network.shift.detach().clone() for policy in (first, second))
    assert torch.equal(interpolated(first, second, 0.0)["shift"], a)
    assert torch.equal(interpolated(first, second, 1.0)["shift"], b)
    assert_close(interpolated(first, second, 0.3)["shift"], 0.7 * a + 0.3 * b)
    with pytest.raises(UserError, match="other networks"):
        interpolated(first, registry.load_policy("toy:gaussian", steps=3), 0.5)


def test_adapters_are_merged_before_they_are_interpolated(tiny_sd3: Path) -> None:
    policies = [registry.load_policy(str(tiny_sd3), max_sequence_length=10) for _ in range(2)]
    base = {name: value.clone() for name, value in policies[0].family.network.state_dict().items()}
    products: list[dict[str, torch.Tensor]] = []
    for number, policy in enumerate(policies):
        torch.manual_seed(number)
        policy.add_lora(2, 4.0)
        for parameter in policy.trainable():
            parameter.data.normal_(std=0.1)
        state = {name: value.clone() for name, value in policy.family.network.state_dict().items() if ".lora_" in name}
        stems = {name.partition(".lora_")[0] for name in state}
        products.append({s: 2 * state[f"{s}.lora_B.default.weight"] @ state[f"{s}.lora_A.default.weight"] for s in stems})
    mixed = interpolated(*policies, 0.25)
    assert mixed.keys() == base.keys()
    for stem in products[0]:
        wanted = base[f"{stem}.weight"] + 0.75 * products[0][stem] + 0.25 * products[1][stem]
        assert_close(mixed[f"{stem}.weight"], wanted, atol=1e-5, rtol=1e-5)
