"""A folder of samples: complete, resumed without redoing or losing anything, and refused where its settings are others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visalign import cli, gallery
from visalign.errors import UserError
from visalign.pictures import load
from visalign.prompts import PromptSet

COUNT = 200
WORDS = [
    "--model",
    "toy:gaussian",
    "--reward",
    "tests.toy_rewards:Closeness",
    "--method",
    "best_of_n",
    "--budget",
    "nfe=12",
    "--steps",
    "4",
]


def wanted(**changes: object) -> gallery.Wanted:
    fields = {"model": "toy:gaussian", "rewards": {}, "judges": {}, "method": "plain", "options": {}, "budget": {}}
    return gallery.Wanted(**(fields | {"n": 2, "steps": 3, "guidance": 1.0, "seed": 0} | changes))  # pyright: ignore[reportArgumentType]


def prompts(count: int) -> PromptSet:
    return PromptSet([f"prompt {number}" for number in range(count)], [{} for _ in range(count)])


def test_killed_in_the_middle_it_goes_on_without_redoing_or_losing_a_prompt(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("".join(f"prompt {number}\n" for number in range(COUNT)))
    command = [sys.executable, "-m", "visalign.cli", "sample", "--prompts", str(file), *WORDS, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list(out.glob("0*.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("0*.json")}
    assert 5 <= len(done) < COUNT
    assert cli.main(command[3:]) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "nothing is done twice"
    records = json.loads((out / "scores.json").read_text())["prompts"]
    assert [record["prompt"] for record in records] == [f"prompt {number}" for number in range(COUNT)]
    assert len(list(out.glob("*.png"))) == COUNT + 4, "a picture each, and four sheets"
    assert cli.main(["sample", *(f"prompt {n}" for n in range(20)), *WORDS, "--out", str(tmp_path / "whole")]) == 0
    for name in (f"{number:05d}-0.png" for number in range(20)):
        assert (load(out / name) == load(tmp_path / "whole" / name)).all(), "as if it had not been killed"


def test_a_list_may_grow_and_its_pictures_keep_their_noise(tmp_path: Path) -> None:
    gallery.fill(tmp_path / "a", prompts(2), wanted())
    gallery.fill(tmp_path / "a", prompts(4), wanted())
    gallery.fill(tmp_path / "b", prompts(4), wanted())
    names = sorted(path.name for path in (tmp_path / "b").glob("0*.png"))
    assert names == [f"{number:05d}-{k}.png" for number in range(4) for k in range(2)]
    assert all((load(tmp_path / "a" / name) == load(tmp_path / "b" / name)).all() for name in names)
    assert len({(tmp_path / "a" / name).read_bytes() for name in names}) == 8, "each from a noise of its own"


def test_what_was_broken_off_within_a_prompt_is_done_again(tmp_path: Path) -> None:
    gallery.fill(tmp_path, prompts(3), wanted())
    (tmp_path / "00001.json").unlink()  # written last
    before = load(tmp_path / "00001-1.png")
    (tmp_path / "00001-1.png").write_bytes(b"half a picture")
    gallery.fill(tmp_path, prompts(3), wanted())
    assert (load(tmp_path / "00001-1.png") == before).all()


def test_other_settings_and_other_prompts_are_refused(tmp_path: Path) -> None:
    gallery.fill(tmp_path, prompts(2), wanted())
    with pytest.raises(UserError, match="has pictures of other settings: seed is 0 there and 1 here"):
        gallery.fill(tmp_path, prompts(2), wanted(seed=1))
    with pytest.raises(UserError, match="other prompts: number 1 is 'prompt 1' there and 'another' here"):
        gallery.fill(tmp_path, PromptSet(["prompt 0", "another"], [{}, {}]), wanted())
    (tmp_path / "00001.json").write_text("{half a rec")
    with pytest.raises(UserError, match=r"00001.json can't be read .* delete it to have it made again"):
        gallery.fill(tmp_path, prompts(2), wanted())


def test_failed_scores_are_null(tmp_path: Path) -> None:
    rewards = {"flaky": {"use": "tests.toy_rewards:Flaky", "weight": 1.0}}
    assert "none valid" in gallery.fill(tmp_path, prompts(1), wanted(rewards=rewards))
    assert json.loads((tmp_path / "00000.json").read_text())["scores"]["flaky"] == [None, None]
