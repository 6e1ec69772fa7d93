"""A reward that fails for a while is waited for; one that fails for good ends the run, and nothing is lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.test_flow_grpo import toy
from visalign import checkpoint, tracking
from visalign.errors import UserError
from visalign.trainer import Trainer


def flaky(path: Path, steps: int = 6, patience: int = 2, **reward: Any) -> Trainer:
    """Training on a reward whose first call is the evaluation's, of another object: call n is step n."""
    return toy(
        path,
        run__steps=steps,
        run__checkpoint_every=100,
        eval__every=100,
        trainer__prompts=2,
        trainer__group_size=4,
        trainer__micro_batch=8,
        trainer__patience=patience,
        **{"rewards.close": {"use": "tests.toy_rewards:Flaky"} | reward, "eval.rewards.kept": {"use": "tests.toy_rewards:Closeness"}},
    )


def test_a_step_without_valid_scores_is_skipped_and_said(tmp_path: Path) -> None:
    trainer = flaky(tmp_path, first=2, last=2)
    trainer.step(1)
    before = [p.detach().clone() for p in trainer.parameters]
    row = trainer.step(2)
    assert row["skipped"] == 1
    assert math.isnan(row["loss"])
    assert row["reward/invalid"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert "skipped" not in trainer.step(3)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_enough_valid_scores_are_learned_from(tmp_path: Path) -> None:
    trainer = flaky(tmp_path, share=0.5)
    assert "skipped" not in trainer.step(1)


def test_patience_that_runs_out_keeps_what_was_learned(tmp_path: Path) -> None:
    trainer = flaky(tmp_path, first=4)
    with pytest.raises(UserError) as error:
        trainer.fit()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(
        "rewards.close: 8 of 8 scores failed in step 5, the 2nd in a row with less than trainer.min_valid=0.5 of them valid; "
        "it said: HTTP 503: the judge is asleep; mend it and start again to go on from step 3 ("
    )
    assert [path.name for path in checkpoint.found(tmp_path / "run" / "checkpoints")] == ["step_3"]
    weights = [p.detach().clone() for p in trainer.parameters]
    mended = flaky(tmp_path, first=100)
    mended.load(tmp_path / "run" / "checkpoints" / "step_3")
    assert all(torch.equal(a, b) for a, b in zip(weights, mended.parameters, strict=True))
    mended.fit()
    assert [row["step"] for row in tracking.read(tmp_path / "run")] == list(range(7))


def test_a_run_that_never_learned_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the 1st in a row .* nothing was learned yet$"):
        flaky(tmp_path, patience=1, share=0.75).fit()
    assert not checkpoint.found(tmp_path / "run" / "checkpoints")
