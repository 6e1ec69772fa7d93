"""Training a reward: what is learnt, saved, resumed, measured, and what a recipe may say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from visalign import build, check, config, pictures, preferences, registry, tracking
from visalign.errors import UserError
from visalign.losses import bradley_terry
from visalign.preferences import Pair
from visalign.scoring import RewardInput
from visalign.trainers.reward_model import RewardModel, ordered, quality


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of noise of which the bright one is better; another judge thinks the contrary of one in four."""
    folder = tmp_path_factory.mktemp("bright")
    generator = torch.Generator().manual_seed(0)
    words, rows = ("star", "ring", "cross", "circle", "square", "triangle"), list[Pair]()
    for n in range(48):
        better = n // 2 % 2
        noise = torch.rand(2, 3, 64, 64, generator=generator) * 0.5
        noise[better] += 0.5
        files = pictures.save(noise, folder, [f"{n}_0", f"{n}_1"])
        other = (0.0, 1.0) if (better == 1) != (n % 4 == 0) else (1.0, 0.0)
        scores = {"light": (float(1 - better), float(better)), "other": other}
        rows.append(Pair(f"a {words[n % 6]} and a {words[n // 6 % 6]}", (files[0], files[1]), better, scores))
    preferences.write(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def recipe(path: Path, pairs: Path | None, model: str, **changes: Any) -> config.Config:
    data: dict[str, Any] = {
        "run": {"steps": 4, "path": str(path), "device": "cpu", "checkpoint_every": 2, "seed": 1},
        "eval": {"every": 2},
        "trainer": {"name": "reward_model", "checkpoint": model, "pairs": str(pairs) if pairs else None, "held_out": 0.3, "batch": 6},
        "optimizer": {"lr": 1e-3, "decay_steps": 40},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data.setdefault(section, {})[name] = value
    return config.parse(data)


def reward_model(given: config.Config) -> RewardModel:
    built = build.loop(given)
    assert isinstance(built, RewardModel)
    return built


def test_bradley_terry_and_ties_against_a_table() -> None:
    difference = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    expected = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(2))]
    torch.testing.assert_close(bradley_terry(difference), torch.tensor(expected, dtype=torch.float64))
    tied = torch.ones(3, dtype=torch.bool)
    win, lose, tie = (bradley_terry(d, t, 5.0).neg().exp() for d, t in ((difference, ~tied), (-difference, ~tied), (difference, tied)))
    torch.testing.assert_close(win + lose + tie, torch.ones(3, dtype=torch.float64))
    assert win[0].item() == pytest.approx(1 / 6)  # e^0 / (e^0 + 5 e^0)
    assert tie[0].item() == pytest.approx(24 / 36)


def test_quality_against_a_table() -> None:
    said = [(0, (1.0, 0.0)), (1, (0.0, 0.0)), (1, (math.nan, 1.0)), (0, (0.0, 1.0)), ("tie", (0.0, 1.0))]
    rows = [Pair("x", (Path(), Path()), better, {"a": scores, "b": scores}) for better, scores in said]  # pyright: ignore
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    better, worse, tied = ordered(rows, scores)
    assert (better[:4] - worse[:4]).tolist() == [2.0, 1.0, -1.0, 3.0]
    assert tied.tolist() == [False] * 4 + [True]
    found = quality(rows, scores)
    assert (found["accuracy"], found["error"]) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
    assert found["loss"] == pytest.approx(-F.logsigmoid(torch.tensor([2.0, 1.0, -1.0, 3.0])).mean().item())
    assert found["accuracy/a"] == pytest.approx(1 / 3), "of the first, the fourth and the fifth row, the first"


@pytest.mark.parametrize(("kind", "lora"), [("yes_token", None), ("yes_token", {"rank": 8, "alpha": 32}), ("head", None)])
def test_a_separable_set_is_learnt_and_the_saved_folder_is_the_reward(
    bright: Path, tiny_vlm: str, tmp_path: Path, kind: str, lora: dict[str, float] | None
) -> None:
    more: dict[str, Any] = {"trainer__kind": kind, "trainer__lora": lora, "trainer__ema": 0.5, "run__steps": 30, "optimizer__lr": 5e-3}
    trainer = reward_model(recipe(tmp_path, bright, "toybox/clip" if kind == "head" else tiny_vlm, eval__every=30, **more))
    trainer.fit()
    first, last = (row for row in tracking.read(tmp_path) if "eval/accuracy" in row)
    assert last["eval/accuracy"] >= 0.9, (first, last)
    assert last["eval/accuracy/light"] == last["eval/accuracy"]
    assert last["eval/accuracy/other"] < 1
    assert last["eval/loss"] < first["eval/loss"]
    assert (tmp_path / "report.html").is_file()
    folder, rows = str(tmp_path / "reward"), trainer.test_pairs[:3]
    loaded = registry.load_reward(*(["preference"] if kind == "head" else ["vlm_yes"]), checkpoint=folder)
    images = torch.stack([picture for pair in rows for picture in pair.load()])
    output = loaded.score(RewardInput(images, [pair.prompt for pair in rows for _ in range(2)]))
    with trainer.averaged(), torch.no_grad():
        expected = trainer.scorer(rows).flatten()
    torch.testing.assert_close(output.scores if kind == "head" else output.components["log_odds"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["yes_token", "head"])
def test_four_steps_are_two_and_two_to_the_bit(bright: Path, tiny_vlm: str, tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"trainer__kind": kind, "trainer__ema": 0.9, "trainer__micro_batch": 4}
    model = "toybox/clip" if kind == "head" else tiny_vlm
    build.loop(recipe(tmp_path / "once", bright, model, **more)).fit()
    build.loop(recipe(tmp_path / "twice", bright, model, run__steps=2, **more)).fit()
    build.loop(recipe(tmp_path / "twice", bright, model, **more)).fit()
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in tracking.read(tmp_path / name)] for name in ("once", "twice")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3, 4]
    for stem in ("trainable", "average"):
        a, b = (load_file(tmp_path / name / "checkpoints" / "step_4" / f"{stem}.safetensors") for name in ("once", "twice"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_is_both_terms_whatever_the_micro_batch(bright: Path, tiny_vlm: str, tmp_path: Path) -> None:
    rows = []
    for size in (6, 2):
        trainer = reward_model(recipe(tmp_path / str(size), bright, tiny_vlm, trainer__cross_entropy=0.3, trainer__micro_batch=size))
        batch = preferences.drawn(trainer.train_pairs, 6, 1, 1)
        with torch.no_grad():
            better, worse, _ = ordered(batch, trainer.scorer(batch))
        expected = (-F.logsigmoid(better - worse) - 0.3 * (F.logsigmoid(better) + F.logsigmoid(-worse))).mean()
        rows.append(trainer.step(1))
        assert rows[-1]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)


def test_ties_are_left_out_or_trained(bright: Path, tmp_path: Path) -> None:
    rows = preferences.read(bright)
    mixed = [Pair(p.prompt, p.images, "tie" if n % 2 else p.better) for n, p in enumerate(rows)]
    preferences.write(tmp_path / "pairs.jsonl", mixed)
    common: dict[str, Any] = {"trainer__kind": "head"}
    without, with_ties = (
        reward_model(recipe(tmp_path / str(k), tmp_path / "pairs.jsonl", "toybox/clip", trainer__ties=k, **common)) for k in (None, 5.0)
    )
    assert len(with_ties.train_pairs) + len(with_ties.test_pairs) == 48
    assert len(without.train_pairs) + len(without.test_pairs) == 24
    assert math.isfinite(with_ties.step(1)["loss"])


def test_pairs_are_made_and_labelled_by_a_recipe(tiny_sd3: Path, tiny_vlm: str, bright: Path, tmp_path: Path) -> None:
    drawing = {"policy__model": str(tiny_sd3), "policy__steps": 2, "policy__options": {"max_sequence_length": 10}, "policy__lora": None}
    given = recipe(tmp_path / "made", None, "toybox/clip", **drawing, rewards__jpeg=1.0, trainer__kind="head", trainer__make=24)
    row = build.loop(given).step(1)
    assert row["images"] == 12
    found = preferences.read(tmp_path / "made" / "pairs" / "pairs.jsonl")
    assert len(found) >= 24
    assert json.loads((tmp_path / "made" / "pairs" / "made_by.json").read_text())["rewards"]["jpeg"]["use"] == "jpeg"
    unsaid = tmp_path / "unsaid" / "pairs.jsonl"
    preferences.write(unsaid, [Pair(p.prompt, p.images, None if n > 1 else p.better) for n, p in enumerate(preferences.read(bright))])
    aspects = {f"rewards__{a}": {"use": "vlm_rating", "checkpoint": tiny_vlm, "aspects": [a]} for a in ("aesthetic", "fidelity")}
    with pytest.raises(UserError, match=r'pairs.jsonl, row 3: no label; say which is "better", or set trainer.label=true'):
        build.loop(recipe(tmp_path / "no", unsaid, "toybox/clip", trainer__kind="head"))
    with pytest.raises(UserError, match=r"trainer\.label=true asks the recipe's rewards, and there are none"):
        build.loop(recipe(tmp_path / "no", unsaid, "toybox/clip", trainer__kind="head", trainer__label=True))
    labelled = reward_model(recipe(tmp_path / "yes", unsaid, "toybox/clip", trainer__kind="head", trainer__label=True, **aspects))
    assert set(labelled.train_pairs[-1].scores) == {"aesthetic", "fidelity"}
    assert {"eval/accuracy/aesthetic", "eval/accuracy/fidelity"} <= set(labelled.judge(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__ties": 1.0}, "trainer.ties=1: expected above 1"),
        ({"trainer__kind": "heads"}, "trainer.kind: expected 'yes_token' or 'head'"),
        ({"trainer__hiden": 3}, "trainer.hiden is unknown; did you mean hidden"),
        ({"trainer__held_out": 1.0}, "leaves none of 48 pairs to train on"),
        ({"trainer__checkpoint": "no/such/model"}, "cannot be loaded|no such folder"),
        ({"optimizer__lr": 0.0}, "optimizer.lr=0"),
    ],
)
def test_what_cannot_be_trained_is_one_line(bright: Path, tiny_vlm: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build.loop(recipe(tmp_path, bright, tiny_vlm, **changes))


def test_there_is_no_policy_to_check_or_export(tmp_path: Path) -> None:
    given = config.load("toybox_reward_model", [f"run.path={tmp_path}"])
    with pytest.raises(UserError, match="reward_model trains no policy: nothing to check, evaluate or export"):
        next(check.run(given))
    build.write_config(given)
    with pytest.raises(UserError, match="trains no policy"):
        build.restore(tmp_path, torch.device("cpu"))


def test_the_packaged_recipe_takes_a_step(tiny_vlm: str, tmp_path: Path) -> None:
    words = [f"run.path={tmp_path}", "run.device=cpu", f"trainer.checkpoint={tiny_vlm}", "trainer.make=12", "trainer.batch=4"]
    row = build.loop(config.load("toybox_reward_model", [*words, "eval.batch=24", "trainer.held_out=0.4"])).step(1)
    assert 0 < row["grad_norm"] < 1e3
    assert row["loss"] < 2
