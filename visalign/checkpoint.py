"""Checkpoints from which a run goes on exactly where it was, written so that a kill at any moment loses none that was complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visalign.errors import UserError


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], optimizer: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write `folder`/step_N in full, then give it its name.

    Args:
        tensors: file stem -> name -> tensor, each saved as safetensors.
        optimizer: an optimizer's state_dict (read back with weights_only).
        state: plain values for state.json.
    """
    final = folder / f"step_{step}"
    fresh = folder / f"step_{step}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for stem, values in tensors.items():
        save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, fresh / f"{stem}.safetensors")
    torch.save(optimizer, fresh / "optimizer.pt")
    (fresh / "state.json").write_text(json.dumps({"step": step} | state, indent=2))
    for file in fresh.iterdir():
        _flush(file)
    later = [path for path in found(folder) if int(path.name[5:]) > step]  # of a course that was left when the run went back
    for path in [*later, *([final] if final.exists() else [])]:
        _set_aside(path)
    fresh.rename(final)
    _flush(folder)
    return final


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


def load(folder: Path, stems: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """(tensors, optimizer, state) as given to `save`.

    Raises:
        UserError: the checkpoint is incomplete or corrupt.
    """
    try:
        tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
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
