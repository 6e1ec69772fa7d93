"""Every named algorithm of the Flow-GRPO family takes a real step on the toybox, with a ratio of 1 and the forwards that its plan costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from visalign import build, config

CASES = {  # name -> (what differs, denoiser forwards a picture, of them in the rollout)
    "flow_grpo_fast": ([], 6.0),
    "mix_grpo": (["exploration.finish=0.4"], 4 + 1 / 8),
    "dance_grpo": ([], 5 + 1 / 8),
    "branch_grpo": (["exploration.branches=[0,1,2]"], (1 + 2 + 4 + 8 * 3) / 8),
    "dense_grpo": (["trainer.rounds=1"], 5 + 1 / 8),
    "vgpo": ([], 6.0),
    "grpo_guard": ([], 6.0),
    "reward_difference": ([], 6.0),
    "tempflow_grpo": (["trainer.group_size=8", "exploration.seeds=2", "exploration.range=[0,2]"], 5.0),
}
SMALL = """
policy: {model: toybox, lora: null, steps: 6, options: {max_sequence_length: 10}}
rewards: {toybox: 1.0}
eval: {rewards: {toybox: 1.0}, images: 6, grid: 2}
trainer: {prompts: 1, group_size: 8, micro_batch: 8}
run: {steps: 1, device: cpu}
"""


@pytest.mark.parametrize("name", CASES)
def test_a_step(name: str, tmp_path: Path) -> None:
    changes, forwards = CASES[name]
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    recipe = config.load(tmp_path / "small.yaml", [f"trainer.name={name}", f"run.path={tmp_path / 'run'}", *changes])
    trainer = build.trainer(recipe)
    if name == "dense_grpo":
        trainer.calibrate()  # pyright: ignore[reportAttributeAccessIssue]
        assert (tmp_path / "run" / "calibration.json").is_file()
    row = trainer.step(1)
    assert row["nfe"] == pytest.approx(forwards)
    completions = 4 + 3 + 2 + 1 + 5 / 8 if name == "dense_grpo" else 0  # the first step is the rollout's, the shared noise's own is shared
    assert row["nfe_credit"] == pytest.approx(completions)
    assert row["ratio/max_deviation"] < 1e-6
    assert 0 < row["grad_norm"] < 100
    assert any(key.startswith("credit/size/") for key in row)


NO_POLICY = ("toybox_reward_model", "toybox_noise_optimization")


@pytest.mark.parametrize("name", [name for name in config.packaged() if name.startswith("toybox") and name not in NO_POLICY])
def test_every_recipe_of_the_toybox_takes_a_step(name: str, tmp_path: Path) -> None:
    judge = "{use: segmental, of: {use: toybox}}" if name == "toybox_wan" else "1.0"
    small = ["eval.images=4", f"eval.rewards={{toybox: {judge}}}", "trainer.prompts=1", "trainer.micro_batch=8", "run.device=cpu"]
    trainer = build.trainer(config.load(name, [f"run.path={tmp_path}", *small]))
    row = trainer.step(1)
    assert row.get(trainer.deviation, 0.0) < 1e-6
    assert row["nfe_train"] > 0
