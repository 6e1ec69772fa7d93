"""The Runs tab: what training made of a model, and two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from visalign import comparison, report
from visalign.demo import inputs
from visalign.demo.look import framed, hint
from visalign.demo.workshop import Workshop

PARALLEL = 4  # visitors served at once
ALONE = ("none", "")
NONE = hint("No runs yet", "Train one, such as by `visalign train`, and open this tab again.")


def tab(workshop: Workshop) -> Callable[[gr.Blocks, gr.Tab], None]:
    """Build the tab; what connects its choice of runs to a page, and to the tab, whenever they are opened."""
    with gr.Row(equal_height=True):
        first = gr.Dropdown([], label="Run", info="Training runs below the demo's root.", elem_id="run")
        second = gr.Dropdown([ALONE], value="", label="Compare with", info="Both runs' curves in one chart.", elem_id="other")
        show = gr.Button("Open", variant="primary", scale=0, min_width=140, elem_id="open")
    start = hint("No run opened", "Choose one: its curves, pictures, credit by denoising step, and what looks like a hacked reward.")
    output = gr.HTML(start, apply_default_css=False, elem_id="report")
    show.click(handler(workshop), [first, second], output, concurrency_limit=PARALLEL, api_visibility="private")

    def newest(chosen: Any) -> list[Any]:
        names = list(workshop.runs())
        one = chosen if chosen in names else next(iter(names), None)
        return [gr.update(choices=names, value=one), gr.update(choices=[ALONE, *names]), gr.skip() if names else NONE]

    def connect(page: gr.Blocks, shelf: gr.Tab) -> None:
        for opened in (page.load, shelf.select):
            opened(newest, first, [first, second, output], show_progress="hidden", api_visibility="private")

    return connect


def handler(workshop: Workshop) -> Callable[[Any, Any], str]:
    """What the button does: names of runs in, HTML out."""

    def show(first: Any, second: Any) -> str:
        with inputs.spoken():
            folder = workshop.run(first)
            if not second or second == first:
                return framed(report.body(folder))
            return framed(comparison.body(folder, workshop.run(second), (str(first), str(second))))

    return show
