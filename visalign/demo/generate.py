"""The Generate tab: draw, plain and then guided by rewards, and watch how the search gets there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from visalign import registry, sources
from visalign.charts import chart
from visalign.demo import inputs
from visalign.demo.look import framed, hint, number, picture, progress
from visalign.demo.watching import View, Wish, watch
from visalign.demo.workshop import RUN, Workshop

PICTURES, STEPS, NFE = 4, 50, 2000  # most pictures at once, denoising steps, and network evaluations a picture
PARALLEL = 4  # searches at once; who comes later waits
EXAMPLES = ("a blue square above a yellow star", "two red circles", "three green triangles", "a purple ring and a white cross")
WIDE = 480  # of the curve's drawing
METHOD, REWARD, BUDGET = "best_of_n", "toybox", 300  # what the page starts with

# --- what it looks like ------------------------------------------------------------------------------------------------


def shown(view: View, judges: Sequence[str] = ()) -> tuple[str, str, str]:
    """(state, pictures, curve) as HTML."""
    return progress(view.text, view.share), framed(_pairs(view) + _table(view, judges)), framed(_curve(view)) if view.best else ""


def _pairs(view: View) -> str:
    if view.before is None:
        return '<div class="hint"><b>One moment</b>The first picture is on its way.</div>'
    drawn: list[str] = []
    for n, plain in enumerate(view.before):
        first = f"<div>{picture(plain, f'plain: {view.prompt}')}<span>plain</span></div>"
        if view.after is None:
            drawn.append(f'<figure class="one">{first}</figure>')
            continue
        name = "guided" if view.share is None else "guided, so far"
        second = f"<div>{picture(view.after[n], f'guided: {view.prompt}')}<span>{name}</span></div>"
        drawn.append(f'<figure><div class="two">{first}{second}</div></figure>')
    return f'<div class="pairs">{"".join(drawn)}</div>'


def _table(view: View, judges: Sequence[str]) -> str:
    if not view.scores:
        return ""
    lines: list[str] = []
    for name, weight, before, after in view.scores:
        badge = "held out" if name in judges else "" if weight is None else f"× {weight:g}"
        tone = "" if before is None or after is None or after == before else "up" if after > before else "down"
        cells = f'<td>{number(before)}</td><td class="{tone}">{number(after)}</td>'
        lines.append(f"<tr><td>{escape(name)}{f'<span class=badge>{badge}</span>' if badge else ''}</td>{cells}</tr>")
    note = " A held-out judge scores the result and is never searched by: where it falls while the reward rises, the reward was fooled."
    about = "Means over the pictures." + (note if judges else "")
    head = "<tr><th>score</th><th>plain</th><th>guided</th></tr>"
    return f'<figure><table>{head}{"".join(lines)}</table><p class="note">{about}</p></figure>'


def _curve(view: View) -> str:
    curves = {"best so far": view.best} | ({"candidates": view.mean} if view.mean else {})
    return chart(curves, WIDE, unit="at NFE") + '<p class="note">The reward over network evaluations a picture.</p>'


# --- the tab -----------------------------------------------------------------------------------------------------------


def tab(workshop: Workshop) -> gr.Dropdown:
    """Build the tab; the choice of a model, which grows as runs are made."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, max_length=inputs.PROMPT, elem_id="prompt")
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Try one of these")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", elem_id="cancel")
            group, fields = inputs.picker(workshop, [name for name in workshop.offered if name == REWARD] or list(workshop.offered)[:1])
            summaries = {name: sources.summary("steering", name) for name in registry.names("steering")}
            method = gr.Dropdown(list(summaries), value=METHOD, label="Method", elem_id="method")
            about = gr.Markdown(summaries[METHOD], elem_classes="about")
            cost = "Network evaluations a picture: what a search may cost. It stops after a minute in any case."
            nfe = gr.Slider(10, NFE, BUDGET, step=10, label="Budget", info=cost, elem_id="budget")
            with gr.Accordion("More", open=False):
                model = gr.Dropdown(workshop.given, value=workshop.given[0], label="Model", info=f"“{RUN}…” is one of your own runs.")
                count = gr.Slider(1, PICTURES, 2, step=1, label="Pictures")
                steps = gr.Slider(1, STEPS, 10, step=1, label="Denoising steps")
                guidance = gr.Slider(1, 10, 1, step=0.5, label="Classifier-free guidance", info="1 is none; above, a step costs two.")
                seed = gr.Number(1, label="Seed", precision=0, info="The same seed, the same pictures.")
        with gr.Column(scale=3, min_width=360):
            start = hint("Nothing drawn yet", "Press Generate: first comes the plain picture, then the search for one that scores higher.")
            outputs = [
                gr.HTML(progress(""), apply_default_css=False, elem_id="state"),
                gr.HTML(start, apply_default_css=False, elem_id="stage"),
                gr.HTML("", apply_default_css=False, elem_id="curve"),
            ]
    given = [prompt, model, method, nfe, count, steps, guidance, seed, group, *fields]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    generate, stop = handlers(workshop)
    waiting: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": outputs[0]}  # the place in the queue
    run.click(generate, given, outputs, concurrency_limit=PARALLEL, **quiet | waiting)
    cancel.click(stop, None, None, queue=False, **quiet)
    method.change(lambda name: summaries.get(name, ""), method, about, **quiet)
    return model


def handlers(workshop: Workshop) -> tuple[Callable[..., Iterator[tuple[str, str, str]]], Callable[[gr.Request], None]]:
    """What the buttons do: values of the widgets in, HTML out, view by view; and the end of that visitor's search.

    A search that is cancelled ends like any other, after the state that it is in. Gradio's own way to cancel waits for that state
    as well, but while it waits the page takes the next click for none, or for an error.
    """
    running: dict[str | None, threading.Event] = {}  # session -> whether its search is to end

    def generate(
        request: gr.Request,
        prompt: Any,
        model: Any,
        method: Any,
        nfe: Any,
        count: Any,
        steps: Any,
        guidance: Any,
        seed: Any,
        chosen: Any,
        *values: Any,
    ) -> Iterator[tuple[str, str, str]]:
        ended = running[request.session_hash] = threading.Event()
        try:
            with inputs.spoken():
                wish = Wish(
                    prompt=inputs.prompt(prompt),
                    model=model,
                    weights=inputs.weights(list(workshop.offered), chosen, values),
                    method=workshop.method(method),
                    nfe=round(inputs.within("budget", nfe, 1, NFE)),
                    pictures=round(inputs.within("pictures", count, 1, PICTURES)),
                    steps=round(inputs.within("steps", steps, 1, STEPS)),
                    guidance=inputs.within("guidance", guidance, 1, 10),
                    seed=round(inputs.within("seed", seed, 0, 2**31 - 1)),
                )
                for view in watch(workshop, wish, ended.is_set):
                    yield shown(view, list(workshop.held_out))
        finally:
            running.pop(request.session_hash, None)

    def stop(request: gr.Request) -> None:
        if request.session_hash in running:
            running[request.session_hash].set()

    return generate, stop
