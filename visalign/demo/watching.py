"""A search as a visitor of the demo watches it: plain pictures first, then what the search makes of them, view by view."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from visalign import drawing
from visalign.charts import Point
from visalign.demo.workshop import Workshop
from visalign.drawing import Result
from visalign.errors import UserError
from visalign.findings import State

SECONDS = 60  # that a search may take
EVERY = 0.15  # seconds between two views of it
FEW = 4  # latents per forward on a CPU, where more are no faster: a search is seen more often

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


def watch(workshop: Workshop, wish: Wish, stopped: Callable[[], bool] = lambda: False) -> Iterator[View]:
    """The plain pictures, then the search, in views not too close to each other; the last has everything, or all until it was `stopped`.

    Raises:
        UserError: whatever the visitor can mend.
    """
    sections = workshop.sections(wish.weights)
    budget = {"nfe": wish.nfe, "seconds": SECONDS}
    drawing.plan(wish.method, {}, budget, {name: section.model_dump() for name, section in sections.items()} or None)
    yield View(f"Loading {wish.model}", 0.0, wish.prompt)
    last = 0.0
    with closing(_views(workshop, wish)) as views:
        for view in views:
            if stopped():
                yield replace(view, text="Cancelled; this is how far it came.", share=None)
                return
            if view.share is None or time.monotonic() - last >= EVERY:
                yield view
                last = time.monotonic()


def _views(workshop: Workshop, wish: Wish) -> Generator[View]:
    """All views; the last one of each search is over."""
    view = View("", 0.0, wish.prompt)
    for view in _plain(workshop, wish):
        yield view
    if wish.method != "plain":
        yield from _guided(workshop, wish, view)


def _plain(workshop: Workshop, wish: Wish) -> Iterator[View]:
    """Views of the plain pictures on their way."""
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
