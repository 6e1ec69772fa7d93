"""Reference pictures of prompts, for rewards that hold a picture against others.

A missing reference is an error: a stand-in for all prompts, as published code has it, would quietly reward the wrong picture.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign import pictures
from visalign.errors import UserError
from visalign.preprocess import Preprocess
from visalign.scoring import RewardInput
from visalign.toybox import styles

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CACHED_BYTES = 2**28  # of encoded references, at most; the oldest leave first

Encode = Callable[[Tensor], tuple[Tensor, ...]]
Source = Callable[[str, Mapping[str, Any]], Tensor]


class References:
    """What a reward wants to know of each prompt's reference pictures, found out once per prompt.

    Args:
        reward: its name, for messages.
        source: `toybox` or `toybox:STYLE` draws scenes for the prompt; a folder of pictures serves every prompt; a `.jsonl` of
            `{"prompt": "…", "images": ["FILE", …]}` names each prompt's own, relative to itself. None: batches bring them along.
        count: pictures per prompt, at most; which of a larger number, or which scenes, is a function of the prompt alone.
        encode: (R, 3, H, W) in [0, 1] to whatever is kept of them.

    Raises:
        UserError: a source that is none of these.
    """

    def __init__(self, reward: str, source: str | None, count: int, encode: Encode):
        if count < 1:
            raise UserError(f"{reward}: count={count} reference pictures can't be compared with; use 1 or more")
        self.reward, self.encode = reward, encode
        self.draw = None if source is None else _source(reward, source, count)
        self._known: dict[str, tuple[Tensor, ...]] = {}

    def __call__(self, batch: RewardInput) -> list[tuple[Tensor, ...]]:
        """For each of N inputs what `encode` says of its references. `batch.references`, where given, win over the source.

        Inputs of one prompt share an entry (or of one tensor, in a batch that brings its own).

        Raises:
            UserError: no references for a prompt.
        """
        if batch.references is not None:
            given = {id(reference): reference for reference in batch.references}
            encoded = {key: self._encoded(reference) for key, reference in given.items()}
            return [encoded[id(reference)] for reference in batch.references]
        return self.prepare(batch.prompts, batch.metadata)

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, ...]]:
        """As above, for prompts that will come."""
        if self.draw is None:
            raise UserError(
                f"{self.reward} has no reference pictures: set references to a folder, a .jsonl of prompts and images, or toybox"
            )
        keys = [json.dumps([p, m.get("include")], sort_keys=True, default=str) for p, m in zip(prompts, metadata, strict=True)]
        found: dict[str, tuple[Tensor, ...]] = {}
        for key, prompt, record in zip(keys, prompts, metadata, strict=True):
            if key not in found:
                found[key] = self._known[key] if key in self._known else self._encoded(self.draw(prompt, record))
        self._known |= found
        size = sum(tensor.nbytes for kept in self._known.values() for tensor in kept)
        while size > CACHED_BYTES:
            size -= sum(tensor.nbytes for tensor in self._known.pop(next(iter(self._known))))
        return [found[key] for key in keys]

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.encode(images.detach())


def _source(reward: str, source: str, count: int) -> Source:
    name, _, style = source.partition(":")
    if name == "toybox":
        styles.drawn("a star", {}, 1, style=style or "plain")  # an unknown style is refused at once
        return lambda prompt, metadata: styles.drawn(prompt, dict(metadata), count, style=style or "plain")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{reward}: references {source} has no pictures ({', '.join(SUFFIXES)})")
        return lambda prompt, metadata: _loaded(_some(files, count, prompt))
    if path.suffix == ".jsonl" and path.is_file():
        table = _table(path)

        def own(prompt: str, metadata: Mapping[str, Any]) -> Tensor:
            if prompt not in table:
                raise UserError(f"{reward}: {path} has no reference pictures for the prompt {prompt!r}; add a line for it")
            return _loaded(_some(table[prompt], count, prompt))

        return own
    raise UserError(f"{reward}: references {source!r}: no such folder or .jsonl; expected one of these, toybox or toybox:STYLE")


def _table(path: Path) -> dict[str, list[Path]]:
    """Prompt -> files, of which none is missing."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, names = str(record["prompt"]), [str(name) for name in record["images"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: expected {{"prompt": "…", "images": ["FILE", …]}}') from None
        files = [path.parent / name for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"{path}, line {number}: {file}: no such file")
        if not files:
            raise UserError(f"{path}, line {number}: no images for {prompt!r}; name at least one")
        found.setdefault(prompt, []).extend(files)
    return found


def _some(files: Sequence[Path], count: int, prompt: str) -> list[Path]:
    return list(files) if len(files) <= count else random.Random(prompt).sample(files, count)


def _loaded(files: Sequence[Path]) -> Tensor:
    """(R, 3, H, W): the pictures as they are, or where their sizes differ the middle squares, scaled to the smallest."""
    images = [pictures.load(file)[None] for file in files]
    if len({image.shape for image in images}) > 1:
        side = min(min(image.shape[-2:]) for image in images)
        images = [resized(image, (side, side)) for image in images]
    return torch.cat(images)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 3, H, W) in [0, 1] scaled to cover (height, width), the middle of it cut out."""
    return Preprocess(size, (0.0,) * 3, (1.0,) * 3)(images)
