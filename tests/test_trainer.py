"""The loop that all algorithms share: exact resume, several processes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visalign import build, cli, config, tracking
from visalign.errors import UserError
from visalign.trainer import NonFiniteError, Trainer

TIMES = ("seconds",)


def recipe(path: Path, model: Path, **changes: Any) -> config.Config:
    data = {
        "run": {"steps": 6, "path": str(path), "device": "cpu", "checkpoint_every": 3, "seed": 4},
        "policy": {"model": str(model), "steps": 4, "ema": 0.9, "lora": None, "options": {"max_sequence_length": 10}},
        "prompts": {"balance": "tag"},
        "rewards": {"toybox": 1.0, "jpeg": 0.01},
        "eval": {"rewards": {"toybox": 1.0}, "images": 4, "every": 3, "grid": 4},
        "trainer": {"prompts": 2, "group_size": 2, "micro_batch": 2},
        "exploration": {"kind": "window", "size": 2, "range": [0, 3], "shared_noise": True},
        "optimizer": {"lr": 3e-3, "decay_steps": 6, "final_lr": 1e-4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data[section][name] = value
        else:
            data[section] = value
    return config.parse(data)


def rows(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in tracking.read(folder)]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_six_steps_are_three_and_three_to_the_bit(tiny_sd3: Path, tmp_path: Path, lora: dict[str, float] | None) -> None:
    build.trainer(recipe(tmp_path / "once", tiny_sd3, policy__lora=lora)).fit()
    build.trainer(recipe(tmp_path / "twice", tiny_sd3, policy__lora=lora, run__steps=3)).fit()
    build.trainer(recipe(tmp_path / "twice", tiny_sd3, policy__lora=lora)).fit()
    assert rows(tmp_path / "once") == rows(tmp_path / "twice")
    assert [row["step"] for row in rows(tmp_path / "once")] == list(range(7))
    once, twice = (tmp_path / name / "checkpoints" / "step_6" for name in ("once", "twice"))
    for stem in ("trainable", "average"):
        a, b = load_file(once / f"{stem}.safetensors"), load_file(twice / f"{stem}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (once, twice))
    assert all(torch.equal(a[n][name], b[n][name]) for n in a for name in a[n])


def test_training_changes_the_weights_and_the_ratio_is_exactly_one(tiny_sd3: Path, tmp_path: Path) -> None:
    trainer = build.trainer(recipe(tmp_path, tiny_sd3))
    before = [p.detach().clone() for p in trainer.parameters]
    row = trainer.step(1)
    assert row["ratio/max_deviation"] == 0
    # the steps before the window, and its first forward, are shared by a group of two
    assert row["nfe"] == pytest.approx(4 - (trainer_prefix(trainer) + 1) / 2)
    assert (row["nfe_credit"], row["nfe_train"], row["nfe_backward"]) == (0, 1.5, 1.5)  # so is the first state of the replay
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_a_reward_that_learns_goes_on_to_the_bit(tiny_sd3: Path, tmp_path: Path, dino: str) -> None:
    learner = {"use": "adversarial", "checkpoint": dino, "references": "toybox", "count": 2, "max_accuracy": None, "replay": 8}
    changes = {"rewards": {"adversarial": learner}, "eval__rewards": {"toybox": 1.0, "critic": learner}, "run__checkpoint_every": 2}
    build.trainer(recipe(tmp_path / "once", tiny_sd3, **changes, run__steps=4)).fit()
    build.trainer(recipe(tmp_path / "twice", tiny_sd3, **changes, run__steps=2)).fit()
    build.trainer(recipe(tmp_path / "twice", tiny_sd3, **changes, run__steps=4)).fit()
    assert rows(tmp_path / "once")[:2] == rows(tmp_path / "twice")[:2]
    assert rows(tmp_path / "once")[3:] == rows(tmp_path / "twice")[3:]  # step 2 was the shorter run's last, and judged there
    assert [row["reward_update/adversarial/version"] for row in rows(tmp_path / "once")[1:]] == [1, 2, 3, 4]
    once, twice = (load_file(tmp_path / name / "checkpoints" / "step_4" / "rewards.safetensors") for name in ("once", "twice"))
    assert once["adversarial/counts"].tolist() == [4, 4]
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    assert rows(tmp_path / "once")[0]["eval/critic"] != rows(tmp_path / "once")[-1]["eval/critic"]
    cli.main(["evaluate", str(tmp_path / "once"), "--out", str(tmp_path / "figures.json")])
    again = json.loads((tmp_path / "figures.json").read_text())
    assert again["eval/critic"] == pytest.approx(rows(tmp_path / "once")[-1]["eval/critic"], rel=1e-4)


def test_a_judge_that_learns_must_be_a_training_reward(tiny_sd3: Path, tmp_path: Path, dino: str) -> None:
    critic = {"critic": {"use": "adversarial", "checkpoint": dino, "references": "toybox"}}
    with pytest.raises(UserError, match="has learned nothing and judges nothing"):
        build.trainer(recipe(tmp_path, tiny_sd3, eval__rewards=critic))


def trainer_prefix(trainer: Trainer) -> int:
    return trainer.plan(1).recorded[0]  # pyright: ignore[reportAttributeAccessIssue]


def test_stacked_timesteps_give_the_same_gradient(tiny_sd3: Path, tmp_path: Path) -> None:
    weights = []
    for stack in (1, 2):
        trainer = build.trainer(recipe(tmp_path / str(stack), tiny_sd3, trainer__stacked_timesteps=stack, optimizer__lr=1e-5))
        trainer.step(1)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.parameters]))
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build.trainer(recipe(tmp_path, tiny_sd3))
    before = [p.detach().clone() for p in trainer.parameters]
    honest = trainer.credit
    monkeypatch.setattr(trainer, "credit", lambda rollout: honest(rollout) * float("nan"))
    with pytest.raises(NonFiniteError, match="loss is nan"):
        trainer.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_a_kl_penalty_holds_the_weights_back(tiny_sd3: Path, tmp_path: Path) -> None:
    trainer = build.trainer(recipe(tmp_path, tiny_sd3, trainer={"prompts": 2, "group_size": 2, "micro_batch": 2, "kl": 1.0}))
    first, second = trainer.step(1), trainer.step(2)
    assert first["kl"] == 0  # nothing has moved yet
    assert second["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"trainer": {"prompts": 2, "group_size": 1}}, "group_size=1"),
        ({"trainer": {"prompts": 3, "group_size": 2, "micro_batch": 4}}, "micro_batch=4"),
        ({"exploration": {"kind": "window", "size": 5}}, "exploration"),
        ({"trainer": {"clip_rang": 1}}, "trainer.clip_rang is unknown"),
        ({"eval": {"rewards": {"toybox": {"use": "toybox", "formm": "dense"}}}}, "formm"),
        ({"rewards": {"judge": {"use": "visalign.toybox.judge:SecondJudge"}}}, "held out|judges only"),
    ],
)
def test_geometry_and_options_are_refused_before_anything_is_drawn(
    tiny_sd3: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        build.trainer(recipe(tmp_path, tiny_sd3, **changes))


def test_two_processes_give_the_curve_of_one(tiny_sd3: Path, tmp_path: Path, dino: str) -> None:
    learner = {"use": "adversarial", "weight": 0.01, "checkpoint": dino, "references": "toybox", "max_accuracy": None}
    smooth = {"bright": {"use": "tests.toy_rewards:Brightness"}, "critic": learner}
    one = recipe(tmp_path / "one", tiny_sd3, run__steps=3, policy__lora={"rank": 4, "alpha": 8}, rewards=smooth, optimizer__lr=3e-4)
    build.trainer(one).fit()
    two = one.model_copy(update={"run": one.run.model_copy(update={"path": tmp_path / "two"})})
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(two.model_dump(mode="json")))
    script = Path(__file__).parents[1] / "visalign" / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), str(file)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    alone, together = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in together] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "two" / "checkpoints" / "step_3" / "state.json").read_text())["processes"] == 2
    for key in ("reward/mean", "loss", "grad_norm", "eval/toybox", "reward_update/critic/d_loss", "reward_update/critic/version"):
        for a, b in zip(alone, together, strict=True):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-3, abs=1e-7), key
