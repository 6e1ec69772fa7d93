"""Each statistic sees what it is for and nothing else; each alarm rings on its own trouble and stays silent on a healthy run."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from visalign import monitors
from visalign.toybox import scenes


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """(48, 3, 64, 64) scenes."""
    rng = random.Random(0)
    records = [rng.choice(group) for group in scenes.prompts(True).values() for _ in range(8)]
    drawn = [scenes.to_array(scenes.render(scenes.lay_out(record, rng))) for record in records]
    return torch.stack([torch.tensor(array) for array in drawn]).permute(0, 3, 1, 2) / 255


def colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(2, 3, 32, 32)


def test_flat_colours_have_known_statistics() -> None:
    red = monitors.image_statistics(colour(1, 0, 0))
    assert red["luminance"] == pytest.approx(0.2126)
    assert red["saturation"] == pytest.approx(1)
    assert red["contrast"] == red["edges"] == red["entropy"] == red["dark"] == 0
    assert monitors.image_statistics(colour(0, 0, 0))["dark"] == 1
    assert monitors.image_statistics(colour(0.5, 0.5, 0.5))["saturation"] == 0


def test_edges_contrast_and_entropy_of_half_and_half() -> None:
    half = torch.zeros(1, 3, 32, 32)
    half[..., 16:] = 1
    found = monitors.image_statistics(half)
    assert found["contrast"] == pytest.approx(0.5, abs=1e-6)
    assert found["entropy"] == pytest.approx(1)
    assert found["edges"] == pytest.approx(2 / 30)
    assert found["dark"] == 0.5


def test_spread_over_pictures_is_reported_beside_every_mean(pictures: Tensor) -> None:
    found = monitors.image_statistics(pictures) | monitors.spectral(pictures)
    means = {name for name in found if not name.endswith("_std")}
    assert means == {"luminance", "saturation", "contrast", "dark", "edges", "entropy", "high_frequency", "peaks"}
    assert {name + "_std" for name in means} == set(found) - means
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(("period", "amplitude"), [(2, 0.02), (8, 0.06), (16, 0.12)])  # scenes have much energy near 1/16 of their own
def test_grids_raise_the_peaks(pictures: Tensor, period: int, amplitude: float) -> None:
    wave = torch.cos(2 * math.pi * torch.arange(64) / period)
    base = monitors.spectral(pictures)
    for pattern in (wave[None, :] + 0 * wave[:, None], wave[:, None] * wave[None, :]):
        gridded = monitors.spectral((pictures + amplitude * pattern).clamp(0, 1))
        assert gridded["peaks"] - base["peaks"] > 3 * base["peaks_std"]


def test_noise_raises_high_frequencies_without_peaks(pictures: Tensor) -> None:
    base = monitors.spectral(pictures)
    noisy = monitors.spectral((pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1))
    assert noisy["high_frequency"] > 3 * base["high_frequency"]
    assert noisy["peaks"] < base["peaks"] + base["peaks_std"]
    flat = monitors.spectral(colour(0.4, 0.4, 0.4))
    assert flat["high_frequency"] == pytest.approx(0, abs=1e-3)
    assert flat["peaks"] == pytest.approx(0, abs=1e-3)


def test_tonal_diversity_is_the_sum_of_three_spreads() -> None:
    assert monitors.tonal_diversity(colour(0.2, 0.6, 0.4)) == 0
    two = torch.cat([colour(0, 0, 0)[:1], colour(1, 0, 0)[:1]])  # saturation 0 and 1, value 0 and 1, contrast 0 and 0
    assert monitors.tonal_diversity(two) == pytest.approx(1)


def test_diversity_equals_the_pairwise_mean() -> None:
    embeddings = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([3, 3, 3, 9, 9, 4, 9])
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    expected = []
    for group in (3, 9):
        members = unit[groups == group]
        pairs = [(1 - a @ b).item() for i, a in enumerate(members) for b in members[i + 1 :]]
        expected.append(sum(pairs) / len(pairs))
    assert monitors.diversity(embeddings, groups) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert monitors.diversity(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)) == pytest.approx(0)
    assert math.isnan(monitors.diversity(embeddings, torch.arange(7)))


def test_vendi_counts_distinct_members() -> None:
    assert monitors.vendi(torch.ones(6, 4)) == pytest.approx(1)
    assert monitors.vendi(torch.eye(6)) == pytest.approx(6)
    assert monitors.vendi(torch.eye(3).repeat(2, 1)) == pytest.approx(3)


# --- alarms ------------------------------------------------------------------------------------------------------------


def run(**changes: float) -> list[dict[str, float]]:
    """A run of 100 steps with an evaluation every 20: each key goes linearly by its change, with a little noise."""
    rng = random.Random(0)
    start = {"reward/mean": 0.6, "reward/toybox": 0.6, "spread/toybox": 0.2, "zero_spread/toybox": 0.1}
    judged = {
        "eval/toybox": 0.5,
        "eval/second_judge": 0.5,
        "eval/diversity": 0.3,
        "eval/tonal": 0.2,
        "image/dark": 0.1,
        "image/dark_std": 0.1,
    }
    rows = []
    for step in range(101):
        known = (start if step else {}) | (judged if step % 20 == 0 else {})
        row = {key: value + changes.get(key, 0.0) * step / 100 + rng.gauss(0, 0.004) for key, value in known.items()}
        rows.append({"step": step} | row)
    return rows


RISE = {"reward/mean": 0.2, "reward/toybox": 0.2}


def test_no_alarm_on_a_healthy_run_or_without_rows() -> None:
    assert monitors.alarms([]) == []
    assert monitors.alarms(run(**RISE, **{"eval/toybox": 0.15, "eval/second_judge": 0.12})) == []
    assert monitors.alarms(run(**RISE)) == []  # held-out scores that only wobble
    assert monitors.alarms([{"step": 0, "eval/toybox": 0.5}]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (RISE | {"eval/toybox": 0.2, "eval/second_judge": -0.2}, ["Reward hacking", "eval/second_judge", "checkpoint"]),
        ({"spread/toybox": -0.19}, ["Reward spread", "spread/toybox", "quarter"]),
        ({"zero_spread/toybox": 0.6}, ["Groups without signal", "zero_spread/toybox", "50 %"]),
        ({"image/dark": 0.5}, ["Picture statistics", "image/dark", "z = +"]),
        ({"eval/diversity": -0.2}, ["Diversity", "eval/diversity", "half"]),
    ],
)
def test_every_alarm_rings_alone(changes: dict[str, float], words: list[str]) -> None:
    (alarm,) = monitors.alarms(run(**changes))
    assert all(word in alarm for word in words)
    assert "\n" not in alarm


def test_hacking_needs_a_rising_reward_and_two_of_several_judges() -> None:
    fall = {"eval/second_judge": -0.2}
    assert monitors.alarms(run(**fall)) == []
    third = [row | ({"eval/clip": 0.3} if "eval/toybox" in row else {}) for row in run(**RISE, **fall)]
    assert monitors.alarms(third) == []
    both = [row | ({"eval/clip": 0.3 - row["step"] / 500} if "eval/toybox" in row else {}) for row in run(**RISE, **fall)]
    assert "eval/second_judge" in monitors.alarms(both)[0]
    assert "eval/clip" in monitors.alarms(both)[0]


def test_failed_scores_and_missing_spreads_are_passed_over() -> None:
    rows = run(**RISE)
    rows[20]["eval/second_judge"] = math.nan
    rows[0].pop("image/dark_std")
    rows[100]["image/dark"] = 0.9
    assert monitors.alarms(rows) == []
