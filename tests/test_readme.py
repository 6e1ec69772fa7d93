"""What the README shows is true: its examples run, its tables are those of the folders."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import visalign
from benchmarks import tables
from visalign import config
from visalign.scoring import RewardInput

TEXT = tables.README.read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def module(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as the file that a user would write."""
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


def test_first_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(visalign, "align", lambda recipe, changes: seen.append(config.load(recipe, changes)), raising=False)
    names: dict[str, Any] = {}
    exec(PYTHON[0], names)
    assert names["result"].images.shape == (4, 3, 64, 64)
    assert names["result"].scores["total"].isfinite().all()
    assert seen[0].run.steps == 20


def test_reward_example_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = module(PYTHON[1], "redness", tmp_path, monkeypatch).Redness()
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    assert reward.score(RewardInput(red, ["red"])).scores.tolist() == [1.0]
    assert isinstance(visalign.load_reward("redness:Redness", device="cpu"), visalign.Reward)


def test_trainer_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.trainers.test_flow_grpo import toy

    module(PYTHON[2], "best_of_group", tmp_path, monkeypatch)
    trainer = toy(tmp_path, trainer__name="best_of_group:BestOfGroup", trainer__group_size=4, trainer__micro_batch=32)
    rollout = trainer.collect(trainer.draw(1), 1)
    assert ((trainer.credit(rollout) != 0).sum(0) == 8).all()  # one picture of each of the eight groups
    trainer.step(1)


def test_tables_are_those_of_the_folders() -> None:
    assert tables.filled(TEXT) == TEXT, "run python -m benchmarks.tables"


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    missing = [target for target in targets if "://" not in target and not (tables.README.parent / target).exists()]
    assert not missing
