"""The report stands alone, shows every number and picture, and is well-formed."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from visalign import report
from visalign.errors import UserError
from visalign.tracking import Tracker


class Page(HTMLParser):
    """Checks that tags are closed in order and gathers what a browser would fetch."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run(folder: Path, steps: int = 60) -> Path:
    tracker = Tracker(folder)
    for step in range(steps + 1):
        row = {"seconds": 2.0, "images": 96, "nfe": 10.0} if step else {"base/eval/toybox@4": 0.61}
        if step:
            row |= {"reward/mean": 0.5 + step / 200, "reward/toybox": 0.5 + step / 200, "reward/clip": 20.0 + math.sin(step)}
            row |= {
                "loss": 1e-5 * (-1) ** step,
                "kl": math.nan,
                "clip/high": 0.1,
                "clip/low": 0.2,
                "custom": 1.0,
                "grad_norm": 1.0 + 99 * (step == 9),
            }
        if step % 20 == 0:
            row |= {"eval/toybox": 0.5 + step / 300, "eval/diversity": 0.3, "image/dark": 0.1, "image/dark_std": 0.05}
        tracker.log(step, row)
    tracker.close()
    return folder


def test_a_whole_run(tmp_path: Path) -> None:
    folder = run(tmp_path / "my <run>")
    (folder / "config.yaml").write_text("trainer:\n  name: flow_grpo\nrewards:\n  toybox:\n    use: toybox  # a & b\n")
    (folder / "samples").mkdir()
    for step in (0, 20, 60):
        Image.new("RGB", (40, 40), "red").save(folder / "samples" / f"step_{step:06d}.png")
    path = report.write(folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == folder / "report.html"
    assert not page.open
    assert "script" not in page.tags
    assert len(page.fetched) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "<h1>my &lt;run&gt;</h1>" in text
    assert "flow_grpo · rewards: toybox" in text
    assert "a &amp; b" in text
    assert "<i>0.5 →</i> 0.7</b>" in text
    assert "base at its best guidance 0.61" in text
    assert "2.0 min" in text
    assert "57.6 k" in text  # network evaluations: 60 × 96 × 10
    assert text.index("step 60") < text.index("Earlier pictures (2)") < text.index("step 20<")
    assert "No alarm" in text


def test_charts(tmp_path: Path) -> None:
    text = report.write(run(tmp_path)).read_text(encoding="utf-8")
    charts = re.findall(r'aria-label="([^"]*)"', text)
    rewards, others = (
        ["reward/mean", "reward/clip", "eval/toybox", "loss", "grad_norm"],
        ["eval/diversity", "image/dark", "seconds", "nfe", "images", "custom"],
    )
    # none for reward/toybox (the mean again), kl (never finite), the base's scan, a spread over pictures
    assert charts == [*rewards, "clip/low, clip/high", *others]
    assert "<title>eval/toybox, step 20: 0.56667</title>" in text
    for coordinates in re.findall(r' d="([^"]*)"', text):
        assert "nan" not in coordinates
        assert "inf" not in coordinates


def test_denoising_steps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(1, 4):
        row = {"images": 8, "nfe": 4.5, "nfe_credit": 2.0, "nfe_train": 2.0, "nfe_backward": 1.0, "reward_calls": 3.0}
        row |= {f"credit/size/{j}": 0.1 * j for j in (step, step + 1)} | {f"ratio/mean/{j}": 1 - 1e-6 * j for j in (step, step + 1)}
        row |= {f"ratio/std/{step}": 0.0, f"clip/fraction/{step}": math.nan}
        tracker.log(step, row | ({f"gain/{j}": 1.0 + j for j in range(9)} if step == 1 else {}))
    tracker.close()
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert not Page(text).open
    drawn = ["credit/size", "gain |κ|/ς", "ratio/mean − 1", "nfe", "nfe_credit", "nfe_train", "nfe_backward", "reward_calls", "images"]
    assert re.findall(r'aria-label="([^"]*)"', text) == drawn, "no chart of its own for a denoising step"
    assert "as they are 0 throughout: ratio/std." in text
    assert "credit/size, denoising step 4, step 3: 0.4<" in text
    assert "ratio/mean − 1, denoising step 2, step 1: -2e-06<" in text
    assert text.count('"bar faint"') == 5
    assert "<span>network evaluations</span><b>204</b>" in text  # 3 × 8 × (4.5 + 2 + 2)
    assert "rollout 108 · credit 48 · replay 48 · backward passes 24" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "<span>reward calls</span><b>72</b><span>3 per training picture</span>" in text


def test_alarms_are_shown(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(5):
        tracker.log(step, {"zero_spread/toybox": 0.9})
    tracker.close()
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert 'class="alarms"><li>Groups without signal: zero_spread/toybox is 90%' in text


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        report.write(tmp_path)
    Tracker(tmp_path).close()
    assert "No steps yet" in report.write(tmp_path).read_text(encoding="utf-8")
    tracker = Tracker(tmp_path)
    tracker.log(0, {"eval/toybox": 0.0, "loss": 0.0})
    tracker.close()
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 4


def test_many_pictures_are_thinned_and_sorted_by_number(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in range(0, 300, 10):
        Image.new("RGB", (2, 2)).save(tmp_path / "samples" / f"step_{step}.png")
    figures = report.samples(tmp_path)
    assert len(figures) == 8
    assert "step 290" in figures[0]
    assert "step 0" in figures[-1]
