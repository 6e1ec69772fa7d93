"""Checkpoints from which a run goes on exactly where it was, written so that a kill at any moment loses none that was complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    _flush(folder)
    return final


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
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"checkpoint {folder} can't be read ({reason}); delete it to resume from the one before, or set run.resume=never") from None
    return tensors, optimizer, state


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = [p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`, and what an interrupted write left behind."""
    for old in [*found(folder)[:-keep], *folder.glob("step_*.new")]:
        shutil.rmtree(old, ignore_errors=True)


def to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` means, or None to start afresh."""
    folder = run / "checkpoints"
    existing = found(folder)
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "never":
        if existing:
            raise UserError(f"{run} already holds checkpoints up to {existing[-1].name}; choose another run.path, or run.resume=auto to go on")
        return None
    path = Path(resume)
    if not (path / "state.json").is_file():
        near = f"; {run} has {', '.join(p.name for p in existing)}" if existing else ""
        raise UserError(f"run.resume: no checkpoint at {resume!r} (expected auto, never, or a folder such as checkpoints/step_50){near}")
    return path
