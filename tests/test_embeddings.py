"""Prompt embeddings on disk are those that the encoders say, and are encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visalign import build, config
from visalign.embeddings import Remembered, fingerprint, together
from visalign.errors import UserError
from visalign.policy import Policy

CPU = torch.device("cpu")
TEXTS = ["a red circle", "a blue square", "a red circle"]


def policy(model: Path, folder: Path, **options: Any) -> Policy:
    section = {"model": str(model), "lora": None, "embeddings": str(folder), "options": {"max_sequence_length": 10} | options}
    return build.policy(config.parse({"policy": section}), CPU)


def memory(remembering: Policy) -> Remembered:
    known: Any = remembering.family.encode
    assert isinstance(known, Remembered)
    return known


def refuse(*_: Any) -> Any:
    raise AssertionError("encoded again")


def test_they_are_encoded_once_and_the_same(tiny_sd3: Path, tmp_path: Path) -> None:
    first = policy(tiny_sd3, tmp_path)
    plain, kept = memory(first).encode(TEXTS), first.family.encode(TEXTS)
    assert len(list(tmp_path.iterdir())) == 2
    second = policy(tiny_sd3, tmp_path)
    memory(second).encode = refuse
    for found in (kept, second.family.encode(TEXTS)):
        assert torch.equal(found.index, plain.index)
        for half in ("positive", "unconditional"):
            ours, theirs = getattr(found, half)(), getattr(plain, half)()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_they_depend_on_is_in_their_name(tiny_sd3: Path, tmp_path: Path) -> None:
    first = policy(tiny_sd3, tmp_path)
    first.family.encode(TEXTS[:1])
    policy(tiny_sd3, tmp_path, max_sequence_length=9).family.encode(TEXTS[:1])
    assert len(list(tmp_path.iterdir())) == 2
    parts = {"text_encoder": first.family.modules()["text_encoder"]}
    before = fingerprint(parts)
    assert before == fingerprint(parts)
    with torch.no_grad():
        next(parts["text_encoder"].parameters()).mul_(1.01)
    assert before != fingerprint(parts)
    picture = torch.rand(3, 4, 4)
    files = [
        memory(first).file("a", record) for record in ({}, {"condition": picture}, {"condition": picture + 1}, {"tag": "not a condition"})
    ]
    assert len(set(files)) == 3
    assert files[0] == files[3]


def test_shorter_rows_are_padded() -> None:
    found = together([torch.ones(2, 3), torch.ones(4, 3)])
    assert found.shape == (2, 4, 3)
    assert found.sum((1, 2)).tolist() == [6, 12]


def test_a_folder_that_cannot_be_made(tiny_sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"policy\.embeddings: cannot write to"):
        policy(tiny_sd3, tmp_path / "file")
