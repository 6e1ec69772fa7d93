"""The Generate tab: draw, plain and then guided by rewards, and watch how the search gets there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr
from torch import Tensor

from visalign import drawing, registry, sources
from visalign.charts import Point, chart
from visalign.demo import inputs
from visalign.demo.look import framed, hint, number, picture, progress
from visalign.demo.workshop import RUN, Workshop
from visalign.drawing import Result
from visalign.errors import UserError
from visalign.findings import State

PICTURES, STEPS, NFE, SECONDS = 4, 50, 2000, 60  # most pictures at once, denoising steps, and what a search may cost
PARALLEL = 4  # searches at once; who comes later waits
EVERY = 0.15  # seconds between two looks at a search
FEW = 4  # latents per forward on a CPU, where more are no faster: a search is seen more often
EXAMPLES = ("a blue square above a yellow star", "two red circles", "three green triangles", "a purple ring and a white cross")
WIDE = 480  # of the curve's drawing
METHOD, REWARD, BUDGET = "best_of_n", "toybox", 300  # what the page starts with

Score = tuple[str, float | None, float | None, float | None]  # name, weight (None: held out), before, after


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for, checked; `weights` are of rewards."""

    prompt: str
    model: str
    weights: dict[str, float]
    method: str
    nfe: int
    pictures: int = 1
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class View:
    """What a visitor sees of a search at one moment.

    Attributes:
        text: what is going on.
        share: how much of it is done, in [0, 1]; None once it is over.
        prompt: whose pictures these are.
        before, after: (N, 3, H, W) plain pictures and what the search makes of them; None where there are none yet.
        best, mean: the best scores so far and those of the candidates by network evaluations, means over pictures.
        scores: see `Score`.
    """

    text: str
    share: float | None
    prompt: str
    before: Tensor | None = None
    after: Tensor | None = None
    best: tuple[Point, ...] = ()
    mean: tuple[Point, ...] = ()
    scores: tuple[Score, ...] = ()


def watch(workshop: Workshop, wish: Wish) -> Iterator[View]:
    """The plain pictures, then the search, in views not too close to each other; the last one has everything.

    Raises:
        UserError: whatever the visitor can mend.
    """
    sections = workshop.sections(wish.weights)
    budget = {"nfe": wish.nfe, "seconds": SECONDS}
    drawing.plan(wish.method, {}, budget, {name: section.model_dump() for name, section in sections.items()} or None)
    yield View(f"Loading {wish.model}", 0.0, wish.prompt)
    view = View("", 0.0, wish.prompt)
    for view in _often(_plain(workshop, wish)):
        yield view
    if wish.method == "plain":
        return
    yield from _often(_guided(workshop, wish, view))


def _plain(workshop: Workshop, wish: Wish) -> Iterator[View]:
    """Views of the plain pictures on their way; the last one is over."""
    view = View("", 0.0, wish.prompt)
    for state in _states(workshop, wish, "plain"):
        text = f"Plain picture: step {state.step} of {state.steps}"
        view = View(text, state.step / max(state.steps, 1), wish.prompt, before=state.images)
        if state.result is None:
            yield view
            continue
        result: Result = state.result
        for name, weight in wish.weights.items():
            if weight and result.scores[name].isnan().all():
                raise UserError(
                    f"{name} has no score for {wish.prompt!r}: it can't read this prompt; try one of the examples, or another reward"
                )
        start: dict[str, Any] = {"best": ((result.nfe, result.scores["total"].nanmean().item()),)} if result.scores else {}
        yield replace(view, text=_spent("plain", result), share=None, scores=_scores(wish, result, None), **start)


def _guided(workshop: Workshop, wish: Wish, plain: View) -> Iterator[View]:
    """Views of the search that starts from what plain pictures look like."""
    before = {name: value for name, _, value, _ in plain.scores}
    best, mean = list(plain.best), list[Point]()
    for state in _states(workshop, wish, wish.method):
        cost = state.nfe + 2 * state.nfe_backward
        row = state.record()
        if "best" in row and state.result is None:
            best.append((cost, row["best"]))
        if "mean" in row and state.result is None:
            mean.append((cost, row["mean"]))
        shown = state.images if state.best is None else state.best.images
        view = replace(plain, after=shown, best=tuple(best), mean=tuple(mean))
        text = f"{wish.method}: {cost:.0f} of {wish.nfe} network evaluations a picture, {state.seconds:.1f} s"
        if state.result is None:
            yield replace(view, text=text, share=min(cost / wish.nfe, 1.0))
        else:
            yield replace(view, text=_spent(wish.method, state.result), share=None, scores=_scores(wish, state.result, before))


def _states(workshop: Workshop, wish: Wish, method: str) -> Iterator[State]:
    """A search, state by state, each with its pictures decoded on the worker."""

    def start() -> Generator[State]:
        policy = workshop.policy(wish.model)
        panel = workshop.panel(workshop.sections(wish.weights), policy.name)
        judges = workshop.panel(workshop.held_out, policy.name)
        sampler: dict[str, Any] = {"n": wish.pictures, "steps": wish.steps, "guidance": wish.guidance, "seed": wish.seed}
        budget = None if method == "plain" else {"nfe": wish.nfe, "seconds": SECONDS}
        batch = max(FEW, wish.pictures) if policy.device.type == "cpu" else 16
        found = drawing.sample_stream(policy, wish.prompt, panel, method, **sampler, budget=budget, judges=judges, batch=batch)
        for state in found:
            if state.best is None:
                _ = state.images  # decoded here, in the worker's turn, and kept
            yield state

    return workshop.turns(start)


def _often(views: Iterator[View]) -> Iterator[View]:
    """Some of the views: not more than one every so often, and the last."""
    last, waiting = 0.0, None
    for view in views:
        waiting = view
        if time.monotonic() - last >= EVERY:
            yield view
            last, waiting = time.monotonic(), None
    if waiting is not None:
        yield waiting


def _spent(method: str, result: Result) -> str:
    backwards = f" and {result.nfe_backward:.0f} backwards" if result.nfe_backward else ""
    return f"{method}: done, {result.nfe:.0f} network evaluations{backwards} a picture, {result.seconds:.1f} s"


def _scores(wish: Wish, result: Result, before: dict[str, float | None] | None) -> tuple[Score, ...]:
    """Means over pictures; without `before`, `result` is what it was before."""
    total = {"total": None} if len(wish.weights) > 1 else {}
    known = {name: (wish.weights.get(name), result.scores[name]) for name in (*wish.weights, *total)}
    known |= {name: (None, values) for name, values in result.held_out.items() if name != "total"}
    means = {name: (weight, values.nanmean().item()) for name, (weight, values) in known.items()}
    if before is None:
        return tuple((name, weight, mean, None) for name, (weight, mean) in means.items())
    return tuple((name, weight, before[name], mean) for name, (weight, mean) in means.items())


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
    return chart(curves, WIDE, "reward over network evaluations", "at NFE")


# --- the tab -----------------------------------------------------------------------------------------------------------


def tab(workshop: Workshop) -> gr.Dropdown:
    """Build the tab; the choice of a model, which grows as runs are made."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=2, max_length=inputs.PROMPT, elem_id="prompt")
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Try one of these")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")
            group, fields = inputs.picker(workshop, [name for name in workshop.offered if name == REWARD] or list(workshop.offered)[:1])
            summaries = {name: sources.summary("steering", name) for name in registry.names("steering")}
            method = gr.Dropdown(list(summaries), value=METHOD, label="Method", elem_id="method")
            about = gr.Markdown(summaries[METHOD], elem_classes="about")
            cost = "Network evaluations a picture: what a search may cost. It stops after a minute in any case."
            nfe = gr.Slider(STEPS, NFE, BUDGET, step=10, label="Budget", info=cost, elem_id="budget")
            with gr.Accordion("More", open=False):
                model = gr.Dropdown(workshop.given, value=workshop.given[0], label="Model", info=f"“{RUN}…” is one of your own runs.")
                count = gr.Slider(1, PICTURES, 2, step=1, label="Pictures")
                steps = gr.Slider(1, STEPS, 10, step=1, label="Denoising steps")
                guidance = gr.Slider(1, 10, 1, step=0.5, label="Classifier-free guidance", info="1 is none; above, a step costs two.")
                seed = gr.Number(1, label="Seed", precision=0, info="The same seed, the same pictures.")
        with gr.Column(scale=3, min_width=360):
            start = hint("Nothing drawn yet", "Press Generate: first comes the plain picture, then the search for one that scores higher.")
            outputs = [
                gr.HTML("", apply_default_css=False, elem_id="state"),
                gr.HTML(start, apply_default_css=False, elem_id="stage"),
                gr.HTML("", apply_default_css=False, elem_id="curve"),
            ]
    given = [prompt, model, method, nfe, count, steps, guidance, seed, group, *fields]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    event = run.click(handler(workshop), given, [*outputs, cancel], concurrency_limit=PARALLEL, **quiet)
    event.then(lambda: gr.update(interactive=False), None, cancel, **quiet)
    stopped = progress("Cancelled; this is how far it came.")
    cancel.click(lambda: (stopped, gr.update(interactive=False)), None, [outputs[0], cancel], cancels=[event], **quiet)
    method.change(lambda name: summaries.get(name, ""), method, about, **quiet)
    return model


def handler(workshop: Workshop) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What the button does: values of the widgets in, HTML out, view by view."""

    def generate(
        prompt: Any, model: Any, method: Any, nfe: Any, count: Any, steps: Any, guidance: Any, seed: Any, chosen: Any, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
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
            for view in watch(workshop, wish):
                yield *shown(view, list(workshop.held_out)), gr.update(interactive=True)

    return generate
