"""Pairs that a policy draws and a panel labels: what is kept, gone on from, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from visalign import feedback, pictures, preferences, prompts, registry
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.preferences import Pair
from visalign.scoring import Panel, Reward, RewardInput, RewardOutput, RewardSpec

PROCESSES = Processes("cpu")


class Channel(Reward):
    """Mean of a colour channel; the picture whose mean is above `fails` fails."""

    def __init__(self, channel: int = 0, fails: float = 2.0):
        self.spec = RewardSpec("channel")
        self.channel, self.fails = channel, fails

    def score(self, batch: RewardInput) -> RewardOutput:
        means = batch.images[:, self.channel].mean((1, 2))
        return RewardOutput.of(torch.where(means > self.fails, torch.nan, means))


def panel(fails: float = 2.0) -> Panel:
    """Red decides; what blue says is written down."""
    return Panel({"red": (Channel(0, fails), 1.0), "blue": (Channel(2), 0.0)})


def plain(folder: Path, colours: list[tuple[float, float, float]], sizes: list[int]) -> list[Pair]:
    """Pairs of plain pictures, two colours each."""
    found = [torch.tensor(colour)[:, None, None].expand(3, size, size) for colour, size in zip(colours, sizes, strict=True)]
    files = [pictures.save(image[None], folder, [f"{n}"])[0] for n, image in enumerate(found)]
    return [Pair(f"prompt {n}", (files[n], files[n + 1])) for n in range(0, len(files), 2)]


def test_labels_are_the_weighted_sums_and_aspects_are_kept(tmp_path: Path) -> None:
    colours = [(0.2, 0, 0.6), (0.4, 0, 0.2), (0.4, 0, 0), (0.2, 0, 1), (0.4, 0, 0), (0.4, 0, 1), (0.8, 0, 0), (0.2, 0, 0)]
    rows = plain(tmp_path, colours, [8, 8, 8, 16, 8, 8, 8, 8])
    said = feedback.label(rows, panel(fails=0.7), tmp_path / "out", processes=PROCESSES)
    assert [pair.better for pair in said] == [1, 0, "tie", None]
    assert said[0].scores["red"] == pytest.approx((0.2, 0.4))
    assert said[0].scores["blue"] == pytest.approx((0.6, 0.2)), "an aspect of weight 0 has no say"
    assert set(said[0].scores) == {"red", "blue"}
    assert [pair.better for pair in preferences.read(tmp_path / "out" / "pairs.jsonl")] == [1, 0, "tie", None]
    wide = feedback.label(rows, panel(), tmp_path / "wide", margin=0.5, processes=PROCESSES)
    assert [pair.better for pair in wide] == ["tie", "tie", "tie", 0]


def test_given_labels_stay_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    rows = plain(tmp_path, [(0.2, 0, 0), (0.4, 0, 0), (0.2, 0, 0), (0.4, 0, 0)], [8] * 4)
    rows[1] = replace(rows[1], better=0)
    judges = panel()
    said = feedback.label(rows, judges, tmp_path / "out", processes=PROCESSES)
    assert [pair.better for pair in said] == [1, 0]
    assert judges.calls == 2 * 2, "two judges on the two pictures without a label"
    again = feedback.label(rows, judges, tmp_path / "out", processes=PROCESSES)
    assert ([pair.better for pair in again], judges.calls) == ([1, 0], 4)
    with pytest.raises(UserError, match=r"pairs that were made with other margin; delete it, or choose another run.path"):
        feedback.label(rows, judges, tmp_path / "out", margin=0.1, processes=PROCESSES)


@pytest.fixture(scope="module")
def policy(tiny_sd3: Path) -> Policy:
    return registry.load_policy(str(tiny_sd3), max_sequence_length=10)


def made(policy: Policy, folder: Path, count: int, **more: Any) -> list[Pair]:
    given: dict[str, Any] = {"steps": 2, "batch": 8, "balance": "tag", "seed": 5, "processes": PROCESSES} | more
    return feedback.make(policy, prompts.load("toybox/prompts_train.jsonl"), given.pop("panel", panel()), folder, count, **given)


def test_pairs_are_drawn_until_there_are_enough_and_gone_on_from(policy: Policy, tmp_path: Path) -> None:
    once = made(policy, tmp_path / "once", 8)
    made(policy, tmp_path / "twice", 3)
    twice = made(policy, tmp_path / "twice", 8)
    assert len(once) == len(twice) == 8
    for a, b in zip(once, twice, strict=True):
        assert (a.prompt, a.better, a.metadata) == (b.prompt, b.better, b.metadata)
        assert a.scores["red"] == pytest.approx(b.scores["red"], rel=1e-5)
        assert all(torch.equal(x, y) for x, y in zip(a.load(), b.load(), strict=True))
        assert a.better == int(a.scores["red"][1] > a.scores["red"][0])
    assert {pair.metadata["tag"] for pair in once} >= {"counting", "position"}
    first = once[0].load()
    assert not torch.equal(*first), "two noises"
    expected = panel().score(RewardInput(torch.stack(first), [once[0].prompt] * 2)).by_name()["red"]
    assert once[0].scores["red"] == pytest.approx(tuple(expected.tolist())), "what the files show is what was judged"
    with pytest.raises(UserError, match="pairs that were made with other steps"):
        made(policy, tmp_path / "once", 8, steps=3)


def test_ties_are_thrown_away_and_a_panel_that_sees_no_difference_is_refused(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "ENOUGH", 6)
    with pytest.raises(UserError, match=r"only 0 of 8 pairs differ by more than 1; label them by a finer reward"):
        made(policy, tmp_path, 4, margin=1.0)
    assert not list(tmp_path.glob("*.png"))
    assert json.loads((tmp_path / "made_by.json").read_text())["margin"] == 1.0


def test_processes_share_any_number_of_rows() -> None:
    parts: list[list[str]] = []
    for rank in range(3):
        one = object.__new__(Processes)
        one.rank, one.count = rank, 3
        parts.append(one.share("abcde"))
    assert parts == [["a", "b"], ["c", "d"], ["e", "a"]], "equally long, the first five of them together are all"
