"""What the demo's tests share: a workshop whose model and rewards cost nothing, and run folders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from visalign.demo.workshop import Workshop
from visalign.tracking import Tracker

CLOSE, FLAKY = "tests.toy_rewards:Closeness", "tests.toy_rewards:Flaky"


def train(folder: Path, lift: float = 0.5, **recipe: object) -> Path:
    """A run folder such as training writes."""
    tracker = Tracker(folder)
    for step in range(31):
        row: dict[str, float] = {"seconds": 1.0, "images": 8, "nfe": 10.0, "reward/mean": lift * step / 30, "loss": math.sin(step)}
        row |= {f"credit/size/{j}": 0.1 + 0.01 * step * j for j in range(3)} if step else {}
        if step % 10 == 0:
            row |= {"eval/strict": 0.3 + lift * step / 60, "eval/diversity": 0.4 - step / 100}
        tracker.log(step, row)
    tracker.close()
    (folder / "samples").mkdir()
    for step in (0, 10, 30):
        Image.new("RGB", (40, 40), (8 * step, 60, 90)).save(folder / "samples" / f"step_{step:05d}.png")
    whole = {"trainer": {"name": "flow_grpo"}, "rewards": {"toybox": {"use": "toybox"}}, "optimizer": recipe}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two runs, one of them a level deeper, and what is none or lies outside."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "first", lr=0.1)
    train(folder / "group" / "second <b>", lift=0.9, lr=0.2)
    (folder / "empty").mkdir()
    outside = train(tmp_path_factory.mktemp("outside") / "secret")
    (folder / "link").symlink_to(outside)
    return folder


@pytest.fixture(scope="session")
def workshop(root: Path) -> Iterator[Workshop]:
    """Points of the plane in place of pictures."""
    made = Workshop(["toy:gaussian"], [CLOSE, FLAKY, "jpeg"], ["tests.toy_rewards:Brightness"], root, "cpu")
    yield made
    made.close()
