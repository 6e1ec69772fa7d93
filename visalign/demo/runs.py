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


def tab(workshop: Workshop) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Build the tab; the two choices of runs, which grow as runs are made."""
    with gr.Row(equal_height=True):
        first = gr.Dropdown([], label="Run", info="Folders with a metrics.jsonl below the demo's root.", elem_id="run")
        second = gr.Dropdown([], label="Compare with", info="Leave it empty to see one run alone.", elem_id="other")
        show = gr.Button("Open", variant="primary", scale=0, min_width=140, elem_id="open")
    start = hint("No run opened", "Choose one: its curves, pictures, credit by denoising step, and what looks like a hacked reward.")
    output = gr.HTML(start, apply_default_css=False, elem_id="report")
    show.click(handler(workshop), [first, second], output, concurrency_limit=PARALLEL, api_visibility="private")
    return first, second


def handler(workshop: Workshop) -> Callable[[Any, Any], str]:
    """What the button does: names of runs in, HTML out."""

    def show(first: Any, second: Any) -> str:
        with inputs.spoken():
            folder = workshop.run(first)
            if not second or second == first:
                return framed(report.body(folder))
            return framed(comparison.body(folder, workshop.run(second), (str(first), str(second))))

    return show
