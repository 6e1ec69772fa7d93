"""The Score tab: uploaded pictures, ranked by rewards, with a bar for each and a map of where a reward looks."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from visalign.demo import inputs
from visalign.demo.look import framed, hint, number, over, picture, progress
from visalign.demo.workshop import Workshop
from visalign.errors import UserError
from visalign.scoring import RewardInput
from visalign.toybox.scenes import Object, render

PARALLEL = 2  # visitors served at once
SIDE = 320  # pixels of a shown picture, at most
CHOSEN = ("toybox", "clip_score", "dino")  # what the page starts with, as far as they are offered
EXAMPLE = "two red circles"


@dataclass(frozen=True)
class Scored:
    """A picture with what rewards say of it.

    Attributes:
        name: of its file.
        image: (3, H, W), reduced for the page.
        scores: reward name -> score, with "total"; NaN where one failed.
        maps: reward name -> (h, w).
        errors: why scores failed.
    """

    name: str
    image: Tensor
    scores: dict[str, float]
    maps: dict[str, Tensor]
    errors: tuple[str, ...] = ()


def scored(workshop: Workshop, files: Sequence[tuple[str, Tensor]], prompt: str, weights: Mapping[str, float]) -> Iterator[Scored]:
    """Score pictures one by one, whatever their sizes.

    Raises:
        UserError: no reward chosen, a prompt that is missing, or a reward that refuses the prompt.
    """
    sections = workshop.sections(weights)
    if not sections:
        raise UserError("no reward is chosen; tick one or more")
    panel = workshop.turn(lambda: workshop.panel(sections, workshop.given[0]))
    assert panel is not None
    needy = [name for name, reward in panel.rewards.items() if "prompt" in reward.spec.needs]
    if needy and not prompt:
        raise UserError(f"{needy[0]} reads the prompt; type what the pictures should show, or leave out {', '.join(needy)}")

    @torch.no_grad()
    def judge(image: Tensor) -> Any:
        return panel.score(RewardInput(image[None].to(workshop.device), [prompt]))

    for name, image in files:
        found = workshop.turn(lambda image=image: judge(image))
        scores = {alias: values.item() for alias, values in found.by_name().items()}
        maps = {alias: output.dense[0].cpu() for alias, output in found.outputs.items() if output.dense is not None}
        why = tuple(f"{alias}: {text}" for alias, texts in found.errors.items() for text in texts)
        yield Scored(name, _reduced(image), scores, maps, why)


def _reduced(image: Tensor) -> Tensor:
    scale = SIDE / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


# --- what it looks like ------------------------------------------------------------------------------------------------


def ranking(found: Sequence[Scored], ranges: Mapping[str, tuple[float, float]]) -> str:
    """The pictures as HTML, best first; `ranges` are those that rewards promise."""
    ranked = sorted(found, key=lambda one: -math.inf if math.isnan(one.scores["total"]) else one.scores["total"], reverse=True)
    spans = {name: _span([one.scores[name] for one in found], ranges[name]) for name in ranges}
    looks = {name: _limits([one.maps[name] for one in found]) for name in found[0].maps}
    cards: list[str] = []
    for place, one in enumerate(ranked, 1):
        file, total = escape(one.name), number(one.scores["total"])
        head = f'<header><b>{place}</b><span title="{file}">{file}</span><i>{total}</i></header>'
        views = f"<div>{picture(one.image, one.name)}<span>{'picture' if one.maps else ''}</span></div>"
        for name, dense in one.maps.items():
            views += f"<div>{picture(over(one.image, dense, *looks[name]), f'{name}: where it scores')}<span>{escape(name)}</span></div>"
        meters = "".join(_meter(name, one.scores[name], span) for name, span in spans.items())
        why = "".join(f'<p class="note">{escape(text)}</p>' for text in one.errors)
        kind = "two" if one.maps else "one"
        cards.append(f'<figure>{head}<div class="{kind}">{views}</div>{meters}{why}</figure>')
    note = "Ranked by the weighted total. A full bar is the best score that there can be, or the best here where there is no limit."
    note += " Maps are bright where a reward finds what it wants." if looks else ""
    lost = [name for name in spans if all(math.isnan(one.scores[name]) for one in found)]
    why = f"{', '.join(lost)}: no score for any picture; try a prompt such as '{EXAMPLE}'."
    notice = f'<p class="notice">{escape(why)}</p>' if lost else ""
    return framed(f'<p class="note">{note}</p>{notice}<div class="ranking">{"".join(cards)}</div>')


def _span(values: Sequence[float], promised: tuple[float, float]) -> tuple[float, float]:
    """What a bar's ends stand for: 0, or less where scores are, and the best score that there can be or is."""
    known = [value for value in values if math.isfinite(value)]
    low = promised[0] if promised[1] <= 0 and math.isfinite(promised[0]) else min([0.0, *known])
    return low, promised[1] if math.isfinite(promised[1]) else max([0.0, *known])


def _limits(maps: Sequence[Tensor]) -> tuple[float, float]:
    values = torch.cat([dense.flatten() for dense in maps])
    return values.min().item(), values.max().item()


def _meter(name: str, value: float, span: tuple[float, float]) -> str:
    low, high = span
    share = 0.0 if math.isnan(value) or high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    bar = f'<div class="rail" title="{low:.3g} to {high:.3g}"><i style="width:{share:.1%}"></i></div>'
    return f'<div class="meter"><span title="{escape(name, True)}">{escape(name)}</span>{bar}<span>{number(value)}</span></div>'


# --- the tab -----------------------------------------------------------------------------------------------------------


def tab(workshop: Workshop) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=330):
            files = gr.File(label="Pictures", file_count="multiple", height=190, elem_id="uploads")
            limits = f"Up to {inputs.UPLOADS} pictures of {inputs.MEGABYTES} MB, {', '.join(inputs.FORMATS)}; deleted within the hour."
            gr.Markdown(limits, elem_classes="about")
            take = gr.Button("Take three examples", size="sm", visible="toybox" in workshop.offered, elem_id="examples")
            prompt = gr.Textbox(EXAMPLE, label="Prompt", info="What they should show.", lines=2, max_length=inputs.PROMPT, elem_id="shows")
            group, fields = inputs.picker(workshop, [name for name in CHOSEN if name in workshop.offered] or list(workshop.offered)[:1])
            run = gr.Button("Score", variant="primary", elem_id="score")
        with gr.Column(scale=3, min_width=360):
            start = hint("No pictures yet", "Upload some, say what they should show, and choose who judges them.")
            output = gr.HTML(start, apply_default_css=False, elem_id="ranking")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    busy: dict[str, Any] = {"show_progress": "minimal"}
    drawn = examples() if "toybox" in workshop.offered else []
    take.click(lambda: (drawn, EXAMPLE), None, [files, prompt], **quiet)
    given = [files, prompt, group, *fields]
    run.click(handler(workshop), given, output, concurrency_limit=PARALLEL, **quiet | busy)


def examples() -> list[str]:
    """Files of three scenes: what the example asks for, one of a wrong colour, and one too few; they go when uploads go."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    right, other = Object("circle", "red", 20, 20), Object("circle", "red", 44, 44)
    shown = {"two red": [right, other], "red and blue": [right, replace(other, colour="blue")], "one red": [right]}
    for name, objects in shown.items():
        render(objects).save(folder / f"{name}.png")
    return [str(folder / f"{name}.png") for name in shown]


def handler(workshop: Workshop) -> Callable[..., Iterator[str]]:
    """What the button does: values of the widgets in, HTML out."""

    def score(files: Any, prompt: Any, chosen: Any, *values: Any) -> Iterator[str]:
        with inputs.spoken():
            given = inputs.uploads(files)
            weights = inputs.weights(list(workshop.offered), chosen, values)
            found: list[Scored] = []
            for one in scored(workshop, given, inputs.prompt(prompt) if str(prompt or "").strip() else "", weights):
                found.append(one)
                yield progress(f"{len(found)} of {len(given)} pictures", len(found) / len(given))
            yield ranking(found, workshop.ranges(weights))

    return score
