"""`report.html` of a run: what was gained, what looks wrong, pictures before and after, every curve, and the recipe, in one file.

Unlike a dashboard it needs nothing but a browser: no script, no font, no picture from elsewhere; the curves are SVG drawn here.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from visalign import monitors, tracking

Point = tuple[float, float]

ADVICE = {  # what to look for in a panel
    "Reward": "On training prompts, while exploring.",
    "Held-out evaluation": "Unseen prompts, the same seeds every time; step 0 is the base model.",
    "Loss and KL": "A policy-gradient loss near 0 is normal: advantages have mean 0. The KL is the distance from the base model.",
    "Ratio and clipping": "New over old probability: 1 before the first update. Clip fractions of a few percent are healthy.",
    "Health": "Rewards must keep differing within groups; pictures must stay like the base model's in what no reward looks at.",
    "Speed": "Per step; network evaluations (NFE) are per picture, in the rollout and in training.",
}
PANELS: dict[str, tuple[str, ...]] = {  # title -> charts: patterns of keys; & lays two over each other
    "Reward": ("reward/mean", "reward/.*"),
    "Held-out evaluation": ("eval/(?!diversity$|tonal$).*",),
    "Loss and KL": ("loss", "loss/.*", "kl", "grad_norm", "lr"),
    "Ratio and clipping": ("ratio/mean", "ratio/max_deviation", "ratio/std", "clip/low&clip/high"),
    "Health": ("spread/.*", "zero_spread/.*", "eval/diversity", "eval/tonal", "image/.*(?<!_std)"),
    "Speed": ("seconds", "seconds/.*", "nfe", "nfe_train", "nfe_backward", "images"),
    "Others": ("(?!image/|base/).*",),
}

STYLE = """
:root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1a1f26;--faint:#66707d;--rule:#e1e5ea;--a:#2563eb;--b:#d97706;
--good:#15803d;--bad:#c62828;--warn:#fff4e0;--warn-rule:#e8a33d}@media(prefers-color-scheme:dark){
:root{--paper:#0f1216;--card:#181c22;--ink:#e6e9ed;--faint:#939dab;--rule:#2b313a;--a:#6ea2ff;--b:#f0a63c;--good:#4ade80;--bad:#ff7b72;
--warn:#2c2415;--warn-rule:#a87422}}*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:26px;margin:0;line-height:1.2;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 2px}p{margin:0}.note{color:var(--faint)}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));margin-top:16px}
.panels{display:grid;column-gap:12px;grid-template-columns:repeat(4,1fr);align-items:end}section{min-width:0}
.charts{display:grid;gap:12px;margin-top:12px;grid-template-columns:repeat(var(--n),1fr)}.n1{--n:1}.n2{--n:2;grid-column:span 2}
.n3{--n:3;grid-column:span 3}.n4{--n:4;grid-column:span 4}
.card,.chart,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;margin:0;min-width:0}
.card b{display:block;font-size:21px;line-height:1.4;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums}
.card b i{font-style:normal;color:var(--faint);font-weight:400}.card span,.last{color:var(--faint);font-size:13px}
.card .up{color:var(--good)}.card .down{color:var(--bad)}
.chart header{display:flex;justify-content:space-between;gap:8px;font-size:14px;font-weight:600;overflow-wrap:anywhere}
.last{font-weight:400;white-space:nowrap}.chart svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}path{fill:none;stroke-width:2;stroke-linejoin:round}
.grid{stroke:var(--rule);stroke-width:1}.raw{stroke-width:1;opacity:.4}.a{stroke:var(--a)}.b{stroke:var(--b)}
circle{fill:var(--card);stroke-width:2}.at rect{fill:transparent}.at circle{opacity:0}.at:hover circle{opacity:1}.key-a{color:var(--a)}
.key-b{color:var(--b);margin-left:8px}.key-a::before,.key-b::before{content:"● "}
.alarms{background:var(--warn);border:1px solid var(--warn-rule);border-radius:10px;padding:12px 16px;margin:16px 0 0;list-style:none}
.alarms li+li{margin-top:8px}.alarms li::before{content:"⚠ "}.calm{margin-top:16px;color:var(--good)}figure{margin-top:12px}
figure img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:4px}figcaption{color:var(--faint);margin-bottom:8px}
details{margin-top:12px}summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px;overflow-x:auto;
font:13px/1.45 ui-monospace,monospace}@media(max-width:1000px){.panels{grid-template-columns:1fr 1fr}.n3,.n4{--n:2;grid-column:span 2}}
@media(max-width:560px){.panels{grid-template-columns:minmax(0,1fr)}.n2,.n3,.n4{--n:1;grid-column:span 1}body{padding:20px 12px 40px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card b{font-size:17px}figure{overflow-x:auto}figure img{max-width:none;width:720px}}
"""


def write(folder: Path) -> Path:
    """Make `report.html` from a run folder's metrics.jsonl, config.yaml and samples/*.png, the two last if they are there.

    Raises:
        UserError: no metrics.jsonl there.
    """
    folder = Path(folder)
    rows = tracking.read(folder)
    name = escape(folder.resolve().name)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    newest, *older = _samples(folder / "samples") or [""]
    body = [
        f'<h1>{name}</h1><p class="note">{escape(_subtitle(text))}</p><div class="cards">{_cards(rows)}</div>{_alarms(rows)}',
        f'<h2>Pictures</h2><p class="note">The same prompts and seeds, before and after.</p>{newest}' if newest else "",
        f"<details><summary>Earlier pictures ({len(older)})</summary>{''.join(older)}</details>" if older else "",
        f'<div class="panels">{_panels(rows)}</div>' if rows else '<p class="note">No steps yet: the curves begin with the first row.</p>',
        f"<h2>Recipe</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>" if text else "",
    ]
    content = "\n".join(body)
    path = folder / "report.html"
    new = path.with_suffix(".html.new")
    new.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · visalign</title><style>{STYLE}</style></head><body>\n{content}\n</body></html>\n",
        encoding="utf-8",
    )
    return new.replace(path)


# --- key figures -------------------------------------------------------------------------------------------------------


def _subtitle(text: str) -> str:
    """ "flow_grpo · toybox · rewards: verifier" as far as the recipe says so."""
    config = yaml.safe_load(text) or {}
    rewards = ", ".join(config.get("rewards") or {})
    parts = [config.get("trainer", {}).get("name"), config.get("policy", {}).get("model"), f"rewards: {rewards}" if rewards else None]
    return " · ".join(str(part) for part in parts if part)


def _cards(rows: Sequence[tracking.Row]) -> str:
    """Before → after of every held-out metric, then what it took."""
    cards: list[str] = []
    for key in _keys(rows):
        points = _points(rows, key)
        if key.startswith("eval/") and points:
            (first_step, first), (last_step, last) = points[0], points[-1]
            best_step, best = max(points, key=lambda point: point[1])
            tone = "up" if last > first else "down" if last < first else ""
            peak = f"<span> · best {_number(best)} at step {best_step:g}</span>" if best_step not in (first_step, last_step) else ""
            scan = [value for name, value in rows[0].items() if name.startswith(f"base/{key}@")]
            peak += f"<span> · base at its best guidance {_number(max(scan))}</span>" if scan else ""
            figures = f"<b><i>{_number(first)} →</i> {_number(last)}</b>" if len(points) > 1 else f"<b>{_number(last)}</b>"
            cards.append(f'<span>{escape(key.removeprefix("eval/"))}</span>{figures}<span class="{tone}">{last - first:+.3g}</span>{peak}')
    seconds, pictures = (sum(value for _, value in _points(rows, key)) for key in ("seconds", "images"))
    evaluations = sum(row.get("images", 0) * (row.get("nfe", 0) + row.get("nfe_train", 0)) for row in rows)
    totals = {"steps": f"{rows[-1]['step']:.0f}" if rows else "0", "training time": _duration(seconds)}
    totals |= {"training pictures": _count(pictures), "network evaluations": _count(evaluations)}
    cards += [f"<span>{name}</span><b>{value}</b>" for name, value in totals.items()]
    return "".join(f'<div class="card">{card}</div>' for card in cards)


def _alarms(rows: Sequence[tracking.Row]) -> str:
    found = monitors.alarms(rows)
    if found:
        return f'<ul class="alarms">{"".join(f"<li>{escape(alarm)}</li>" for alarm in found)}</ul>'
    evaluations = sum(any(key.startswith("eval/") for key in row) for row in rows)
    return f'<p class="calm">✓ No alarm in {len(rows)} rows, {evaluations} of them with an evaluation (a trend needs 4).</p>'


def _samples(folder: Path, most: int = 8) -> list[str]:
    """Figures with the pictures inside, newest first; of many, an even choice that keeps the first and the newest."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]

    paths = sorted(folder.glob("*.png"), key=natural, reverse=True)
    if len(paths) > most:
        paths = [paths[round(n * (len(paths) - 1) / (most - 1))] for n in range(most)]
    figures: list[str] = []
    for path in paths:
        caption = re.sub(r"\b0+(?=\d)", "", re.sub(r"[_\W]+", " ", path.stem)).strip()
        data = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
        )
    return figures


# --- charts ------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 160, 44, 14, 8, 22  # of a chart, and its margins
SMOOTHED = 25  # longer curves are smoothed, shorter ones show every point


def _panels(rows: Sequence[tracking.Row]) -> str:
    left = [key for key in _keys(rows) if key != "step" and _points(rows, key)]
    mean = _points(rows, "reward/mean")  # a single reward is its own mean
    left = [key for key in left if not (key.startswith("reward/") and key != "reward/mean" and _points(rows, key) == mean)]
    panels: list[str] = []
    for title, patterns in PANELS.items():
        charts: list[str] = []
        for pattern in patterns:
            matches = [[key for key in left if re.fullmatch(part, key)] for part in pattern.split("&")]
            groups = [[key] for key in matches[0]] if len(matches) == 1 else [[key for match in matches for key in match]]
            charts += [_chart(rows, keys) for keys in groups if keys]
            left = [key for key in left if not any(key in keys for keys in groups)]
        if charts:
            head = f'<h2>{title}</h2><p class="note">{ADVICE.get(title, "")}</p>'
            panels.append(f'<section class="n{min(len(charts), 4)}">{head}<div class="charts">{"".join(charts)}</div></section>')
    return "\n".join(panels)


def _chart(rows: Sequence[tracking.Row], keys: Sequence[str]) -> str:
    """One chart of one or two keys: axes, curves, and a title under every point."""
    curves = [_points(rows, key) for key in keys]
    x = _Axis([step for curve in curves for step, _ in curve], LEFT, WIDTH - RIGHT, 0.0)
    y = _Axis([value for curve in curves for value in _typical(curve)], HEIGHT - BOTTOM, TOP, 0.06)
    marks = [f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>' for tick, _ in y.ticks(4)]
    marks += [f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>' for tick, label in y.ticks(4)]
    marks += [f'<text x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{label}</text>' for tick, label in x.ticks(4, whole=True)]
    inner = "".join(_curve(curve, key, colour, x, y) for curve, key, colour in zip(curves, keys, "ab", strict=False))
    box = (LEFT - 5, 0, WIDTH - LEFT + 5, HEIGHT - BOTTOM + 5)  # spikes are cut off here, not drawn over the axis
    window = 'x="{}" y="{}" width="{}" height="{}" viewBox="{} {} {} {}"'.format(*box, *box)
    colours = ["key-a", "key-b"] if len(keys) > 1 else ["key"]
    names = " ".join(f'<span class="{colour}">{escape(key)}</span>' for key, colour in zip(keys, colours, strict=True))
    last = _number(curves[0][-1][1]) if len(keys) == 1 else ""
    label = escape(", ".join(keys))
    return (
        f'<div class="chart"><header><div>{names}</div><span class="last">{last}</span></header>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}<svg {window}>{inner}</svg></svg></div>'
    )


def _curve(points: Sequence[Point], key: str, colour: str, x: _Axis, y: _Axis) -> str:
    """A curve with its points: all of them if they are few, else faint under a smooth line and averaged to what a screen can show."""
    few = len(points) <= SMOOTHED
    shown = points if few else _binned(points, 300)
    drawn = [] if few else [f'<path class="raw {colour}" d="{_line(shown, x, y)}"/>']
    drawn.append(f'<path class="{colour}" d="{_line(shown if few else _smoothed(shown), x, y)}"/>')
    targets = points if few else _binned(points, 100)
    dots = [f'<circle class="{colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in targets]
    drawn += dots if few else []
    wide = (WIDTH - LEFT - RIGHT) / len(targets)
    for (step, value), dot in zip(targets, dots, strict=True):
        area = f'<rect x="{x(step) - wide / 2:.1f}" y="0" width="{wide:.1f}" height="{HEIGHT - BOTTOM}"/>'
        drawn.append(f'<g class="at">{area}{dot}<title>{escape(key)}, step {step:.6g}: {value:.5g}</title></g>')
    return "".join(drawn)


class _Axis:
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
        numbers = [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        largest = max(abs(self.low), abs(self.high))
        if largest < 0.01:
            mantissas = [f"{number:.1e}".split("e") for number in numbers]
            return [(n, f"{float(m):g}e{int(e)}" if n else "0") for n, (m, e) in zip(numbers, mantissas, strict=True)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(number, _count(number) if largest >= 1e4 else f"{number:.{digits}f}") for number in numbers]


def _line(points: Sequence[Point], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)


def _keys(rows: Sequence[tracking.Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _points(rows: Sequence[tracking.Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _typical(points: Sequence[Point]) -> list[float]:
    """The values that set the scale: of a long curve all but the outer 1 % at either end, so that one spike doesn't flatten it."""
    values = sorted(value for _, value in points)
    cut = len(values) // 100 + 1 if len(values) > SMOOTHED else 0
    return values[cut : len(values) - cut]


def _binned(points: Sequence[Point], most: int) -> list[Point]:
    """Means of equal runs of points, at most `most` of them."""
    size = math.ceil(len(points) / most)
    runs = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(step for step, _ in run) / len(run), sum(value for _, value in run) / len(run)) for run in runs]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Centred averages over a fifteenth of the curve, over less towards its ends: unlike an exponential average they don't lag."""
    half, smooth = max(len(points) // 30, 1), []
    for n, (step, _) in enumerate(points):
        reach = min(half, n, len(points) - 1 - n)
        smooth.append((step, sum(value for _, value in points[n - reach : n + reach + 1]) / (2 * reach + 1)))
    return smooth


# --- numbers -----------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three digits, without a long tail of zeros: 0.531, 12.4, 3e-04."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2g}"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
