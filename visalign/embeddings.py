"""Prompt embeddings on disk, by a hash of what they depend on: a run that starts again, or another of the same prompts, encodes nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.policy import Policy
from visalign.rollout import Condition

SAMPLED = 64  # elements of each weight that its fingerprint looks at
NEGATIVE, SHARED = "negative.", "shared."  # before names of what the unconditional half has: of this prompt, or of every one


class Remembered:
    """`encode` of a policy's family, with a folder of what it said before.

    Args:
        policy: whose prompts are encoded.
        folder: a file for each prompt; runs and processes may share it.
        settings: what else the embeddings depend on, such as a number of tokens.

    Raises:
        UserError: the folder can't be written to.
    """

    def __init__(self, policy: Policy, folder: Path, settings: Mapping[str, Any]):
        family = policy.family
        self.policy, self.encode, self.folder = policy, family.encode, folder
        parts = {name: module for name, module in family.modules().items() if module is not family.network}
        self.base = [type(family).__name__, {k: str(v) for k, v in settings.items()}, fingerprint(parts)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"policy.embeddings: cannot write to {folder} ({error.strerror}); choose another folder") from None

    def __call__(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        records = list(metadata) or [{} for _ in texts]
        files = [self.file(text, record) for text, record in zip(texts, records, strict=True)]
        row = {file: n for n, file in enumerate(dict.fromkeys(files))}
        missing = [files.index(file) for file in row if not file.is_file()]
        if missing:
            found = self.encode([texts[n] for n in missing], [records[n] for n in missing])
            for place, n in enumerate(missing):
                _write(files[n], _row(found, place))
        stored = [load_file(file) for file in row]
        ours = {name: together([one[name] for one in stored]).to(self.policy.device) for name in stored[0]}
        negative = {name.removeprefix(NEGATIVE): value for name, value in ours.items() if name.startswith(NEGATIVE)}
        negative |= {name.removeprefix(SHARED): value[:1] for name, value in ours.items() if name.startswith(SHARED)}
        positive = {name: value for name, value in ours.items() if not name.startswith((NEGATIVE, SHARED))}
        return Condition(torch.tensor([row[file] for file in files]), positive, negative or None)

    def file(self, text: str, record: Mapping[str, Any]) -> Path:
        """Where a prompt's embeddings are, with the condition that it may bring."""
        content = json.dumps([*self.base, text, _digest(record.get("condition"))], sort_keys=True)
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"


def fingerprint(parts: Mapping[str, nn.Module]) -> str:
    """A hash of some elements of every weight and of its name, shape and dtype, whatever the device."""
    seen = hashlib.sha256()
    for part, module in sorted(parts.items()):
        for name, value in module.state_dict().items():
            flat = value.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].double().cpu()
            seen.update(f"{part}.{name} {tuple(value.shape)} {value.dtype}".encode())
            seen.update(sample.numpy().tobytes())
    return seen.hexdigest()


def together(rows: Sequence[Tensor]) -> Tensor:
    """(U, ...) of U rows; those with fewer tokens, which were encoded beside shorter prompts, end in zeros, as padding and masks do."""
    longest = max(len(row) if row.ndim else 0 for row in rows)
    padded = [F.pad(row, (0, 0) * (row.ndim - 1) + (0, longest - len(row))) if row.ndim else row for row in rows]
    return torch.stack(padded)


def _row(found: Condition, n: int) -> dict[str, Tensor]:
    """What is kept of one prompt."""
    at = int(found.index[n])
    kept = {name: value[at] for name, value in found.tensors.items()}
    for name, value in (found.negative or {}).items():
        kept[(SHARED if len(value) == 1 else NEGATIVE) + name] = value[0 if len(value) == 1 else at]
    return {name: value.detach().cpu().contiguous() for name, value in kept.items()}


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """At one stroke: another process may be reading, or writing the same."""
    fresh = file.with_suffix(f".{os.getpid()}")
    save_file(tensors, fresh)
    os.replace(fresh, file)


def _digest(condition: Any) -> str:
    """Of a picture by its content, in memory or in a file; "" for none."""
    if condition is None:
        return ""
    if isinstance(condition, Tensor):
        return hashlib.sha256(condition.detach().cpu().numpy().tobytes() + str(tuple(condition.shape)).encode()).hexdigest()
    path = Path(str(condition))
    content = path.read_bytes() if path.is_file() else str(condition).encode()
    return hashlib.sha256(content).hexdigest()
