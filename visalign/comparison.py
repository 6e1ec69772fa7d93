"""Two runs side by side: what each gained, every curve of both in one chart, their newest pictures, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from visalign import overrides, report, tracking
from visalign.charts import chart, number


def body(first: Path, second: Path, names: tuple[str, str]) -> str:
    """The comparison, for a page that has the report's style (`report.STYLE`).

    Args:
        names: of the runs, to tell them apart.

    Raises:
        UserError: one of the folders is no run.
    """
    folders = (first, second)
    rows = [tracking.read(folder) for folder in folders]
    shared = [key for key in report.plain(rows[0]) if report.curve(rows[1], key)]

    def draw(keys: Sequence[str]) -> list[str]:
        return [chart({name: report.curve(own, key) for name, own in zip(names, rows, strict=True)}, title=key) for key in keys]

    heads = [f'<h2><span class="key-{key}">{escape(name)}</span></h2>' for key, name in zip("ab", names, strict=True)]
    halves = "".join(
        f"<section>{head}{report.alarms(own)}{''.join(report.samples(folder)[:1])}</section>"
        for head, own, folder in zip(heads, rows, folders, strict=True)
    )
    parts = [
        f'<div class="cards">{_cards(rows)}</div><div class="pair">{halves}</div>',
        f'<div class="panels">{report.panels(shared, draw)}</div>' if shared else "",
        _alone(rows, names),
        _recipes(folders, names),
    ]
    return "\n".join(parts)


def _cards(rows: list[list[tracking.Row]]) -> str:
    """The last value of every held-out metric that both have."""
    cards: list[str] = []
    for key in report.metrics(rows[0]):
        ends = [report.curve(own, key)[-1:] for own in rows]
        if key.startswith("eval/") and all(ends):
            (step, first), (other, second) = (end[0] for end in ends)
            tone = "up" if second > first else "down" if second < first else ""
            figures = f"<b><i>{number(first)} ·</i> {number(second)}</b>"
            gap = f'<span class="{tone}">{second - first:+.3g}</span><span> at steps {step:g} and {other:g}</span>'
            cards.append(f'<div class="card"><span>{escape(key.removeprefix("eval/"))}</span>{figures}{gap}</div>')
    return "".join(cards)


def _alone(rows: list[list[tracking.Row]], names: tuple[str, str]) -> str:
    """Metrics that only one of the runs has."""
    known = [report.plain(own) for own in rows]
    notes = [
        f'<p class="note">Only in {escape(name)}: {escape(", ".join(alone))}.</p>'
        for name, own, others in zip(names, known, reversed(known), strict=True)
        if (alone := [key for key in own if key not in others])
    ]
    return "".join(notes)


def _recipes(folders: tuple[Path, Path], names: tuple[str, str]) -> str:
    """Keys of config.yaml whose values differ."""
    files = [folder / "config.yaml" for folder in folders]
    if not all(file.is_file() for file in files):
        return ""
    first, second = (_flat(overrides.read(file)) for file in files)
    different = [key for key in first | second if first.get(key) != second.get(key) and key != "run.path"]
    if not different:
        return '<h2>Recipes</h2><p class="note">The same but for their folders.</p>'
    cells = [[key, str(first.get(key, "–")), str(second.get(key, "–"))] for key in different]
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
    head = "".join(f"<th>{escape(word)}</th>" for word in ("Recipes differ in", *names))
    return f'<h2>Recipes</h2><table class="differences"><tr>{head}</tr>{lines}</table>'


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"run": {"steps": 3}}` as `{"run.steps": 3}`."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
