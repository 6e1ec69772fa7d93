"""The toybox's DINO: what its training sees and asks for, and that what it saves loads like any other checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from visalign.toybox import build_dino, scenes
from visalign.vision import load_vision_encoder


def test_two_layouts_hold_the_same_objects_and_patches_know_what_covers_them() -> None:
    data = build_dino.pairs(12, seed=3)
    assert tuple(data.images.shape) == (12, 2, 3, 64, 64)
    assert not torch.equal(data.images[:, 0], data.images[:, 1])
    for shares in (data.colours, data.shapes):
        torch.testing.assert_close(shares.sum(-1), torch.ones(12, 2, 64))
    ground = data.colours[..., -1].mean(-1)
    torch.testing.assert_close(data.shapes[..., -1].mean(-1), ground, atol=0.03, rtol=0)  # other colours, other soft edges
    lone = int(data.single.nonzero()[0])
    shape, colour = data.first[lone].tolist()
    for shares, number in ((data.colours, colour), (data.shapes, shape)):
        inked = shares[lone, :, :, :-1].sum((0, 1))
        assert inked[number] / inked.sum() > 0.8
    assert data.single.sum() == sum(n % 6 in (0, scenes.KINDS.index("colors")) for n in range(12))


def test_contrastive_targets_are_three_to_one_for_the_same_picture() -> None:
    first, second = (F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    logits = first @ second.T / build_dino.TEMPERATURE
    expected = 0.0
    for n in range(6):
        for table in (logits, logits.T):
            log_share = table[n].log_softmax(0)
            expected -= (0.75 * log_share[n] + 0.25 * log_share[n ^ 1]).item() / 12
    assert build_dino.contrastive(first, second).item() == pytest.approx(expected)


def test_composition_is_least_where_the_shares_are_told() -> None:
    wanted = torch.rand(2, 4, 18).view(2, 4, 2, 9).softmax(-1)
    entropy = torch.special.entr(wanted).sum(-1).mean((0, 1)).sum()
    torch.testing.assert_close(build_dino.composition(wanted.log().flatten(2), wanted.flatten(2)), entropy)


def test_a_probe_reads_what_is_linear() -> None:
    y = torch.arange(9).repeat(20)
    x = F.one_hot(y, 9).float() @ torch.randn(9, 16) + 0.01 * torch.randn(180, 16)
    assert build_dino.probe(x[:90], y[:90], x[90:], y[90:]) == 1


def test_building_trains_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 2, "BATCH": 4, "RECORDS": 6, "MEASURED": (24, 64)}.items():
        monkeypatch.setattr(build_dino, name, value)
    for _ in range(2):  # the second time there is nothing left to train
        build_dino.build(tmp_path / "out", tmp_path / "work", torch.device("cpu"))
    encoder = load_vision_encoder(str(tmp_path / "out" / "dino"))
    assert sum(p.numel() for p in encoder.parameters()) < 1_000_000
    seen = encoder.encode(torch.rand(2, 3, 64, 64))
    assert (tuple(seen.image.shape), tuple(seen.patches.shape), seen.grid) == ((2, 96), (2, 64, 96), (8, 8))
    quality = json.loads((tmp_path / "out" / "dino" / "quality.json").read_text())
    assert all(math.isfinite(value) for value in quality.values())
    assert {"retrieval_1_of_64", "probe_shape", "probe_colour", "patch_shapes", "patch_colours"} <= quality.keys()
