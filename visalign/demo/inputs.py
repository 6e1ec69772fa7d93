"""What visitors may give: checked here, with one clear message each; nothing of it is evaluated, or used as a path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from torch import Tensor

from visalign import pictures, registry
from visalign.demo.workshop import Workshop
from visalign.errors import UserError
from visalign.scoring import RewardError

PROMPT = 300  # characters
UPLOADS = 16  # pictures at once
MEGABYTES = 20  # of an upload
PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"]
WEIGHT = 5.0  # most, either way


@contextmanager
def spoken() -> Iterator[None]:
    """What a visitor can mend is said on the page, as text, and leaves no traceback in the log."""
    try:
        yield
    except (UserError, RewardError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def refuse(error: Exception) -> NoReturn:
    """A request whose values the widgets won't take, in one message; only a forged one has such."""
    known = str(error.message) if isinstance(error, gr.Error) else "this request can't be read; reload the page and try again"
    raise gr.Error(escape(known[:200]), print_exception=False) from None


def links(values: Sequence[Any]) -> bool:
    """Whether a forged request names files elsewhere, which Gradio would fetch."""
    files = [item for value in values for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    return any("://" in str(file.get("path")) for file in files)


def prompt(text: Any) -> str:
    """A prompt on one line. Raises UserError: none, or too long."""
    words = " ".join(text.split()) if isinstance(text, str) else ""
    if not words:
        raise UserError("the prompt is empty; type what the picture should show, such as 'two red circles'")
    if len(words) > PROMPT:
        raise UserError(f"the prompt has {len(words)} characters; at most {PROMPT} are read")
    return words


def weights(offered: Sequence[str], chosen: Any, values: Sequence[Any]) -> dict[str, float]:
    """Name -> weight of the chosen rewards, `values` being those of all that are offered. Raises UserError: a weight out of bounds."""
    given = dict(zip(offered, values, strict=True))
    found: dict[str, float] = {}
    for name in chosen if isinstance(chosen, list) else []:
        found[str(name)] = within(f"weight of {name}", given.get(name, 1.0), -WEIGHT, WEIGHT)  # the workshop knows which names there are
    return found


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number within bounds. Raises UserError: it isn't."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is in no bounds
        raise UserError(f"{name}: expected a number from {low:g} to {high:.10g}, got {str(value)[:40]}")
    return float(value)


def uploads(files: Any) -> list[tuple[str, Tensor]]:
    """(name, picture (3, H, W)) of uploaded files.

    Raises:
        UserError: none, too many, or one that is too large, broken or no picture; the message has the file's own name.
    """
    paths = [Path(str(file)) for file in files or []]
    if not paths:
        raise UserError("no pictures yet; upload some")
    if len(paths) > UPLOADS:
        raise UserError(f"{len(paths)} pictures are too many; at most {UPLOADS} at once")
    return [(path.name, _read(path)) for path in paths]


def _read(path: Path) -> Tensor:
    if path.stat().st_size > MEGABYTES * 2**20:
        raise UserError(f"{path.name} is larger than {MEGABYTES} MB; scale it down")
    try:
        return pictures.load(path, FORMATS, PIXELS)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None


# --- widgets -----------------------------------------------------------------------------------------------------------


def picker(workshop: Workshop, chosen: Sequence[str]) -> tuple[gr.CheckboxGroup, list[gr.Number]]:
    """A choice of rewards, and a weight for each of them that shows while it is chosen."""
    names = list(workshop.offered)
    about = "Several add up, each times its weight; a negative weight looks for the opposite. ∇: has a gradient."
    labels = [(f"{name} ∇" if _has_gradient(workshop, name) else name, name) for name in names]
    group = gr.CheckboxGroup(labels, value=list(chosen), label="Rewards", info=about)
    with gr.Row():
        bounds: dict[str, Any] = {"minimum": -WEIGHT, "maximum": WEIGHT, "step": 0.1, "min_width": 110}
        fields = [gr.Number(1.0, label=f"{name} ×", visible=name in chosen, **bounds) for name in names]
    show = lambda picked: [gr.update(visible=name in picked) for name in names]  # noqa: E731
    group.change(show, group, fields, show_progress="hidden", api_visibility="private")
    return group, fields


def _has_gradient(workshop: Workshop, name: str) -> bool:
    section = workshop.offered[name]
    return registry.load("rewards", section.use).gradient_with(section.options) is not False
