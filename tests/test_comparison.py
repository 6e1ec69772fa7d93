"""Two runs on one page: gains, curves in one chart, and where their recipes differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.conftest import train
from tests.test_report import Page
from visalign import comparison
from visalign.errors import UserError
from visalign.tracking import Tracker


def test_what_both_have_is_drawn_together_and_what_differs_is_told(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a", lr=0.1, seed=0), train(tmp_path / "b", lift=0.9, lr=0.2, seed=0)
    page = comparison.body(first, second, ("a", "b"))
    assert not Page(page).open
    for part in ('aria-label="reward/mean"', "<title>a, step 30: 0.5</title>", "<title>b, step 30: 0.9</title>"):
        assert part in page
    assert "<span>strict</span><b><i>0.55 ·</i> 0.75</b>" in page
    assert '<span class="up">+0.2</span>' in page
    assert "credit/size" not in page, "single denoising steps stand in a run's own report"
    assert "<td>optimizer.lr</td><td>0.1</td><td>0.2</td>" in page
    assert "optimizer.seed" not in page
    assert page.count("<img") == 2


def test_runs_with_little_in_common(tmp_path: Path) -> None:
    first = train(tmp_path / "a")
    tracker = Tracker(tmp_path / "b")
    tracker.log(1, {"reward/other": 1.0})
    tracker.close()
    page = comparison.body(first, tmp_path / "b", ("a", "b"))
    assert not Page(page).open
    assert "Only in b: reward/other." in page
    assert "<h2>Recipes" not in page
    assert "The same but for their folders" in comparison.body(first, first, ("a", "a again"))
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        comparison.body(first, tmp_path, ("a", "c"))
