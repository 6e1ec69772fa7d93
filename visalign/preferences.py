"""Pairs of pictures of one prompt, and which of the two is better: files, the split into what is trained and what is held out, batches.

A pairs file is JSONL, one object a line:

    {"prompt": "two red circles", "images": ["a.png", "b.png"], "better": 1, "scores": {"aesthetic": [2.5, 3.5]}}

`images` are paths relative to the file. `better` is the number of the better picture, "tie", or null where nobody has said. `scores` are
what judges said of both, aspect by aspect, such as VisionPrefer's four (arXiv 2404.15100). Other keys are metadata of the prompt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from visalign import pictures, prompts
from visalign.errors import UserError
from visalign.noise import seed_for

Label = Literal[0, 1, "tie"]
KEYS = ("images", "better", "scores")


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt.

    Attributes:
        images: their files.
        better: the number of the better one, "tie", or None if nobody has said.
        scores: aspect -> what a judge said of each, NaN where it failed.
        metadata: of the prompt.
    """

    prompt: str
    images: tuple[Path, Path]
    better: Label | None = None
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[Tensor, Tensor]:
        """Both pictures, each (3, H, W) in [0, 1]; videos are (F, 3, H, W)."""
        first, second = (pictures.shown([path])[0] for path in self.images)
        return first, second


def read(file: Path) -> list[Pair]:
    """The rows of a pairs file.

    Raises:
        UserError: missing or broken file, a row that is no pair, a picture that isn't there.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such pairs file; expected JSONL with a prompt, two images and which is better in every row")
    listed = prompts.load(file)
    return [_pair(file, n, text, record) for n, (text, record) in enumerate(zip(listed.texts, listed.metadata, strict=True), 1)]


def _pair(file: Path, number: int, prompt: str, record: dict[str, Any]) -> Pair:
    where, (images, better, scores) = f"{file}, row {number}", (record.get(key) for key in KEYS)
    if not (isinstance(images, list) and len(images) == 2 and all(isinstance(name, str) for name in images)):
        raise UserError(f'{where}: expected "images": [FILE, FILE], got {images!r}')
    if isinstance(better, bool) or better not in (0, 1, "tie", None):
        raise UserError(f'{where}: expected "better": 0, 1, "tie" or null, got {better!r}')
    scores = scores or {}
    if not isinstance(scores, dict) or not all(_two_numbers(said) for said in scores.values()):
        raise UserError(f'{where}: expected "scores": {{aspect: [number, number]}}, got {scores!r}')
    first, second = (file.parent / name for name in images)
    for path in (first, second):
        if not path.is_file():
            raise UserError(f"{where}: no picture {path}; paths are relative to the pairs file")
    said = {aspect: (_number(a), _number(b)) for aspect, (a, b) in scores.items()}
    return Pair(prompt, (first, second), better, said, {key: value for key, value in record.items() if key not in KEYS})


def _two_numbers(said: Any) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(value is None or type(value) in (int, float) for value in said)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def write(file: Path, pairs: Sequence[Pair]) -> None:
    """Write a pairs file; a reader sees the old one or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text("".join(json.dumps(_record(pair, file.parent), allow_nan=False) + "\n" for pair in pairs), encoding="utf-8")
    new.replace(file)


def _record(pair: Pair, folder: Path) -> dict[str, Any]:
    images = [os.path.relpath(path, folder) for path in pair.images]
    scores = {aspect: [float(f"{v:.6g}") if math.isfinite(v) else None for v in said] for aspect, said in pair.scores.items()}
    return {"prompt": pair.prompt, "images": images, "better": pair.better, "scores": scores} | pair.metadata


def split(pairs: Sequence[Pair], held_out: float) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): by a hash of the prompt, so that no prompt is in both, and none moves when pairs are added.

    Raises:
        UserError: a part has no pair.
    """
    parts: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        parts[seed_for("held out", pair.prompt.strip()) < held_out * 2**64].append(pair)
    if not all(parts):
        few = "to train on" if not parts[0] else "held out"
        raise UserError(f"trainer.held_out={held_out:g} leaves none of {len(pairs)} pairs {few}; give more prompts, or another share")
    return parts


def drawn(pairs: Sequence[Pair], count: int, seed: int, step: int) -> list[Pair]:
    """The pairs of a step, from 1: a function of (seed, step); none comes again before all were seen."""
    places = (divmod(n, len(pairs)) for n in range((step - 1) * count, step * count))
    return [pairs[prompts.permutation(len(pairs), f"pairs/{seed}/{epoch}")[place]] for epoch, place in places]
