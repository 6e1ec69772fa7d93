"""Rewards that are measured against the untrained model see its pictures before the first step, and a resumed run measures alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.trainers.test_flow_grpo import toy
from visalign import base_pictures, tracking
from visalign.rewards.shaped import Shaped
from visalign.trainer import Trainer

SHAPED = {"use": "shaped", "of": {"use": "tests.toy_rewards:Closeness"}, "pictures": 12}


def shaped(path: Path, steps: int = 2, **changes: Any) -> Trainer:
    sizes = {"trainer__prompts": 2, "trainer__group_size": 4, "trainer__micro_batch": 8}
    return toy(path, **sizes, run__steps=steps, run__checkpoint_every=1, **({"rewards.close": SHAPED} | changes))


def learned(trainer: Trainer, judge: bool = False) -> dict[str, torch.Tensor]:
    panel = trainer.session.judges if judge else trainer.session.rewards
    reward = panel.rewards["close"]
    assert isinstance(reward, Shaped)
    return reward.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_references_are_the_untrained_models_and_stay(tmp_path: Path) -> None:
    trainer = shaped(tmp_path)
    first = learned(trainer)
    assert first["scores"].shape == (12,)
    assert len(first["keys"].unique()) == 8, "all prompts, and some twice"
    assert equal(first, learned(trainer, judge=True))
    kept = load_file(tmp_path / "run" / base_pictures.FILE)
    assert torch.equal(kept["rewards/close/scores"], first["scores"])
    trainer.fit()
    assert equal(first, learned(trainer))
    assert all(0 < row["reward/close"] < 1 for row in tracking.read(tmp_path / "run") if "reward/close" in row)
    resumed = shaped(tmp_path, steps=3)
    assert equal(first, learned(resumed))
    resumed.fit()
    assert equal(first, learned(resumed)), "the checkpoint's"


def test_another_recipe_is_measured_anew(tmp_path: Path) -> None:
    first = learned(shaped(tmp_path))
    file = tmp_path / "run" / base_pictures.FILE
    stamp = file.stat().st_mtime_ns
    assert equal(first, learned(shaped(tmp_path)))
    assert file.stat().st_mtime_ns == stamp, "read, not drawn again"
    assert not equal(first, learned(shaped(tmp_path, run__seed=5)))
    file.write_bytes(file.read_bytes()[:100])
    assert equal(first, learned(shaped(tmp_path)))


def test_rewards_that_need_none_cost_nothing(tmp_path: Path) -> None:
    trainer = shaped(tmp_path, **{"rewards.close": {"use": "tests.toy_rewards:Closeness"}})
    assert trainer.policy.nfe == 0
    assert not (tmp_path / "run" / base_pictures.FILE).exists()
