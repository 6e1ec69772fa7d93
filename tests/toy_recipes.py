"""Trainers on the forward process in the toy worlds, built as a recipe would build them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from visalign import build, config
from visalign.forward_process import ForwardTrainer
from visalign.rollout import Rollout


def forward(path: Path, name: str, **changes: Any) -> ForwardTrainer:
    """A trainer of 8 groups of 8 points, whose reward is how close they are to (2, 1)."""
    path.mkdir(exist_ok=True)
    prompts, file = path / "prompts.txt", path / "recipe.yaml"
    prompts.write_text("\n".join(f"point {n}" for n in range(8)))
    file.write_text("run: {steps: 1}\n")
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
        "eval.images": 256,
        "trainer.name": name,
        "trainer.prompts": 8,
        "trainer.group_size": 8,
        "trainer.micro_batch": 64,
        "optimizer.max_grad_norm": 1e9,
        "optimizer.weight_decay": 0.0,
    }
    built = build.trainer(config.load(file, data | {key.replace("__", "."): value for key, value in changes.items()}))
    assert isinstance(built, ForwardTrainer)
    return built


def credited(trainer: ForwardTrainer, step: int = 1) -> Rollout:
    """The pictures of a step with their credit."""
    drawn = trainer.collect(trainer.draw(step), step)
    return replace(drawn, advantages=trainer.credit(drawn))


def closeness(trainer: ForwardTrainer) -> float:
    """Mean reward of what the current weights draw, from noise that no training step sees."""
    return trainer.examine(0, False)["eval/close"]
