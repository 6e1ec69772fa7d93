"""The scripts that users start from, run as they are on the toybox."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import visalign
from visalign import pictures

FOLDER = Path(__file__).parents[1] / "examples"
SMALL = ["run.device=cpu", "trainer.prompts=1", "trainer.group_size=2", "trainer.micro_batch=2", "eval.images=2", "eval.grid=2"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[list[str]], Any]]:
    """The `main` of an example, which finds what lies beside it as a script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


def test_there_are_five_and_each_says_how_to_run_it() -> None:
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) == 5
    for file in files:
        assert f"`python examples/{file.name}" in file.read_text(encoding="utf-8").partition("\n\n")[0]


def test_own_reward(example: Any, tmp_path: Path) -> None:
    run = example("own_reward")(["--steps", "1", "--out", str(tmp_path / "run"), *SMALL])
    assert (run / "report.html").is_file()
    assert "warmth" in (run / "metrics.jsonl").read_text()


def test_score_folder(example: Any, tmp_path: Path) -> None:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures.save(torch.cat([noise, torch.full_like(noise, 0.5)]), tmp_path, ["noise", "grey"])
    (tmp_path / "grey.txt").write_text("nothing\n")
    out = example("score_folder")([str(tmp_path), "--prompt", "noise", "--reward", "jpeg=2"])
    rows = out.read_text().splitlines()
    assert rows[0] == "file,prompt,jpeg,total"
    assert [row.split(",")[:2] for row in rows[1:]] == [["noise.png", "noise"], ["grey.png", "nothing"]], "best first"


def test_guide_pipeline(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["two red circles", "--nfe", "6", "--steps", "2", "--out", str(tmp_path / "guided.png")]
    assert example("guide_pipeline")(words).is_file()
    plain, guided = (float(line.split("reward")[1].split()[0]) for line in capsys.readouterr().out.splitlines())
    assert guided >= plain


def test_an_adapter_goes_home_and_is_compared(example: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = example("align_and_export")(["--steps", "1", "--run", str(run), "--out", str(tmp_path / "adapter"), "policy.steps=4", *SMALL])
    assert {path.name for path in out.iterdir()} >= {"picture.png", "pytorch_lora_weights.safetensors"}
    found = example("compare_runs")(["toybox", str(run), "--reward", "toybox", "--images", "2", "--steps", "2"])
    mean, error = found["toybox"]
    assert -1 <= mean <= 1
    assert error >= 0
    assert isinstance(visalign.load(run, device="cpu"), visalign.Policy)
