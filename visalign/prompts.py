"""Prompt lists, and which prompts a step trains on.

Unlike a shuffling data loader there is no state: a step's prompts are a function of (seed, step) alone, so that a resumed run goes on
exactly where it stopped, and no prompt comes again before all were seen.
"""

from __future__ import annotations

import difflib
import functools
import json
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from visalign.errors import UserError
from visalign.rollout import Prompts

SUFFIXES = (".txt", ".jsonl")
EVALUATION_ID = 2**40  # evaluation's picture numbers start here: its noise is never that of a training picture


@dataclass(frozen=True)
class PromptSet:
    """A list of prompts with what is known of each.

    Attributes:
        texts: the prompts.
        metadata: one dict each, without the prompt itself.
    """

    texts: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def draw(
        self,
        count: int,
        group_size: int,
        seed: int,
        step: int,
        rank: int = 0,
        world: int = 1,
        balance: str | None = None,
        shared_noise: bool = False,
    ) -> Prompts:
        """The pictures that a process makes in a training step: `count / world` prompts, each `group_size` times in a row.

        Args:
            count: prompts a step, over all processes; a multiple of `world`.
            step: from 0; prompts are drawn without replacement across steps.
            balance: metadata key whose values get equal shares of every step (as nearly as `count` allows).
            shared_noise: pictures of a group start from the same noise.

        Returns:
            `count * group_size / world` rows; `ids` and `groups` number the whole run's pictures and groups, whatever `world` is.

        Raises:
            UserError: `count` is no multiple of `world`, or a record lacks the key to balance by.
        """
        if count % world:
            near = f"{count - count % world} or {count - count % world + world}" if count > world else str(world)
            raise UserError(
                f"{count} prompts a step can't be shared by {world} processes in whole groups: use a multiple of {world}, such as {near}"
            )
        share = count // world
        first = step * count + rank * share
        buckets = self._buckets(balance)
        rows = [_pick(buckets, position, str(seed)) for position in range(first, first + share)]
        groups = torch.arange(first, first + share).repeat_interleave(group_size)
        ids = torch.arange(first * group_size, (first + share) * group_size)
        return self._select([row for row in rows for _ in range(group_size)], groups, ids, groups * group_size if shared_noise else ids)

    def evaluation(self, count: int, balance: str | None = None) -> Prompts:
        """The same `count` prompts every time: all of them once before any comes again. Pictures of one prompt share a group."""
        buckets = self._buckets(balance)
        rows = [_pick(buckets, position, "evaluation", cycle=True) for position in range(count)]
        ids = torch.arange(EVALUATION_ID, EVALUATION_ID + count)
        return self._select(rows, EVALUATION_ID + torch.tensor(rows, dtype=torch.int64), ids, ids)

    def _select(self, rows: list[int], groups: torch.Tensor, ids: torch.Tensor, noise_ids: torch.Tensor) -> Prompts:
        return Prompts([self.texts[row] for row in rows], [self.metadata[row] for row in rows], groups, ids, noise_ids)

    def _buckets(self, balance: str | None) -> list[list[int]]:
        """Row numbers by the value of a metadata key, values in order; a single bucket without a key."""
        if balance is None:
            return [list(range(len(self)))]
        found: dict[str, list[int]] = {}
        for row, record in enumerate(self.metadata):
            if balance not in record:
                known = ", ".join(sorted(record)) or "none"
                raise UserError(
                    f"prompt {self.texts[row]!r} has no {balance!r} to balance by (its keys: {known}); name a key that every record has"
                )
            found.setdefault(str(record[balance]), []).append(row)
        return [found[value] for value in sorted(found)]


def _pick(buckets: list[list[int]], position: int, salt: str, cycle: bool = False) -> int:
    """The row at a position of an endless list that takes the buckets in turn, each in a new order every time it is used up."""
    number = position % len(buckets)
    bucket = buckets[number]
    epoch, place = divmod(position // len(buckets), len(bucket))
    return bucket[permutation(len(bucket), f"{salt}/{number}/{0 if cycle else epoch}")[place]]


@functools.lru_cache(maxsize=256)
def permutation(count: int, salt: str) -> list[int]:
    """A permutation that depends on nothing but its arguments (Python hashes a text seed with SHA-512)."""
    return random.Random(salt).sample(range(count), count)


# --- reading -----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> PromptSet:
    """A prompt list: `.txt` with a prompt a line (blank lines and lines that start with # are skipped) or `.jsonl` with
    `{"prompt": "…", any metadata}` a line.

    Args:
        path: a file as given, else one of the packaged assets.

    Raises:
        UserError: missing, empty or unreadable file, unknown suffix, broken line.
    """
    found = find(path)
    if found.suffix not in SUFFIXES:
        raise UserError(f"{found}: expected a prompt list, {' or '.join(SUFFIXES)}, not {found.suffix or 'a name without suffix'!r}")
    try:
        content = found.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{found}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{found} can't be read: {error.strerror}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if found.suffix == ".txt":
        records: list[dict[str, Any]] = [{"prompt": line} for _, line in lines if not line.startswith("#")]
    else:
        records = [_record(found, number, line) for number, line in lines]
    if not records:
        raise UserError(f"{found} has no prompts; expected one a line")
    return PromptSet([r["prompt"] for r in records], [{k: v for k, v in r.items() if k != "prompt"} for r in records])


def find(path: str | Path) -> Path:
    """The file as given, else the packaged asset of that name."""
    given, packaged = Path(path), Path(str(files("visalign.assets"))) / path
    for candidate in (given, packaged):
        if candidate.is_file():
            return candidate
    names = {p.name: p for folder in (packaged.parent, given.parent) if folder.is_dir() for p in folder.iterdir() if p.suffix in SUFFIXES}
    near = difflib.get_close_matches(given.name, sorted(names), 3, 0.5)
    where = " is a folder, not a prompt list" if given.is_dir() else ": no such prompt list, neither as a file nor among the packaged ones"
    raise UserError(f"{path}{where}" + (f"; did you mean {' or '.join(str(Path(path).parent / name) for name in near)}?" if near else ""))


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: broken JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'{path}, line {number}: expected an object with a text under "prompt", such as {{"prompt": "two red circles"}}')
    return record
