"""Scales, averages and heat-maps of a report's drawings."""

from __future__ import annotations

import math
import re

import pytest

from visalign import charts


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.5", "1.0"]),
        (0.9998, 1.0002, ["0.9998", "0.9999", "1.0000", "1.0001", "1.0002"]),
        (0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        (0, 40_000, ["0", "10 k", "20 k", "30 k", "40 k"]),
        (-5, 5, ["-5", "0", "5"]),
    ],
)
def test_axis_labels(low: float, high: float, labels: list[str]) -> None:
    found = [label for _, label in charts.Axis([low, high], 0, 100, 0).ticks(4)]
    assert found == labels


def test_a_constant_curve_has_an_axis() -> None:
    for value in (0.0, 3.0, -2e-5):
        axis = charts.Axis([value], 100, 0, 0.06)
        assert axis(value) == pytest.approx(50)
        assert axis.ticks(4)


def test_smoothing_does_not_lag_and_binning_keeps_the_mean() -> None:
    line = [(float(n), 2.0 * n) for n in range(100)]
    assert [value for _, value in charts.smoothed(line)] == pytest.approx([value for _, value in line])
    binned = charts.binned(line, 30)
    assert len(binned) <= 30
    assert sum(value for _, value in binned[:-1]) / (len(binned) - 1) == pytest.approx(2 * sum(range(96)) / 96)


def cells(drawing: str) -> list[tuple[str, ...]]:
    """(colour, x, y, width, opacity, denoising step, when, mean) of a heat-map's cells."""
    place = r'x="(\S+)" y="(\S+)" width="(\S+)" height="\S+" opacity="(\S+)"'
    pattern = rf'<rect class="(.)" {place}><title>m, denoising step (\d+), ([^:]*): ([^<]*)<'
    return re.findall(pattern, drawing)


def test_a_heatmap_places_means_over_time() -> None:
    drawn = cells(charts.heatmap("m", {0: [(float(n), n % 2) for n in range(1, 97)], 3: [(1.0, -0.25), (2.0, math.pi)]}))
    assert len(drawn) == 48 + 1
    colours, x, y, width, opacity, steps, when, means = zip(*drawn, strict=True)
    assert set(means[:-1]) == {"0.5"}
    assert means[-1] == f"{(math.pi - 0.25) / 2:.5g}"
    assert when[0] == when[-1] == "steps 1 to 2"
    assert when[47] == "steps 95 to 96"
    assert steps == ("0",) * 48 + ("3",)
    assert x[0] == x[-1] == str(float(charts.LEFT))
    assert float(x[47]) + float(width[47]) == pytest.approx(charts.WIDTH - charts.RIGHT)
    assert all(float(a) + float(w) == pytest.approx(float(b)) for a, w, b in zip(x[:47], width[:47], x[1:48], strict=True))
    assert float(y[0]) < float(y[-1]), "the first denoising step is on top"
    assert opacity[-1] == "1.00"
    assert set(colours) == {"a"}


def test_a_heatmap_tells_signs_and_zero_from_nothing() -> None:
    drawing = charts.heatmap("m", {1: [(5.0, -2e-6), (7.0, 1e-6), (8.0, 0.0)]})
    found = [(colour, opacity, when) for colour, *_, opacity, _, when, _ in cells(drawing)]
    assert found == [("b", "1.00", "step 5"), ("a", "0.53", "step 7"), ("a", "0.06", "step 8")]
    assert "-2e-06<i" in drawing


def test_bars_start_at_zero() -> None:
    drawing = charts.bars("gain", {0: 1.0, 2: 4.0}, {2})
    heights = [float(found) for found in re.findall(r'height="([^"]*)"><title>', drawing)]
    assert heights[1] == pytest.approx(4 * heights[0]) == charts.HEIGHT - charts.BOTTOM - charts.TOP
    assert drawing.count("faint") == 1
    assert "gain, denoising step 2: 4<" in drawing


def test_a_titled_chart_tells_its_curves_apart_by_colour() -> None:
    drawing = charts.chart({"a <b>": [(1.0, 2.0), (9.0, 3.0)], "c": [(1.0, 5.0)]}, width=480, title="loss <x>", unit="at NFE")
    assert '<div>loss &lt;x&gt;</div><span class="last"><span class="key-a">3</span> <span class="key-b">5</span></span>' in drawing
    assert "<title>a &lt;b&gt;, at NFE 9: 3</title>" in drawing
    assert 'viewBox="0 0 480 160"' in drawing
