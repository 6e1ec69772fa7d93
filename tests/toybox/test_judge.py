"""The second judge: agrees with the truth on both renderers, refuses what is no shape, and stays out of training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.scoring import RewardInput
from visalign.toybox import build_judge, scenes
from visalign.toybox.build_judge import as_scene, random_scenes, render_smooth
from visalign.toybox.judge import Detector, SecondJudge


@pytest.fixture(scope="module")
def judge() -> SecondJudge:
    return SecondJudge()


@pytest.fixture(scope="module")
def world() -> tuple[dict[str, Tensor], list[scenes.Metadata], list[list[scenes.Object]]]:
    rng = random.Random(8)
    records = [rng.choice(scenes.prompts(n % 2 == 1)[scenes.KINDS[n // 2 % 6]]) for n in range(240)]
    layouts = [scenes.lay_out(record, rng) for record in records]
    plain = torch.stack([torch.from_numpy(scenes.to_array(scenes.render(layout)).copy()).permute(2, 0, 1) / 255 for layout in layouts])
    return {"plain": plain, "smooth": render_smooth(as_scene(layouts), torch.Generator().manual_seed(0))}, records, layouts


def scores(judge: SecondJudge, images: Tensor, records: list[scenes.Metadata]) -> Tensor:
    return judge.score(RewardInput(images, [scenes.describe(r) for r in records], list(records))).scores


@pytest.mark.parametrize("renderer", ["plain", "smooth"])
def test_true_prompts_pass_and_altered_ones_do_not(judge: SecondJudge, world: tuple, renderer: str) -> None:
    images, records, layouts = world[0][renderer], world[1], world[2]
    assert scores(judge, images, records).mean() >= 0.95
    rng = random.Random(9)
    altered = [scenes.alter(record, rng)[1] for record in records]
    false = [n for n, layout in enumerate(layouts) if not scenes.meets(layout, altered[n])[0]]
    assert scores(judge, images[false], [altered[n] for n in false]).mean() <= 0.01


def test_nothing_is_seen_in_nothing(judge: SecondJudge) -> None:
    blank = torch.full((2, 3, 64, 64), 128 / 255)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert judge.perceive(blank) == [[], []]
    assert scores(judge, torch.cat([blank, noise]), [{"include": [{"class": "circle", "count": 1}]}] * 4).tolist() == [0, 0, 0, 0]


def test_most_melted_shapes_are_unknown(judge: SecondJudge) -> None:
    scene = random_scenes(200, torch.Generator().manual_seed(3))
    images = render_smooth(scene, torch.Generator().manual_seed(4))
    melted = scene["present"] & (scene["shape"] == build_judge.UNKNOWN)
    taken = 0
    for n, found in enumerate(judge.perceive(images)):
        for slot in melted[n].nonzero()[:, 0].tolist():
            x, y = scene["x"][n, slot], scene["y"][n, slot]
            taken += any(o.shape != "unknown" and (o.x - x) ** 2 + (o.y - y) ** 2 < 25 for o in found)
    assert taken / melted.sum() < 0.25


def test_unreadable_prompts_are_invalid_and_the_judge_is_held_out(judge: SecondJudge) -> None:
    output = judge.score(RewardInput(torch.rand(2, 3, 96, 96), ["a dog", "a circle"]))
    assert output.valid.tolist() == [False, True]
    assert SecondJudge.held_out_only


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        SecondJudge(str(tmp_path))


def test_the_smooth_renderer_draws_the_same_scene_in_another_way(world: tuple) -> None:
    plain, smooth = world[0]["plain"], world[0]["smooth"]
    difference = (plain - smooth).abs().mean((1, 2, 3))
    assert difference.max() < 0.12
    assert difference.min() > 0.005


def test_building_trains_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_judge, "STEPS", 2)
    monkeypatch.setattr(build_judge, "BATCH", 4)
    for _ in range(2):  # the second time there is nothing left to train
        build_judge.build(tmp_path / "out", tmp_path / "work", torch.device("cpu"))
    fresh = SecondJudge(str(tmp_path / "out" / "judge"))
    assert isinstance(fresh.network, Detector)
    assert sum(p.numel() for p in fresh.network.parameters()) < 400_000
