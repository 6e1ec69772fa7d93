"""What a run came to, in a few lines for the terminal."""

from __future__ import annotations

from pathlib import Path

from visalign import tracking


def text(folder: Path) -> str:
    """Before → after of every held-out judge, the base at its best guidance, time and pictures, and where to look."""
    rows = tracking.read(folder)
    judged = [row for row in rows if any(key.startswith("eval/") for key in row)]
    first, last = judged[0], judged[-1]
    images, minutes = sum(row.get("images", 0) for row in rows), sum(row.get("seconds", 0) for row in rows) / 60
    lines = [f"step {last['step']:.0f}: {images:,.0f} pictures, {minutes:.1f} minutes of training"]
    for key in [key for key in last if key.startswith("eval/") and key in first]:
        name = key.removeprefix("eval/")
        scan = {k.rpartition("@")[2]: v for k, v in first.items() if k.startswith(f"base/{key}@")}
        best = f"   (base at its best guidance {max(scan, key=scan.__getitem__)}: {max(scan.values()):.3f})" if scan else ""
        lines.append(f"  {name:<16} {first[key]:8.3f} → {last[key]:.3f}  {last[key] - first[key]:+.3f}{best}")
    grids = sorted((folder / "samples").glob("*.png"))
    lines.append(f"report: {folder / 'report.html'}" + (f"   before/after: {grids[-1]}" if grids else ""))
    return "\n".join(lines)
