"""The Runs tab's handler: a run's report, two runs side by side, and names that are refused."""

from __future__ import annotations

import gradio as gr
import pytest

from tests.demo.test_workshop import FORGED
from tests.test_report import Page
from visalign.demo import runs
from visalign.demo.workshop import Workshop

SECOND = "group/second <b>"


def test_a_run_shows_its_report(workshop: Workshop) -> None:
    page = runs.handler(workshop)("first", None)
    assert not Page(page).open
    drawn = [f'aria-label="{key}"' for key in ("reward/mean", "credit/size", "eval/strict")]
    for part in (*drawn, "<h1>first</h1>", "step 10<", "Diversity: eval/diversity fell"):
        assert part in page
    assert page.count("data:image/png") == 3


def test_two_runs_are_compared(workshop: Workshop) -> None:
    page = runs.handler(workshop)("first", SECOND)
    assert not Page(page).open
    assert "group/second &lt;b&gt;" in page
    assert "<title>group/second &lt;b&gt;, step 30: 0.9</title>" in page
    assert "<td>optimizer.lr</td><td>0.1</td><td>0.2</td>" in page


@pytest.mark.parametrize("name", [name for name in FORGED if name])
def test_what_is_no_run_is_refused(workshop: Workshop, name: object, capfd: pytest.CaptureFixture[str]) -> None:
    for words in ((name, None), ("first", name)):
        with pytest.raises(gr.Error, match="no run is named") as error:
            runs.handler(workshop)(*words)
        assert "<script" not in error.value.message
    assert not capfd.readouterr().err
