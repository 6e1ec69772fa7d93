"""Noise optimisation over a list of prompts: what is written, resumed, split and refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.toy_rewards import Closeness
from visalign import backprop, build, config, pictures, sampling, summary, tracking
from visalign.errors import UserError
from visalign.scoring import RewardInput, RewardOutput
from visalign.trainers.noise_optimization import NoiseOptimization

ASKED: Counter[str] = Counter()


class Killed(BaseException):
    pass


class Fragile(Closeness):
    """Closeness that counts what it is asked about, and kills the process at the `dies`-th call."""

    def __init__(self, dies: int = 0):
        super().__init__()
        self.dies, self.calls = dies, 0

    def score(self, batch: RewardInput) -> RewardOutput:
        self.calls += 1
        if self.calls == self.dies:
            raise Killed
        ASKED.update(batch.prompts)
        return super().score(batch)


def recipe(path: Path, **changes: Any) -> config.Config:
    prompts = path / "prompts.txt"
    prompts.write_text("\n".join(f"point {n}" for n in range(7)))
    data: dict[str, Any] = {
        "run": {"path": str(path / "run"), "device": "cpu", "seed": 2},
        "policy": {"model": "toy:mixture", "lora": None, "steps": 4},
        "prompts": {"train": str(prompts), "test": str(prompts)},
        "rewards": {"close": {"use": "tests.toy_rewards:Closeness"}},
        "eval": {"images": 7, "grid": 4, "rewards": {"judge": {"use": "tests.toy_rewards:Closeness", "weight": 1}}},
        "trainer": {"name": "noise_optimization", "iterations": 6, "batch": 3, "lr": 1.0, "max_grad_norm": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    return config.parse(data)


def loop(given: config.Config) -> NoiseOptimization:
    built = build.loop(given)
    assert isinstance(built, NoiseOptimization)
    return built


def test_a_run_writes_noise_picture_trace_and_scores(tmp_path: Path) -> None:
    trainer = loop(recipe(tmp_path))
    run = trainer.fit()
    policy, asked = trainer.session.policy, trainer.prompts
    plain = sampling.pictures(policy, asked, steps=4, seed=2)
    for number, text in enumerate(asked.texts):
        stem = run / "found" / f"{number:05d}"
        record, noises = json.loads(stem.with_suffix(".json").read_text()), load_file(stem.with_suffix(".safetensors"))
        assert record["prompt"] == text
        assert len(record["trace"]["reward/mean"]) == 6
        assert record["after"]["judge"] == pytest.approx(max(record["trace"]["reward/mean"]), abs=1e-6)
        assert record["after"]["judge"] > record["before"]["judge"]
        again = policy.family.decode(backprop.denoise(policy, noises["best"][None], policy.family.encode([text]), steps=4))[0]
        assert torch.allclose(pictures.load(stem.with_suffix(".png")), again, atol=0.003)
        assert torch.allclose(pictures.load(run / "found" / "before" / stem.with_suffix(".png").name), plain[number], atol=0.003)
    rows = tracking.read(run)
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["eval/judge"] > rows[0]["eval/judge"] + 0.5
    assert all(a["reward/best"] <= b["reward/best"] for a, b in pairwise(rows))
    assert sum(row["nfe"] for row in rows) == pytest.approx(6 * 4 + 5 * 4)
    assert (run / "report.html").is_file()
    assert (run / "samples" / "step_00005.png").is_file()
    assert "judge" in summary.text(run)


def test_a_run_that_was_killed_does_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    whole = loop(recipe(tmp_path, run__path=str(tmp_path / "whole"), rewards__close={"use": f"{__name__}:Fragile"})).fit()
    ASKED.clear()
    given = recipe(tmp_path, rewards__close={"use": f"{__name__}:Fragile"})
    first = loop(given)
    first.session.rewards.rewards["close"].dies = 10  # pyright: ignore[reportAttributeAccessIssue]  # in the second batch
    with pytest.raises(Killed):
        first.fit()
    done = [n for n in range(7) if first.store.has(n)]
    assert done == [0, 1, 2]
    before = dict(ASKED)
    second = loop(given)
    second.fit()
    assert all(ASKED[second.prompts.texts[n]] == before[second.prompts.texts[n]] for n in done), "asked about again"
    for n in range(7):
        one, two = (load_file(run / "found" / f"{n:05d}.safetensors") for run in (whole, given.run.path))
        assert torch.equal(one["noise"], two["noise"])
        assert torch.allclose(one["best"], two["best"], atol=1e-5)
    assert len(tracking.read(given.run.path)) == 6


def test_processes_split_the_prompts(tmp_path: Path) -> None:
    for rank in range(2):
        trainer = loop(recipe(tmp_path))
        trainer.processes.rank, trainer.processes.count, trainer.processes.main = rank, 2, False
        trainer.fit()
        assert [n for n in range(7) if trainer.store.has(n)] == ([0, 2, 4, 6] if rank == 0 else list(range(7)))
    row = tracking.read(loop(recipe(tmp_path)).fit())[-1]
    assert row["images"] == 7


def test_a_folder_with_results_is_not_mixed_with_others(tmp_path: Path) -> None:
    loop(recipe(tmp_path, eval__images=2)).fit()
    with pytest.raises(UserError, match="already holds 2 results"):
        loop(recipe(tmp_path, run__resume="never"))
    with pytest.raises(UserError, match="results of another recipe"):
        loop(recipe(tmp_path, trainer__lr=2.0))
    assert loop(recipe(tmp_path, eval__images=3)).fit().is_dir(), "more pictures of the same recipe go on"


def test_rewards_without_gradient_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    given = {"policy__model": "nowhere/to/be/found", "rewards__toybox": {"use": "toybox"}}
    with pytest.raises(UserError, match=r"rewards\.toybox: toybox has no gradient, which noise_optimization follows"):
        build.loop(recipe(tmp_path, **given))
    inside = {"use": "geometric", "of": {"clip_score": 1.0, "seen": {"use": "jpeg"}}}
    with pytest.raises(UserError, match=r"rewards\.close\.of\.seen: jpeg has no gradient"):
        build.loop(recipe(tmp_path, policy__model="nowhere/to/be/found", rewards__close=inside))
    for changes in ({"trainer__gradient": "antithetic"}, {"rewards__toybox": {"use": "toybox", "weight": 0}}):
        with pytest.raises(UserError, match="nowhere"):
            build.loop(recipe(tmp_path, **given | changes))


def test_the_packaged_recipe_runs(tmp_path: Path) -> None:
    words = [f"run.path={tmp_path}", "run.device=cpu", "trainer.iterations=3", "trainer.batch=2", "eval.images=2"]
    rows = tracking.read(build.loop(config.load("toybox_noise_optimization", words)).fit())
    assert rows[-1]["reward/best"] > rows[0]["reward/best"]
    assert abs(rows[-1]["noise/length"] - rows[0]["noise/length"]) < 1
