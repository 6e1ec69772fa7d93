"""Which prompts a step sees, and what a bad list is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from visalign import prompts
from visalign.errors import UserError
from visalign.prompts import EVALUATION_ID, PromptSet, load


def make(count: int, tags: int = 3) -> PromptSet:
    return PromptSet([f"p{n}" for n in range(count)], [{"tag": f"t{n % tags}"} for n in range(count)])


def test_no_prompt_repeats_before_all_were_seen() -> None:
    everything = make(10)
    seen = [text for step in range(15) for text in everything.draw(4, 1, seed=0, step=step).texts]
    epochs = [seen[n : n + 10] for n in range(0, 60, 10)]
    assert all(sorted(epoch) == sorted(everything.texts) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_its_number_and_seed_alone() -> None:
    everything = make(50)
    first = everything.draw(8, 2, seed=1, step=7)
    again = make(50).draw(8, 2, seed=1, step=7)
    assert first.texts == again.texts
    assert torch.equal(first.ids, again.ids)
    assert everything.draw(8, 2, seed=2, step=7).texts != first.texts
    assert everything.draw(8, 2, seed=1, step=8).texts != first.texts


def test_groups_and_ids_count_through_the_run() -> None:
    drawn = make(9).draw(2, 3, seed=0, step=5)
    assert drawn.texts[0] == drawn.texts[1] == drawn.texts[2]
    assert drawn.groups.tolist() == [10, 10, 10, 11, 11, 11]
    assert drawn.ids.tolist() == drawn.noise_ids.tolist() == list(range(30, 36))
    shared = make(9).draw(2, 3, seed=0, step=5, shared_noise=True)
    assert shared.ids.tolist() == list(range(30, 36))
    assert shared.noise_ids.tolist() == [30, 30, 30, 33, 33, 33]


@pytest.mark.parametrize("balance", [None, "tag"])
def test_processes_share_the_groups_of_the_same_step(balance: str | None) -> None:
    whole = make(20).draw(8, 3, seed=0, step=3, balance=balance)
    parts = [make(20).draw(8, 3, seed=0, step=3, rank=rank, world=4, balance=balance) for rank in range(4)]
    assert [text for part in parts for text in part.texts] == whole.texts
    for name in ("ids", "groups", "noise_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize(("count", "world", "numbers"), [(10, 4, "8 or 12"), (3, 4, "as 4")])
def test_groups_that_cannot_be_shared(count: int, world: int, numbers: str) -> None:
    with pytest.raises(UserError, match=numbers):
        make(20).draw(count, 2, seed=0, step=0, world=world)


def test_balance_gives_equal_shares_in_every_step() -> None:
    uneven = PromptSet([f"p{n}" for n in range(13)], [{"tag": "rare" if n < 3 else "common"} for n in range(13)])
    for step in range(9):
        tags = Counter(record["tag"] for record in uneven.draw(6, 1, seed=0, step=step, balance="tag").metadata)
        assert tags == {"rare": 3, "common": 3}
    common = [t for step in range(10) for t, r in zip(*_drawn(uneven, step), strict=True) if r["tag"] == "common"]
    assert sorted(common[:10]) == sorted(uneven.texts[3:])
    with pytest.raises(UserError, match="no 'kind' to balance by"):
        uneven.draw(6, 1, seed=0, step=0, balance="kind")


def _drawn(source: PromptSet, step: int) -> tuple[list[str], list[dict]]:
    drawn = source.draw(6, 1, seed=0, step=step, balance="tag")
    return drawn.texts, drawn.metadata


def test_evaluation_is_fixed_cycled_and_apart_from_training() -> None:
    everything = make(7)
    first = everything.evaluation(20)
    assert first.texts == make(7).evaluation(20).texts
    assert sorted(first.texts[:7]) == sorted(everything.texts)
    assert first.texts[7:14] == first.texts[:7]
    assert first.groups[0] == first.groups[7]
    assert len(first.groups.unique()) == 7
    assert first.ids.tolist() == list(range(EVALUATION_ID, EVALUATION_ID + 20))
    assert torch.equal(first.ids, first.noise_ids)
    balanced = Counter(record["tag"] for record in everything.evaluation(12, "tag").metadata)
    assert set(balanced.values()) == {4}
    assert everything.evaluation(5).texts == first.texts[:5]  # a smaller evaluation is a part of a larger one


# --- reading -----------------------------------------------------------------------------------------------------------


def test_text_lists(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# animals\n\n  a cat \na dog\r\nein Äffchen\n", encoding="utf-8")
    found = load(tmp_path / "a.txt")
    assert found.texts == ["a cat", "a dog", "ein Äffchen"]
    assert found.metadata == [{}, {}, {}]
    assert len(found) == 3


def test_json_lists_keep_their_metadata(tmp_path: Path) -> None:
    records = [{"prompt": "a ring", "tag": "single_object", "include": [{"class": "ring", "count": 1}]}, {"prompt": "# is a sign"}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    found = load(str(tmp_path / "a.jsonl"))
    assert found.texts == ["a ring", "# is a sign"]
    assert found.metadata == [{"tag": "single_object", "include": [{"class": "ring", "count": 1}]}, {}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b"# only a comment\n", "no prompts"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x"}\n', 'line 1: expected an object with a text under "prompt"'),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1"),
        ("a.jsonl", b'\n["x"]\n', "line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.csv", b"x", r"\.txt or \.jsonl"),
        ("a.txt", b"good\nb\xff\xfed\n", "line 2: not UTF-8"),
    ],
)
def test_bad_lists_are_told_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_list_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"did you mean .*animals\.txt"):
        load(tmp_path / "animal.txt")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)


def test_packaged_lists_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toybox").mkdir()
    (tmp_path / "toybox" / "two.txt").write_text("a\nb\n")
    monkeypatch.setattr(prompts, "files", lambda package: tmp_path)
    assert load("toybox/two.txt").texts == ["a", "b"]
    with pytest.raises(UserError, match=r"did you mean toybox/two\.txt"):
        load("toybox/too.txt")
