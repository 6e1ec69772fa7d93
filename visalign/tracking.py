"""Where a run's numbers go: `metrics.jsonl` always, and TensorBoard, Weights & Biases or Trackio when asked by name.

Unlike the usual logger, the file is the record and the services are copies: every step is one JSON object on one line, written at once, so
that a kill loses at most the line being written; a resumed run drops the rows past its checkpoint instead of writing them twice.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from visalign.errors import UserError

FILE = "metrics.jsonl"
Row = dict[str, float]


class Backend(Protocol):
    """A service that is told what the file is told."""

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes a run's metrics. Made by the main process alone.

    Args:
        folder: the run folder; made if missing.
        backends: of "tensorboard", "wandb", "trackio".
        config: the resolved configuration, for the backends.
        resume_step: the step of the checkpoint that the run goes on from: later rows are dropped. 0 starts a new record.

    Raises:
        UserError: an unknown backend, or one that is not installed; nothing is touched then.
    """

    def __init__(self, folder: Path, backends: Sequence[str] = (), config: dict[str, Any] | None = None, resume_step: int = 0):
        modules = [(name, _module(name)) for name in backends]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        _rewind(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)  # unbuffered: a line is one write
        self._backends = [BACKENDS[name][1](module, folder, config or {}, resume_step) for name, module in modules]

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Append the row of a step; once per step, with everything there is to say of it. NaN and infinities are written as null."""
        line = json.dumps({"step": step} | {key: _plain(value) for key, value in row.items() if key != "step"}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        for backend in self._backends:
            backend.log(step, row)

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a picture that lies in the run folder to the backends."""
        for backend in self._backends:
            backend.image(step, name, path)

    def close(self) -> None:
        self._file.close()
        for backend in self._backends:
            backend.close()


def read(folder: Path) -> list[Row]:
    """The rows of a run folder in order; null reads as NaN, and a last line that was cut off by a kill is left out.

    Raises:
        UserError: no `metrics.jsonl` there, or a line before the last is broken.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(f"no {FILE} in {folder}: expected a run folder, as `visalign train` makes it under run.path")
    return [{key: math.nan if value is None else value for key, value in row.items()} for row, _ in _parse(path)]


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """(row, its line) for every complete line."""
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line end is nothing, or a line cut off
    rows: list[tuple[dict[str, Any], bytes]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: expected a JSON object with a step; mend or delete that line") from None
        rows.append((row, line))
    return rows


def _rewind(path: Path, step: int) -> None:
    """Keep the rows up to `step`, or none when the run starts afresh; a reader sees the old file or the new one, never a part."""
    kept = [line for row, line in _parse(path) if row["step"] <= step] if step and path.exists() else []
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _plain(value: float) -> float | int | None:
    """A number as JSON can hold it, with the seven digits that float32 has."""
    if isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None


def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise UserError(f"unknown tracker {name!r}: expected one of {', '.join(BACKENDS)} (metrics.jsonl is always written)")
    try:
        return importlib.import_module(BACKENDS[name][0])
    except ImportError:
        raise UserError(
            f"tracker {name!r} is not installed: run `pip install {name}`, or leave it out (metrics.jsonl is always written)"
        ) from None


# --- the services ------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files under `tensorboard/` in the run folder."""

    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int):
        self.writer = module.SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1 if resume_step else None)
        self.writer.add_text("config", "    " + json.dumps(config, indent=2, default=str).replace("\n", "\n    "), resume_step)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases. Its own step only grows, so the rows carry theirs; its run id is kept in the run folder for a resume."""

    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int):
        self.module, note = module, folder / "wandb_id"
        known = note.read_text(encoding="utf-8").strip() if resume_step and note.exists() else None
        self.run = module.init(project="visalign", name=folder.resolve().name, dir=folder, config=config, id=known, resume="allow")
        note.write_text(self.run.id + "\n", encoding="utf-8")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log({**row, "step": step})

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.module.Image(str(path)), "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio: local first, the same calls; a run is resumed by its name."""

    def __init__(self, module: ModuleType, folder: Path, config: dict[str, Any], resume_step: int):
        self.module = module
        resume = "allow" if resume_step else "never"
        self.run = module.init(project="visalign", name=folder.resolve().name, config=config, resume=resume, embed=False)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


BACKENDS: dict[str, tuple[str, Any]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}
