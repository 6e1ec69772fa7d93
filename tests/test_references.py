"""Reference pictures: every source, found once, in the order of the inputs; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from visalign import references
from visalign.errors import UserError
from visalign.references import References
from visalign.scoring import RewardInput
from visalign.toybox import styles


def plain(images: Tensor) -> tuple[Tensor, ...]:
    return (images,)


def batch(prompts: list[str], given: list[Tensor] | None = None) -> RewardInput:
    return RewardInput(torch.zeros(len(prompts), 3, 8, 8), prompts, references=given)


def picture(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> Path:
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def test_toybox_draws_each_prompts_scenes_once() -> None:
    seen: list[int] = []
    bank = References("dino", "toybox", 3, lambda images: (images, torch.tensor(seen.append(len(images)) or 0)))
    found = bank(batch(["a star", "two rings", "a star"]))
    assert seen == [3, 3]
    assert found[0] is found[2]
    assert torch.equal(found[1][0], styles.drawn("two rings", {}, 3))
    bank(batch(["two rings"]))
    bank.prepare(["a star"], [{}])
    assert seen == [3, 3]
    pastel = References("dino", "toybox:pastel", 3, plain)(batch(["two rings"]))[0][0]
    assert torch.equal(pastel, styles.drawn("two rings", {}, 3, style="pastel"))


def test_a_folder_serves_every_prompt_with_its_own_choice(tmp_path: Path) -> None:
    for level in range(6):
        picture(tmp_path / f"{level}.png", 40 * level)
    (tmp_path / "notes.txt").write_text("not a picture")
    everything = References("dino", str(tmp_path), 8, plain)(batch(["x"]))[0][0]
    assert everything[:, 0, 0, 0].mul(255).round().tolist() == [0, 40, 80, 120, 160, 200]
    some = [References("dino", str(tmp_path), 2, plain)(batch([f"prompt {n}"]))[0][0] for n in range(8)]
    assert all(len(images) == 2 for images in some)
    assert len({tuple(images[:, 0, 0, 0].tolist()) for images in some}) > 2
    assert torch.equal(References("dino", str(tmp_path), 2, plain)(batch(["prompt 3"]))[0][0], some[3])


def test_a_table_names_each_prompts_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 10, (8, 12))
    picture(tmp_path / "b.png", 20, (6, 6))
    lines = [{"prompt": "one", "images": ["a.png"]}, {"prompt": "two", "images": ["a.png", "b.png"]}]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)) + "\n")
    bank = References("dino", str(table), 8, plain)
    one, two = (found[0] for found in bank(batch(["one", "two"])))
    assert tuple(one.shape) == (1, 3, 12, 8)
    assert tuple(two.shape) == (2, 3, 6, 6)  # the middle squares, in the smallest size
    with pytest.raises(UserError, match=r"table\.jsonl has no reference pictures for the prompt 'three'"):
        bank(batch(["three"]))


def test_what_a_batch_brings_along_wins() -> None:
    seen: list[int] = []
    bank = References("dino", "toybox", 3, lambda images: (images, torch.tensor(seen.append(len(images)) or 0)))
    own = [torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)]
    found = bank(batch(["a star", "a ring", "a star"], [own[0], own[1], own[0]]))
    assert torch.equal(found[1][0], own[1])
    assert seen == [2, 1]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "CACHED_BYTES", 2 * 3 * 64 * 64 * 4)
    bank = References("dino", "toybox", 1, plain)
    assert len(bank(batch(["a star", "a ring", "a cross"]))) == 3
    assert len(bank._known) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected"),
        ('{"prompt": "x"}', "line 1: expected"),
        ('{"prompt": "x", "images": ["no.png"]}', r"no\.png: no such file"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "table.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        References("dino", str(tmp_path / "table.jsonl"), 1, plain)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"torn\.png can't be read"):
        References("dino", str(tmp_path), 1, plain)(batch(["x"]))
    (tmp_path / "empty").mkdir()
    for source, message in {"nowhere": "no such folder", "toybox:cubist": "no style", str(tmp_path / "empty"): "has no pictures"}.items():
        with pytest.raises(UserError, match=message):
            References("dino", source, 1, plain)
    with pytest.raises(UserError, match="dino has no reference pictures: set references"):
        References("dino", None, 1, plain)(batch(["x"]))
    with pytest.raises(UserError, match="count=0"):
        References("dino", None, 0, plain)
