"""Flow-GRPO on worlds with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visalign import build, config
from visalign.families.toy import Toy
from visalign.sampling import Dynamics
from visalign.trainer import Trainer
from visalign.trainers.flow_grpo import FlowGRPO
from visalign.transitions import kernel


def toy(path: Path, **changes: Any) -> Trainer:
    prompts = path / "prompts.txt"
    prompts.write_text("\n".join(f"point {n}" for n in range(8)))
    data: dict[str, Any] = {
        "run.path": str(path / "run"),
        "run.device": "cpu",
        "policy.model": "toy:gaussian",
        "policy.lora": None,
        "policy.ema": None,
        "policy.steps": 8,
        "prompts.train": str(prompts),
        "prompts.test": str(prompts),
        "rewards.close": {"use": "tests.toy_rewards:Closeness"},
        "eval.images": 8,
        "trainer.prompts": 8,
        "trainer.group_size": 64,
        "trainer.micro_batch": 512,
        "trainer.stacked_timesteps": 8,
        "trainer.kl_form": "path",
        "credit.std": "none",
        "credit.clip": 1e9,
        "ratio.clip": 1e9,
        "optimizer.max_grad_norm": 1e9,
        "optimizer.weight_decay": 0.0,
    }
    recipe = config.load(_empty(path), data | {key.replace("__", "."): value for key, value in changes.items()})
    return build.trainer(recipe)


def _empty(path: Path) -> Path:
    file = path / "recipe.yaml"
    file.write_text("run: {steps: 1}\n")
    return file


def test_the_first_step_says_how_far_a_prediction_moves_each_mean(tmp_path: Path) -> None:
    trainer = toy(tmp_path, trainer__group_size=4, trainer__micro_batch=4)
    assert isinstance(trainer, FlowGRPO)
    first, second = trainer.step(1), trainer.step(2)
    assert sorted(key for key in first if key.startswith("gain/")) == [f"gain/{j}" for j in range(7)], "the last step has no gain"
    assert not any(key.startswith("gain/") for key in second)
    path, grid, x = trainer.policy.family.path, trainer.ratio.sigmas, torch.zeros(1, 2)
    for j in range(7):
        step = trainer.dynamics(path, grid[j], grid[j + 1])
        still, moved = (kernel(path, x, x + shift, grid[j], grid[j + 1], step) for shift in (0.0, 1.0))
        assert first[f"gain/{j}"] == pytest.approx(((still.mean - moved.mean) / still.std)[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "level"), [("flow_sde", 0.7), ("dance_sde", 0.6), ("ddim", 0.8)])
def test_grpo_reaches_the_closed_form_optimum_of_the_discrete_chain(tmp_path: Path, kind: str, level: float) -> None:
    beta, target = 0.5, torch.tensor([2.0, 1.0], dtype=torch.float64)
    steps = 250
    trainer = toy(
        tmp_path,
        trainer__kl=beta,
        transition__kind=kind,
        transition__level=level,
        optimizer__lr=0.1,
        optimizer__decay_steps=steps,
        optimizer__final_lr=0.001,
    )
    for step in range(1, steps + 1):
        trainer.step(step)
    family = trainer.policy.family
    assert isinstance(family, Toy)
    # a member of a group of K is part of its own baseline, which scales the reward's gradient by 1 - 1/K
    shift, mean = family.optimum(Dynamics(kind, level), target, beta / (1 - 1 / trainer.settings.group_size))
    learnt = family.toy.shift.detach().double()
    base = family.optimum(Dynamics(kind, level), target, 1e9)[1]
    rows = trainer.collect(trainer.draw(steps + 1), steps + 1).trajectory.final.double()
    assert (mean - base).norm() > 0.3, "the optimum is far enough from the start to be missed"
    assert (rows.mean(0) - mean).norm() / (mean - base).norm() < 0.08  # Monte-Carlo error of 512 points included
    assert (learnt - shift).norm() / shift.norm() < 0.05
