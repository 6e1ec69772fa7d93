"""Sharded weights: the curve and the checkpoint of one process, exact resume, and files by every process that one can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_trainer import recipe, rows
from visalign import build, checkpoint
from visalign.distributed import Processes, placed
from visalign.errors import UserError

ROOT = Path(__file__).parents[1]
KEYS = ("reward/mean", "loss", "grad_norm", "eval/toybox")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |Δ| over max |value|."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


def test_sharded_weights_give_the_curve_and_the_checkpoint_of_one_process(tiny_sd3: Path, tmp_path: Path) -> None:
    changes = {"run__steps": 4, "run__checkpoint_every": 2, "eval__every": 2, "policy__train": ["proj_out", "attn.to_q"]}
    changes |= {"rewards": {"bright": {"use": "tests.toy_rewards:Brightness"}}, "optimizer__lr": 3e-4}
    one = recipe(tmp_path / "one", tiny_sd3, **changes)
    alone = build.trainer(one)
    alone.fit()
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(one.model_dump(mode="json")))
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(Path(__file__).with_name("sharded_run.py")),
    ]
    shared = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    environment = os.environ | shared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *launch, str(file)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert rows(tmp_path / "once") == rows(tmp_path / "twice"), "two steps and two are four, to the bit"
    curves = zip(rows(tmp_path / "one"), rows(tmp_path / "once"), strict=True)
    worst = max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-7) for a, b in curves for key in KEYS if key in a)
    assert worst < 1e-3
    folders = [tmp_path / name / "checkpoints" / "step_4" for name in ("one", "once", "twice")]
    assert {path.name for path in folders[1].glob("trainable*")} == {f"trainable-0000{n}-of-00002.safetensors" for n in (1, 2)}
    stems = ["trainable", "average"]
    ours, theirs, resumed = (checkpoint.load(folder, stems) for folder in folders)
    for stem in stems:
        assert ours[0][stem].keys() == theirs[0][stem].keys()
        assert all(torch.equal(theirs[0][stem][name], resumed[0][stem][name]) for name in theirs[0][stem])
        assert max(relative(theirs[0][stem][name], value) for name, value in ours[0][stem].items() if value.abs().max() > 1e-4) < 1e-3
    moments = [state[1]["state"] for state in (ours, theirs, resumed)]
    assert all(torch.equal(moments[1][n][key], moments[2][n][key]) for n in moments[1] for key in moments[1][n])
    assert {n: v["exp_avg"].shape for n, v in moments[0].items()} == {n: v["exp_avg"].shape for n, v in moments[1].items()}
    assert alone.load(folders[1]) == 4, "one process goes on from what two have written"


def test_a_missing_share_is_said(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").touch()
    (tmp_path / "trainable-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match="1 of 2 files of trainable"):
        checkpoint.load(tmp_path, ["trainable"])


def test_the_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="expected fsdp_version: 2"):
        Processes("cpu")


def test_deepspeeds_own_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="use configs/accelerate/zero2"):
        Processes("cpu")


def test_whole_values_stay_whole_where_nothing_is_sharded() -> None:
    value = torch.ones(2)
    assert placed(value, torch.nn.Parameter(torch.zeros(2))) is value


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_packaged_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found: Any = load_config_from_file(str(path))
    assert found.num_processes % 8 == 0
    assert found.mixed_precision == "no", "policy.precision casts, in rollout and replay alike"
    if found.distributed_type.name == "FSDP":
        assert found.fsdp_config["fsdp_version"] == 2
    assert path.read_text(encoding="utf-8").startswith("# ")
