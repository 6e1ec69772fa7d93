"""The drawings of a report: curves, bars and heat-maps as SVG that needs no script; its colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import groupby
from statistics import fmean

Point = tuple[float, float]  # (training step, value)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 160, 44, 14, 8, 22  # of a chart, and its margins
THIRD, TWO_THIRDS = 388, 822  # widths of charts where a row has three columns, not four: drawn to the same scale and as high
SMOOTHED = 25  # longer curves are smoothed, shorter ones show every point
COLUMNS = 48  # most columns of a heat-map


def chart(curves: Mapping[str, Sequence[Point]], width: int = WIDTH, title: str = "", unit: str = "step") -> str:
    """One chart of one or two named curves: axes, curves, and a title under every point.

    Args:
        title: what the curves are of, where they are told apart elsewhere; their last values stand beside it in their colours.
        unit: of the horizontal axis.
    """
    x = Axis([step for curve in curves.values() for step, _ in curve], LEFT, width - RIGHT, 0.0)
    y = Axis([value for curve in curves.values() for value in _typical(curve)], HEIGHT - BOTTOM, TOP, 0.06)
    marks = _levels(y, width) + _below(x.ticks(4, whole=True), x)
    inner = "".join(_curve(curve, key, colour, x, y, unit) for (key, curve), colour in zip(curves.items(), "ab", strict=False))
    box = (LEFT - 5, 0, width - LEFT + 5, HEIGHT - BOTTOM + 5)  # spikes are cut off here, not drawn over the axis
    window = 'x="{}" y="{}" width="{}" height="{}" viewBox="{} {} {} {}"'.format(*box, *box)
    colours = ["key-a", "key-b"] if len(curves) > 1 else ["key"]
    lasts = [number(curve[-1][1]) for curve in curves.values()]
    said = [(lasts if title else [escape(key) for key in curves]), colours]
    names = " ".join(f'<span class="{colour}">{text}</span>' for text, colour in zip(*said, strict=True))
    left, right = (escape(title), names) if title else (names, "" if len(curves) > 1 else lasts[0])
    return _frame(left, right, title or ", ".join(curves), f"{marks}<svg {window}>{inner}</svg>", width)


def bars(name: str, values: Mapping[int, float], bold: Collection[int], width: int = WIDTH) -> str:
    """One bar for every denoising step, from 0; those in `bold` stand out."""
    x = Axis([min(values) - 0.5, max(values) + 0.5], LEFT, width - RIGHT, 0.0)
    y = Axis([0.0, max(values.values())], HEIGHT - BOTTOM, TOP, 0.0)
    marks = _levels(y, width) + _below(x.ticks(10, whole=True), x)
    half = (x(1) - x(0)) * 0.36
    drawn = [
        f'<rect class="bar{"" if step in bold else " faint"}" x="{x(step) - half:.1f}" y="{y(value):.1f}" width="{2 * half:.1f}" '
        f'height="{y(0) - y(value):.1f}"><title>{escape(name)}, denoising step {step}: {value:.5g}</title></rect>'
        for step, value in values.items()
    ]
    return _frame(escape(name), "", name, marks + "".join(drawn), width)


def heatmap(name: str, series: Mapping[int, Sequence[Point]], width: int = WIDTH) -> str:
    """Denoising step × training time, the first denoising step on top; a cell is the mean over its time, empty where there is no value.

    The farther from 0 the fuller the colour, which is another one below 0; the outermost 2 % don't set the scale.
    """
    times = [step for points in series.values() for step, _ in points]
    low, span = int(min(times)), int(max(times) - min(times)) + 1
    columns = min(COLUMNS, span)
    cells: list[tuple[int, int, int, float]] = []  # denoising step, first and last training step, mean
    for row, points in series.items():
        for column, run in groupby(points, lambda point: int(point[0] - low) * columns // span):
            first, after = (low - (-edge * span // columns) for edge in (column, column + 1))
            cells.append((row, first, after - 1, fmean(value for _, value in run)))
    x = Axis([low - 0.5, low + span - 0.5], LEFT, width - RIGHT, 0.0)
    y = Axis([min(series) - 0.5, max(series) + 0.5], TOP, HEIGHT - BOTTOM, 0.0)
    sizes = sorted(abs(mean) for *_, mean in cells if mean) or [1.0]
    most = sizes[-1 - len(sizes) // 50]
    signed = any(mean < 0 for *_, mean in cells)
    scale = f'{number(-most) if signed else 0}<i class="{"signed" if signed else "scale"}"></i>{number(most)}'
    title = f'<text transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">denoising step</text>'
    drawn = "".join(_cell(name, *cell, most, x, y) for cell in cells)
    marks = title + _beside(y.ticks(8, whole=True), y) + _below(x.ticks(4, whole=True), x)
    return _frame(escape(name), scale, name, f'{marks}<g class="cells">{drawn}</g>', width)


def _cell(name: str, row: int, first: int, last: int, mean: float, most: float, x: Axis, y: Axis) -> str:
    # rounded first, so that neighbours touch
    left, right, top, bottom = (round(edge, 1) for edge in (x(first - 0.5), x(last + 0.5), y(row - 0.5), y(row + 0.5)))
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    when = f"step {first}" if first == last else f"steps {first} to {last}"
    return (
        f'<rect class="{"b" if mean < 0 else "a"}" {place} opacity="{0.06 + 0.94 * min(1.0, abs(mean) / most):.2f}">'
        f"<title>{escape(name)}, denoising step {row}, {when}: {mean:.5g}</title></rect>"
    )


def _frame(names: str, note: str, label: str, drawing: str, width: int = WIDTH) -> str:
    wide = " wide" if width == TWO_THIRDS else ""
    return (
        f'<div class="chart{wide}"><header><div>{names}</div><span class="last">{note}</span></header>'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(label)}">{drawing}</svg></div>'
    )


def _levels(y: Axis, width: int = WIDTH) -> str:
    """Lines across a chart, and what they stand for."""
    ticks = y.ticks(4)
    lines = [f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{width - RIGHT}"/>' for tick, _ in ticks]
    return "".join(lines) + _beside(ticks, y)


def _beside(ticks: Sequence[tuple[float, str]], y: Axis) -> str:
    return "".join(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>' for tick, label in ticks)


def _below(ticks: Sequence[tuple[float, str]], x: Axis) -> str:
    return "".join(f'<text x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{label}</text>' for tick, label in ticks)


def _curve(points: Sequence[Point], key: str, colour: str, x: Axis, y: Axis, unit: str) -> str:
    """A curve with its points: all of them if they are few, else faint under a smooth line and averaged to what a screen can show."""
    few = len(points) <= SMOOTHED
    shown = points if few else binned(points, 300)
    drawn = [] if few else [f'<path class="raw {colour}" d="{_line(shown, x, y)}"/>']
    drawn.append(f'<path class="{colour}" d="{_line(shown if few else smoothed(shown), x, y)}"/>')
    targets = points if few else binned(points, 100)
    dots = [f'<circle class="{colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in targets]
    drawn += dots if few else []
    wide = (x.end - x.start) / len(targets)
    for (step, value), dot in zip(targets, dots, strict=True):
        area = f'<rect x="{x(step) - wide / 2:.1f}" y="0" width="{wide:.1f}" height="{HEIGHT - BOTTOM}"/>'
        drawn.append(f'<g class="at">{area}{dot}<title>{escape(key)}, {unit} {step:.6g}: {value:.5g}</title></g>')
    return "".join(drawn)


class Axis:
    """A linear map from values to pixels, with room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, room: float):
        low, high = min(values), max(values)
        pad = (high - low) * room if high > low else max(abs(low) * 0.05, 1e-9) if room else 0.5
        self.low, self.high, self.start, self.end = low - pad, high + pad, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int, whole: bool = False) -> list[tuple[float, str]]:
        """About `most` round numbers within the range (1, 2 or 5 times a power of ten) and how to write them in little room."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        ticks = [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        largest = max(abs(self.low), abs(self.high))
        if largest < 0.01:
            mantissas = [f"{tick:.1e}".split("e") for tick in ticks]
            return [(n, f"{float(m):g}e{int(e)}" if n else "0") for n, (m, e) in zip(ticks, mantissas, strict=True)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(tick, count(tick) if largest >= 1e4 else f"{tick:.{digits}f}") for tick in ticks]


def _line(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)


def _typical(points: Sequence[Point]) -> list[float]:
    """The values that set the scale: of a long curve all but the outer 1 % at either end, so that one spike doesn't flatten it."""
    values = sorted(value for _, value in points)
    cut = len(values) // 100 + 1 if len(values) > SMOOTHED else 0
    return values[cut : len(values) - cut]


def binned(points: Sequence[Point], most: int) -> list[Point]:
    """Means of equal runs of points, at most `most` of them."""
    size = math.ceil(len(points) / most)
    runs = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(step for step, _ in run) / len(run), sum(value for _, value in run) / len(run)) for run in runs]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred averages over a fifteenth of the curve, over less towards its ends: unlike an exponential average they don't lag."""
    half, smooth = max(len(points) // 30, 1), []
    for n, (step, _) in enumerate(points):
        reach = min(half, n, len(points) - 1 - n)
        smooth.append((step, sum(value for _, value in points[n - reach : n + reach + 1]) / (2 * reach + 1)))
    return smooth


# --- numbers -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without a long tail of zeros: 0.531, 12.4, 3e-04."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2g}"


def count(value: float) -> str:
    """A large number in thousands, millions or billions: 57.6 k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
