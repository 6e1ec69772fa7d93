"""Pairs files: what is read and written, what is refused, and which pairs are trained when."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from visalign import pictures, preferences
from visalign.errors import UserError
from visalign.preferences import Pair


def saved(folder: Path, **changes: Any) -> Path:
    """A file of one pair, changed."""
    pictures.save(torch.rand(2, 3, 8, 8), folder, ["a", "b"])
    row = {"prompt": "a star", "images": ["a.png", "b.png"], "better": 1, "tag": "colors"} | changes
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    (pair,) = preferences.read(saved(tmp_path, scores={"aesthetic": [1, 2.5], "fidelity": [None, 3]}))
    assert (pair.prompt, pair.better, pair.metadata) == ("a star", 1, {"tag": "colors"})
    assert pair.scores["aesthetic"] == (1.0, 2.5)
    assert math.isnan(pair.scores["fidelity"][0])
    assert torch.equal(pair.load()[1], pictures.load(tmp_path / "b.png"))
    elsewhere = tmp_path / "deep" / "down" / "pairs.jsonl"
    preferences.write(elsewhere, [pair])
    (again,) = preferences.read(elsewhere)
    assert [path.resolve() for path in again.images] == [path.resolve() for path in pair.images]
    assert (again.better, again.metadata, repr(again.scores)) == (pair.better, pair.metadata, repr(pair.scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["a.png"]}, r'row 1: expected "images": \[FILE, FILE\], got'),
        ({"images": ["a.png", 3]}, r'row 1: expected "images"'),
        ({"images": ["a.png", "c.png"]}, r"row 1: no picture .*c\.png; paths are relative to the pairs file"),
        ({"better": 2}, r'row 1: expected "better": 0, 1, "tie" or null, got 2'),
        ({"better": True}, r'row 1: expected "better"'),
        ({"scores": {"aesthetic": [1]}}, r'row 1: expected "scores": \{aspect: \[number, number\]\}'),
        ({"scores": [1, 2]}, r'row 1: expected "scores"'),
        ({"prompt": ""}, r"line 1: expected an object with a text"),
    ],
)
def test_what_is_no_pair_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        preferences.read(saved(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such pairs file; expected JSONL"):
        preferences.read(tmp_path / "pairs.jsonl")


def pairs(count: int) -> list[Pair]:
    return [Pair(f"prompt {n // 3}", (Path(f"{n}a"), Path(f"{n}b")), 0) for n in range(count)]


def test_no_prompt_is_trained_and_held_out() -> None:
    train, held = preferences.split(pairs(3000), 0.2)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    assert len(train) + len(held) == 3000
    assert len(held) == pytest.approx(600, abs=152)  # four standard deviations of 1000 prompts
    assert [p for p in preferences.split(pairs(3300), 0.2)[1] if p in held] == held, "none moves when pairs are added"
    with pytest.raises(UserError, match=r"trainer.held_out=0 leaves none of 30 pairs held out"):
        preferences.split(pairs(30), 0.0)


def test_batches_are_a_function_of_seed_and_step() -> None:
    rows = pairs(10)
    epoch = [pair for step in (1, 2) for pair in preferences.drawn(rows, 5, seed=3, step=step)]
    assert sorted(str(pair.images) for pair in epoch) == sorted(str(pair.images) for pair in rows), "all once before any comes again"
    assert preferences.drawn(rows, 5, 3, 2) == epoch[5:]
    assert preferences.drawn(rows, 5, 3, 3) + preferences.drawn(rows, 5, 3, 4) != epoch
    assert preferences.drawn(rows, 5, 4, 1) != epoch[:5]
    assert len(preferences.drawn(rows[:2], 7, 0, 2)) == 7
