"""The record survives kills and resumes, and says plainly what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from visalign import tracking
from visalign.errors import UserError
from visalign.tracking import Tracker, read


def test_rows_are_written_at_once_with_the_step_first_and_seven_digits(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "new" / "run")
    tracker.log(1, {"loss": 0.123456789012, "images": 96, "kl": math.nan, "grad_norm": math.inf, "lr": torch.tensor(3e-4)})  # type: ignore[dict-item]
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()  # before close
    assert lines == ['{"step": 1, "loss": 0.1234568, "images": 96, "kl": null, "grad_norm": null, "lr": 0.0003}']
    tracker.close()
    (row,) = read(tmp_path / "new" / "run")
    assert row["images"] == 96
    assert math.isnan(row["kl"])


def test_resume_drops_later_rows_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(6):
        tracker.log(step, {"loss": step / 10})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2, 3, 4, 5]
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4]
    tracker = Tracker(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == kept
    tracker.log(4, {"loss": 9.0})
    tracker.close()
    assert [row["loss"] for row in read(tmp_path)] == [0.0, 0.1, 0.2, 0.3, 9.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_fresh_run_starts_a_new_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    Tracker(tmp_path).close()
    assert read(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read(tmp_path)


def test_reading_a_folder_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read(tmp_path)


def test_missing_backends_are_named_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.BACKENDS, "wandb", ("a_module_that_is_not_there", tracking.Wandb))
    with pytest.raises(UserError, match="pip install wandb"):
        Tracker(tmp_path / "run", ["wandb"])
    with pytest.raises(UserError, match="unknown tracker 'mlflow'"):
        Tracker(tmp_path / "run", ["mlflow"])
    assert not (tmp_path / "run").exists()


class Service:
    """Stands for the wandb and trackio modules and for their runs."""

    id = "abc123"

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **options: object) -> Service:
        self.calls.append(("init", options))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, row: dict, step: int | None = None) -> None:
        self.calls.append(("log", row, step))

    def Image(self, path: str) -> str:  # noqa: N802
        return f"picture {Path(path).name}"

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_rows_and_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setattr(tracking, "_module", lambda _: service)
    tracker = Tracker(tmp_path, [name], {"seed": 0})
    tracker.log(1, {"loss": 0.5})
    tracker.image(1, "samples", tmp_path / "a.png")
    tracker.close()
    logged = [call for call in service.calls if call[0] == "log"]
    if name == "wandb":
        assert logged == [("log", {"loss": 0.5, "step": 1}, None), ("log", {"samples": "picture a.png", "step": 1}, None)]
    else:
        assert logged == [("log", {"loss": 0.5}, 1), ("log", {"samples": "picture a.png"}, 1)]
    assert service.calls[-1] == ("finish",)
    first = dict(service.calls[0][1])
    Tracker(tmp_path, [name], {"seed": 0}, resume_step=1).close()
    again = next(call[1] for call in reversed(service.calls) if call[0] == "init")
    assert first["name"] == again["name"] == tmp_path.name
    assert again["resume"] == "allow"
    assert name != "wandb" or (first["id"], again["id"]) == (None, "abc123")


def test_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    tracker = Tracker(tmp_path / "run", ["tensorboard"], {"seed": 0})
    for step in (1, 2):
        tracker.log(step, {"reward/mean": step / 4, "images": 3})
    tracker.image(2, "samples", tmp_path / "a.png")
    tracker.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [e.step for e in events.Images("samples")] == [2]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["images"] == 3
