"""Checkpoints from which a run goes on exactly where it was, written so that a kill at any moment loses none that was complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from visalign.errors import UserError

Tensors = Mapping[str, Tensor]
MOMENTS = "optimizer."  # before the stems of what an optimizer keeps of each weight, where weights are sharded


@dataclass(frozen=True)
class Writers:
    """Who writes a checkpoint: alone, or each process its shares; `wait` until all have come so far."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], object] = lambda: None


ALONE = Writers()


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensors], optimizer: dict[str, Any], state: dict[str, Any], writers: Writers = ALONE
) -> Path:
    """Write `folder`/step_N in full, then give it its name.

    Args:
        tensors: file stem -> name -> tensor, each saved as safetensors; of sharded tensors every process writes its rows to a file.
        optimizer: an optimizer's state_dict (read back with weights_only).
        state: plain values for state.json.
        writers: of several processes all must call this, and only then.
    """
    final = folder / f"step_{step}"
    fresh = folder / f"step_{step}.new"
    main = writers.rank == 0
    if main:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    writers.wait()
    moments, rest = _moments(optimizer)
    for stem, values in {**tensors, **moments}.items():
        sharded = any(isinstance(value, DTensor) for value in values.values())
        if main or sharded:
            name = f"{stem}-{writers.rank + 1:05d}-of-{writers.count:05d}" if sharded else stem
            save_file({name: _own(value).detach().cpu().contiguous() for name, value in values.items()}, fresh / f"{name}.safetensors")
    writers.wait()
    if not main:
        return final
    torch.save(rest, fresh / "optimizer.pt")
    (fresh / "state.json").write_text(json.dumps({"step": step} | state, indent=2))
    for file in fresh.iterdir():
        _flush(file)
    later = [path for path in found(folder) if int(path.name[5:]) > step]  # of a course that was left when the run went back
    for path in [*later, *([final] if final.exists() else [])]:
        _set_aside(path)
    fresh.rename(final)
    _flush(folder)
    return final


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _moments(optimizer: dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """An optimizer's sharded tensors, as stem -> number of the weight -> tensor, and its state without them."""
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[Any, Any] = {}
    for number, values in optimizer["state"].items():
        rest[number] = {key: value for key, value in values.items() if not isinstance(value, DTensor)}
        for key in values.keys() - rest[number].keys():
            found.setdefault(f"{MOMENTS}{key}", {})[str(number)] = values[key]
    return found, optimizer | {"state": rest}


class Shards(Tensors):
    """Tensors whose rows lie in several files; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self.parts = [safe_open(file, "pt") for file in files]

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([part.get_tensor(name) for part in self.parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0].keys())

    def __len__(self) -> int:
        return len(self.parts[0].keys())


def _read(folder: Path, stem: str) -> Tensors:
    """A stem's tensors, from one file or from every process's."""
    parts = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not parts:
        return load_file(folder / f"{stem}.safetensors")
    if len(parts) != int(parts[0].stem[-5:]):
        raise FileNotFoundError(f"{len(parts)} of {int(parts[0].stem[-5:])} files of {stem}")
    return Shards(parts)


def _set_aside(path: Path) -> None:
    """Take its name from a checkpoint at one stroke; what is deleted piece by piece must not pass for complete."""
    aside = path.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(folder: Path, stems: Sequence[str]) -> tuple[dict[str, Tensors], dict[str, Any], dict[str, Any]]:
    """(tensors, optimizer, state) as given to `save`, whole, by however many processes it was written.

    Raises:
        UserError: the checkpoint is incomplete or corrupt.
    """
    try:
        tensors = {stem: _read(folder, stem) for stem in stems}
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        for stem in sorted({file.name.partition("-")[0] for file in folder.glob(f"{MOMENTS}*-of-*.safetensors")}):
            for number, value in _read(folder, stem).items():
                optimizer["state"][int(number)][stem.removeprefix(MOMENTS)] = value
        state = json.loads((folder / "state.json").read_text())
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"checkpoint {folder} can't be read ({reason}); delete it to go on from the one before, or choose another run.path"
        ) from None
    return tensors, optimizer, state


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = [p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def newest(folder: Path, last: int) -> Path | None:
    """The newest complete checkpoint of a step up to `last`."""
    return next((path for path in reversed(found(folder)) if int(path.name[5:]) <= last), None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`, and what interrupted writes and abandoned courses left behind."""
    for old in found(folder)[:-keep]:
        _set_aside(old)
    for left in [*folder.glob("step_*.new"), *folder.glob("step_*.old")]:
        shutil.rmtree(left, ignore_errors=True)


def to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` means, or None to start afresh.

    Raises:
        UserError: "never" where there are checkpoints, or no checkpoint there (as given, in the run folder, or among its checkpoints).
    """
    folder = run / "checkpoints"
    existing = found(folder)
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "never":
        if existing:
            raise UserError(
                f"{run} already holds checkpoints up to {existing[-1].name}; choose another run.path, or run.resume=auto to go on"
            )
        return None
    for path in (Path(resume), run / resume, folder / resume):
        if (path / "state.json").is_file():
            return path
    known = f"; {run} has {', '.join(p.name for p in existing)}" if existing else ""
    raise UserError(f"run.resume: no checkpoint at {resume!r} (expected auto, never, or a checkpoint's folder){known}")
