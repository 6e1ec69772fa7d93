"""`report.html` of a run: what was gained, what looks wrong, pictures before and after, every curve, and the recipe, in one file.

Unlike a dashboard it needs nothing but a browser: no script, no font, no picture from elsewhere; the curves are SVG drawn here.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from visalign import monitors, overrides, tracking
from visalign.charts import THIRD, TWO_THIRDS, Point, bars, chart, count, heatmap, number

FORWARDS = ("nfe", "nfe_credit", "nfe_train")  # denoiser forwards per picture
SPENT = {"nfe": "rollout", "nfe_credit": "credit", "nfe_train": "replay", "nfe_backward": "backward passes", "reward_calls": "reward calls"}

ADVICE = {  # what to look for in a panel
    "Reward": "On training prompts, while exploring.",
    "Held-out evaluation": "Unseen prompts, the same seeds every time; step 0 is the base model.",
    "Loss and KL": "A policy-gradient loss near 0 is normal: advantages have mean 0. The KL is the distance from the base model.",
    "Ratio and clipping": "New over old probability: 1 before the first update. Clip fractions of a few percent are healthy.",
    "Health": "Rewards must keep differing within groups; pictures must stay like the base model's in what no reward looks at.",
    "Speed": "Per step; network evaluations (NFE) are per picture: of the rollout, of credit, of the replay.",
}
PANELS: dict[str, tuple[str, ...]] = {  # title -> charts: patterns of keys; & lays two over each other
    "Reward": ("reward/mean", "reward/.*"),
    "Held-out evaluation": ("eval/(?!diversity$|tonal$).*",),
    "Loss and KL": ("loss", "loss/.*", "kl", "grad_norm", "lr"),
    "Ratio and clipping": ("ratio/mean", "ratio/max_deviation", "ratio/std", "clip/low&clip/high"),
    "Health": ("spread/.*", "zero_spread/.*", "eval/diversity", "eval/tonal", "image/.*(?<!_std)"),
    "Speed": ("seconds", "seconds/.*", *FORWARDS, "nfe_backward", "reward_calls", "images"),
    "Others": ("(?!image/|base/).*",),
}

MAPS = {  # metrics of every denoising step -> title, and the value that means nothing happened
    "credit/size": ("credit/size", 0.0),
    "ratio/mean": ("ratio/mean − 1", 1.0),
    "ratio/std": ("ratio/std", 0.0),
    "clip/fraction": ("clip/fraction", 0.0),
}
BY_STEP = re.compile(rf"({'|'.join(MAPS)}|gain)/(\d+)")
STEPS_ADVICE = (
    "Step 0 starts from pure noise. Credit: mean size of the advantages; an empty cell was not trained. Gain: by how many standard "
    "deviations of a step's noise its mean moves when the network's prediction moves by 1; faint: never trained."
)

LIGHT = """--paper:#f6f7f9;--card:#fff;--ink:#1a1f26;--faint:#66707d;--rule:#e1e5ea;--a:#2563eb;--b:#d97706;
--good:#15803d;--bad:#c62828;--warn:#fff4e0;--warn-rule:#e8a33d"""
DARK = """--paper:#0f1216;--card:#181c22;--ink:#e6e9ed;--faint:#939dab;--rule:#2b313a;--a:#6ea2ff;--b:#f0a63c;--good:#4ade80;--bad:#ff7b72;
--warn:#2c2415;--warn-rule:#a87422"""
PAGE = """
body{margin:0 auto;max-width:1240px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
@media(max-width:560px){body{padding:20px 12px 40px}}
"""
PARTS = """*{box-sizing:border-box}
h1{font-size:26px;margin:0;line-height:1.2;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 2px}p{margin:0}.note{color:var(--faint)}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));margin-top:16px}
.panels{display:grid;column-gap:12px;grid-template-columns:repeat(4,1fr);align-items:end}section{min-width:0}
.charts{display:grid;gap:12px;margin-top:12px;grid-template-columns:repeat(var(--n),1fr)}.n1{--n:1}.n2{--n:2;grid-column:span 2}
.n3{--n:3;grid-column:span 3}.n4{--n:4;grid-column:span 4}
.steps{grid-column:1/-1}.steps .charts{grid-template-columns:repeat(3,1fr)}.wide{grid-column:span 2}
.card,.chart,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;margin:0;min-width:0}
.card b{display:block;font-size:21px;line-height:1.4;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums}
.card b i{font-style:normal;color:var(--faint);font-weight:400}.card span,.last{color:var(--faint);font-size:13px}
.card .up{color:var(--good)}.card .down{color:var(--bad)}
.chart header{display:flex;justify-content:space-between;gap:8px;font-size:14px;font-weight:600;overflow-wrap:anywhere}
.last{font-weight:400;white-space:nowrap}.chart svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}path{fill:none;stroke-width:2;stroke-linejoin:round}
.grid{stroke:var(--rule);stroke-width:1}.raw{stroke-width:1;opacity:.4}.a{stroke:var(--a)}.b{stroke:var(--b)}
.bar{fill:var(--a)}.faint{opacity:.3}.cells{shape-rendering:crispEdges}.cells .a{fill:var(--a);stroke:none}
.cells .b{fill:var(--b);stroke:none}.last i{display:inline-block;width:56px;height:9px;margin:0 6px;border:1px solid var(--rule)}
.scale{background:linear-gradient(90deg,transparent,var(--a))}.signed{background:linear-gradient(90deg,var(--b),transparent,var(--a))}
circle{fill:var(--card);stroke-width:2}.at rect{fill:transparent}.at circle{opacity:0}.at:hover circle{opacity:1}.key-a{color:var(--a)}
.key-b{color:var(--b);margin-left:8px}.key-a::before,.key-b::before{content:"● "}
.alarms{background:var(--warn);border:1px solid var(--warn-rule);border-radius:10px;padding:12px 16px;margin:16px 0 0;list-style:none}
.alarms li+li{margin-top:8px}.alarms li::before{content:"⚠ "}.calm{margin-top:16px;color:var(--good)}figure{margin-top:12px}
figure img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:4px}figcaption{color:var(--faint);margin-bottom:8px}
details{margin-top:12px}summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px;overflow-x:auto;
font:13px/1.45 ui-monospace,monospace}@media(max-width:1000px){.panels{grid-template-columns:1fr 1fr}.n3,.n4{--n:2;grid-column:span 2}
.steps .charts{grid-template-columns:1fr 1fr}}
@media(max-width:560px){.panels{grid-template-columns:minmax(0,1fr)}.n2,.n3,.n4{--n:1;grid-column:span 1}
.steps .charts{grid-template-columns:minmax(0,1fr)}.wide{grid-column:span 1;overflow-x:auto}.wide svg{width:720px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card b{font-size:17px}figure{overflow-x:auto}figure img{max-width:none;width:720px}}
"""
STYLE = f":root{{color-scheme:light dark;{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}{PAGE}{PARTS}"


def write(folder: Path) -> Path:
    """Make `report.html` from a run folder's metrics.jsonl, config.yaml and samples/*.png, the two last if they are there.

    Raises:
        UserError: no metrics.jsonl there.
    """
    folder = Path(folder)
    content = body(folder)
    path = folder / "report.html"
    new = path.with_suffix(".html.new")
    new.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_name(folder)} · visalign</title><style>{STYLE}</style></head><body>\n{content}\n</body></html>\n",
        encoding="utf-8",
    )
    return new.replace(path)


def body(folder: Path) -> str:
    """What stands in the report, for a page that has its style."""
    rows = tracking.read(folder)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    subtitle = _subtitle(overrides.read(config)) if text else ""
    newest, *older = samples(folder) or [""]
    parts = [
        f'<h1>{_name(folder)}</h1><p class="note">{escape(subtitle)}</p><div class="cards">{_cards(rows)}</div>{alarms(rows)}',
        f'<h2>Pictures</h2><p class="note">The same prompts and seeds, before and after.</p>{newest}' if newest else "",
        f"<details><summary>Earlier pictures ({len(older)})</summary>{''.join(older)}</details>" if older else "",
        f'<div class="panels">{_panels(rows)}</div>' if rows else '<p class="note">No steps yet: the curves begin with the first row.</p>',
        f"<h2>Recipe</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>" if text else "",
    ]
    return "\n".join(parts)


def _name(folder: Path) -> str:
    return escape(folder.resolve().name)


# --- key figures -------------------------------------------------------------------------------------------------------


def _subtitle(config: Mapping[str, Any]) -> str:
    """ "flow_grpo · toybox · rewards: verifier" as far as the recipe says so."""
    rewards = ", ".join(config.get("rewards") or {})
    parts = [config.get("trainer", {}).get("name"), config.get("policy", {}).get("model"), f"rewards: {rewards}" if rewards else None]
    return " · ".join(str(part) for part in parts if part)


def _cards(rows: Sequence[tracking.Row]) -> str:
    """Before → after of every held-out metric, then what it took."""
    cards: list[str] = []
    for key in metrics(rows):
        points = curve(rows, key)
        if key.startswith("eval/") and points:
            (first_step, first), (last_step, last) = points[0], points[-1]
            best_step, best = max(points, key=lambda point: point[1])
            tone = "up" if last > first else "down" if last < first else ""
            peak = f"<span> · best {number(best)} at step {best_step:g}</span>" if best_step not in (first_step, last_step) else ""
            scan = [value for name, value in rows[0].items() if name.startswith(f"base/{key}@")]
            peak += f"<span> · base at its best guidance {number(max(scan))}</span>" if scan else ""
            figures = f"<b><i>{number(first)} →</i> {number(last)}</b>" if len(points) > 1 else f"<b>{number(last)}</b>"
            cards.append(f'<span>{escape(key.removeprefix("eval/"))}</span>{figures}<span class="{tone}">{last - first:+.3g}</span>{peak}')
    seconds, pictures = (sum(value for _, value in curve(rows, key)) for key in ("seconds", "images"))
    spent = {name: sum(row.get("images", 0) * row.get(key, 0) for row in rows) for key, name in SPENT.items()}
    totals = {"steps": f"{rows[-1]['step']:.0f}" if rows else "0", "training time": _duration(seconds)}
    totals["training pictures"] = count(pictures)
    cards += [f"<span>{name}</span><b>{value}</b>" for name, value in totals.items()]
    parts = " · ".join(
        f"{name} {count(number)}".replace(" ", "\N{NO-BREAK SPACE}") for name, number in spent.items() if number and name != "reward calls"
    )
    forwards = sum(spent[SPENT[key]] for key in FORWARDS)
    cards.append(f"<span>network evaluations</span><b>{count(forwards)}</b><span>{parts}</span>")
    if pictures and spent["reward calls"]:
        each = f"{spent['reward calls'] / pictures:.3g} per training picture"
        cards.append(f"<span>reward calls</span><b>{count(spent['reward calls'])}</b><span>{each}</span>")
    return "".join(f'<div class="card">{card}</div>' for card in cards)


def alarms(rows: Sequence[tracking.Row]) -> str:
    """What the monitors say of a run."""
    found = monitors.alarms(rows)
    if found:
        return f'<ul class="alarms">{"".join(f"<li>{escape(alarm)}</li>" for alarm in found)}</ul>'
    evaluations = sum(any(key.startswith("eval/") for key in row) for row in rows)
    return f'<p class="calm">✓ No alarm in {len(rows)} rows, {evaluations} of them with an evaluation (a trend needs 4).</p>'


def samples(folder: Path, most: int = 8) -> list[str]:
    """Figures of a run's grids with the pictures inside, newest first; of many, an even choice that keeps the first and the newest."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]

    paths = sorted((folder / "samples").glob("*.png"), key=natural, reverse=True)
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


def _panels(rows: Sequence[tracking.Row]) -> str:
    left = plain(rows)
    mean = curve(rows, "reward/mean")  # a single reward is its own mean
    left = [key for key in left if not (key.startswith("reward/") and key != "reward/mean" and curve(rows, key) == mean)]
    return panels(left, lambda keys: [chart({key: curve(rows, key) for key in keys})], {"Health": _by_step(rows)})


def panels(left: Sequence[str], draw: Callable[[Sequence[str]], list[str]], before: Mapping[str, str] | None = None) -> str:
    """Metrics by what they tell.

    Args:
        left: their keys.
        draw: charts of keys that belong together.
        before: panel -> what stands before it.
    """
    found: list[str] = []
    for title, patterns in PANELS.items():
        found.append((before or {}).get(title, ""))
        drawn: list[str] = []
        for pattern in patterns:
            matches = [[key for key in left if re.fullmatch(part, key)] for part in pattern.split("&")]
            groups = [[key] for key in matches[0]] if len(matches) == 1 else [[key for match in matches for key in match]]
            drawn += [drawing for keys in groups if keys for drawing in draw(keys)]
            left = [key for key in left if not any(key in keys for keys in groups)]
        if drawn:
            head = f'<h2>{title}</h2><p class="note">{ADVICE.get(title, "")}</p>'
            found.append(f'<section class="n{min(len(drawn), 4)}">{head}<div class="charts">{"".join(drawn)}</div></section>')
    return "\n".join(found)


def _by_step(rows: Sequence[tracking.Row]) -> str:
    """What happened at each denoising step: heat-maps over training time, and the gain of the transition."""
    found: dict[str, dict[int, list[Point]]] = {name: {} for name in (*MAPS, "gain")}
    for match in filter(None, map(BY_STEP.fullmatch, metrics(rows))):
        if points := curve(rows, match[0]):
            found[match[1]][int(match[2])] = points
    gains = {step: points[-1][1] for step, points in sorted(found.pop("gain").items())}
    drawn: list[str] = []
    flat: list[str] = []
    for name, (title, usual) in MAPS.items():
        series = {step: [(time, value - usual) for time, value in points] for step, points in found[name].items()}
        if any(value for points in series.values() for _, value in points):
            drawn.append(heatmap(title, series, TWO_THIRDS if name == "credit/size" else THIRD))
        elif series:
            flat.append(title)
        if name == "credit/size" and gains:
            drawn.append(bars("gain |κ|/ς", gains, set().union(*found.values()), THIRD))
    if not drawn:
        return ""
    note = STEPS_ADVICE + (f" Not drawn, as they are 0 throughout: {', '.join(flat)}." if flat else "")
    return f'<section class="steps"><h2>Denoising steps</h2><p class="note">{note}</p><div class="charts">{"".join(drawn)}</div></section>'


def metrics(rows: Sequence[tracking.Row]) -> list[str]:
    """Keys in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def plain(rows: Sequence[tracking.Row]) -> list[str]:
    """Keys of curves: not those of single denoising steps, nor those without a value."""
    return [key for key in metrics(rows) if key != "step" and not BY_STEP.fullmatch(key) and curve(rows, key)]


def curve(rows: Sequence[tracking.Row], key: str) -> list[Point]:
    """(step, value) wherever a metric is finite."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
