"""What the demo's pieces look like: pictures as data, and the style that they share with run reports.

Pictures travel inside the answer to the visitor who asked for them, as data, not as files on the server that others might open.
"""

from __future__ import annotations

import base64
import io
from html import escape

import torch
from torch import Tensor

from visalign import pictures, report

SMALL = 160  # pixels: smaller pictures are shown with their pixels sharp
LARGE = 512  # pixels: larger ones are sent compressed with losses
RAMP = ((18, 14, 54), (86, 20, 110), (172, 42, 98), (235, 96, 56), (252, 178, 50), (252, 250, 160))  # dark to bright, for maps
COVER = 0.72  # of a picture that its map hides

STYLE = """
.hint{border:1px dashed var(--rule);border-radius:10px;padding:36px 20px;text-align:center;color:var(--faint)}
.hint b{display:block;color:var(--ink);font-size:17px;margin-bottom:4px}
.state{display:flex;align-items:center;gap:12px;color:var(--faint);font-variant-numeric:tabular-nums;min-height:24px}
.state .rail{flex:1;max-width:220px}.rail,.rail i{display:block;height:8px;border-radius:4px;background:var(--rule)}
.rail i{background:var(--a)}
.pairs{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr))}.pairs figure{margin:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:10px}.two img,.one img{width:100%}
.two span,.one span{display:block;text-align:center;color:var(--faint);font-size:13px;margin-top:4px}
img{display:block;border-radius:6px;background:var(--rule)}.sharp{image-rendering:pixelated}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 8px;border-bottom:1px solid var(--rule);overflow-wrap:break-word}
th{color:var(--faint);font-weight:500;font-size:13px}th:first-child,td:first-child{text-align:left}
h1,h2{font-weight:650}.pair h2{margin-top:20px}.pair .key-b{margin-left:0}
figure .note,.chart+.note{font-size:13px;margin-top:8px}
@media(max-width:560px){th,td{padding:5px 3px}.badge{margin-left:2px;padding:1px 5px}}
.up{color:var(--good)}.down{color:var(--bad)}.badge{color:var(--faint);font-size:12px;border:1px solid var(--rule);
border-radius:99px;padding:1px 8px;margin-left:6px;white-space:nowrap}
.ranking{display:grid;gap:12px;margin-top:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.ranking figure{margin:0}.ranking header{display:flex;gap:8px;align-items:baseline;margin-bottom:8px}
.ranking header b{font-size:19px}.ranking header i{margin-left:auto;font-style:normal;font-weight:650}
.ranking header span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--faint)}
.meter{display:grid;grid-template-columns:92px 1fr 62px;gap:8px;align-items:center;font-size:13px;margin-top:5px}
.meter span{overflow:hidden;text-overflow:ellipsis}.meter span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.notice{background:var(--warn);border:1px solid var(--warn-rule);border-radius:10px;padding:10px 14px;margin-top:12px}
.pair{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
"""
CSS = (
    f".visalign{{{report.LIGHT}}}.dark .visalign{{{report.DARK}}}"
    f".visalign{{color:var(--ink);font:15px/1.5 system-ui,sans-serif;{report.PARTS}{STYLE}}}"
    "#state .wrap{overflow:visible;height:100%}"  # Gradio's word on the queue, else cut off
    ".head h1{margin-bottom:2px}.about p{font-size:13px;opacity:.75}"
)


def framed(content: str) -> str:
    """HTML in the demo's style."""
    return f'<div class="visalign">{content}</div>'


def hint(title: str, text: str) -> str:
    """What stands where nothing is yet."""
    return framed(f'<div class="hint"><b>{escape(title)}</b>{escape(text)}</div>')


def progress(text: str, share: float | None = None) -> str:
    """What is going on, and how much of it is done, in [0, 1]."""
    rail = "" if share is None else f'<div class="rail"><i style="width:{share:.1%}"></i></div>'
    return framed(f'<div class="state">{rail}<span>{escape(text)}</span></div>')


def picture(image: Tensor, text: str) -> str:
    """(3, H, W), or a video (F, 3, H, W), in [0, 1] as an <img> that needs no file; `text` says what it shows."""
    side, buffer = max(image.shape[-2:]), io.BytesIO()
    kind, options = ("PNG", {}) if side <= LARGE else ("WEBP", {"quality": 90})
    pictures.write(image, buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    sharp = ' class="sharp"' if side <= SMALL else ""
    return f'<img{sharp} decoding="sync" alt="{escape(text)}" src="data:image/{kind.lower()};base64,{data}">'


def over(image: Tensor, dense: Tensor, low: float, high: float) -> Tensor:
    """(3, H, W): a map (h, w) laid over a picture (3, H, W) in grey, dark at `low` and bright at `high`."""
    share = ((dense.float() - low) / max(high - low, 1e-9)).clamp(0, 1)[None, None]
    share = torch.nn.functional.interpolate(share, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    ramp = torch.tensor(RAMP, dtype=torch.float32) / 255
    place = share * (len(ramp) - 1)
    first = place.long().clamp(max=len(ramp) - 2)
    colour = torch.lerp(ramp[first], ramp[first + 1], (place - first)[..., None]).permute(2, 0, 1)
    return torch.lerp(image.mean(0, keepdim=True).expand_as(image), colour, COVER)


def number(value: float | None) -> str:
    """A score, or a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.3g}"
