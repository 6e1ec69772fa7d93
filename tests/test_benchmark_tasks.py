"""The benchmarks of a subject and of a condition: their judges on drawn scenes, and their pages from hand-made results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import condition, everything, records, subject
from tests.test_benchmarks import MACHINE, row_of, run
from visalign import prompts
from visalign.rewards.condition import Condition
from visalign.scoring import RewardInput
from visalign.toybox import scenes, styles


def drawn(text: str, style: str) -> RewardInput:
    record = scenes.parse(text)
    assert record is not None
    return RewardInput(styles.drawn(text, record, 2, style=style), [text] * 2, [record] * 2)


@pytest.mark.parametrize(
    ("text", "style", "following", "second", "exactly"),
    [
        ("a red star and a blue ring", "sparkle", 1, 1, 1),
        ("a red star and a blue ring", "plain", 1, 1, 0),
        ("three stars", "sparkle", 1, 1, 1),
        ("a star above a cross", "sparkle", 1, None, 1),
        ("a square", "plain", 1, 1, 1),
    ],
)
def test_what_follows_the_prompt_but_for_the_stars_shape(text: str, style: str, following: int, second: int | None, exactly: int) -> None:
    batch = drawn(text, style)
    judges = {"following": {}, "second": {"judge": "second"}, "exactly": {"exactly": True}}
    said = {name: subject.Following(**options).score(batch).scores.tolist() for name, options in judges.items()}
    assert said["following"] == [following] * 2
    assert said["exactly"] == [exactly] * 2
    if second is None:
        assert all(value != value for value in said["second"]), "the subject looks like a cross to it, and the prompt names one"
    else:
        assert said["second"] == [second] * 2


@pytest.mark.parametrize("wrong", ["a red star and a green ring", "a red star and a blue circle", "two red stars", "a red star"])
def test_what_does_not_follow_is_refused_whatever_the_stars_shape(wrong: str) -> None:
    shown = drawn("a red star and a blue ring", "sparkle")
    record = scenes.parse(wrong)
    assert record is not None
    asked = RewardInput(shown.images, [wrong] * 2, [record] * 2)
    for options in ({}, {"judge": "second"}, {"exactly": True}):
        assert subject.Following(**options).score(asked).scores.tolist() == [0, 0]  # pyright: ignore[reportArgumentType]


def test_halves_share_no_objects(tmp_path: Path) -> None:
    sides = [prompts.load(file) for file in subject.halves(tmp_path)]
    names = [{frozenset(str(c) for c in _objects(record)) for record in side.metadata} for side in sides]
    assert not names[0] & names[1]
    assert sum(map(len, sides)) == len(prompts.load("toybox/star_test.jsonl"))
    assert {record["tag"] for record in sides[0].metadata} == {record["tag"] for record in sides[1].metadata}


def _objects(record: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(clause["class"], clause["count"], clause.get("color", "")) for clause in record["include"]]


def test_the_page_of_a_subject(tmp_path: Path) -> None:
    def judged(likeness: float) -> dict[str, float]:
        return dict.fromkeys(subject.JUDGES, 0.5) | {"likeness": likeness}

    for seed in range(2):
        curve = [{"step": step} | judged(0.5) | {"harmonic": value} for step, value in ((0, 0.7), (20, 0.8), (40, 0.75))]
        tested = {"before": judged(0.5), "best": judged(0.7 + 0.02 * seed), "last": judged(0.8)}
        head = {"seed": seed, "steps": 40, "best_step": 20, "seconds": 100.0, "pictures": 256}
        records.write(tmp_path / "runs" / f"{seed}.json", head | MACHINE | tested | {"curve": curve})
    subject.write(tmp_path / "none", tmp_path / "page.md", tmp_path / "plot.png")
    assert not (tmp_path / "page.md").exists()
    subject.write(tmp_path / "runs", tmp_path / "page.md", tmp_path / "plot.png")
    text = (tmp_path / "page.md").read_text()
    assert row_of(text, "before")[1] == "0.500 ± 0.000"
    assert row_of(text, "best less before")[1] == "0.210 ± 0.014"
    assert row_of(text, "p over seeds")[1] == "0.015", "t = 21, one degree of freedom"
    assert "at step 20 of 40, 20 of 40. Its harmonic reward went 0.7000 → 0.8000 → 0.7500" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_reward_that_errs_on_some_pictures_and_alike_each_time() -> None:
    scene = styles.drawn("a red circle", {}, 1)
    images = (scene + torch.linspace(-0.01, 0.01, 16)[:, None, None, None]).clamp(0, 1)
    erring = condition.ErringCondition(share=0.5)
    changed = [bool((erring.seen(image) != image).any()) for image in images]
    assert 0 < sum(changed) < 16
    hazy = images[changed.index(True)]
    assert torch.allclose(erring.seen(hazy) - 128 / 255, (hazy - 128 / 255) / 2, atol=1e-6), "every contrast to the ground is halved"
    given = {"prompts": ["a red circle"] * 16, "metadata": [{}] * 16, "references": [scene] * 16}
    batch = RewardInput(images.requires_grad_(), **given)
    said, clean = erring.score(batch).scores, Condition("colours", form="error").score(batch).scores
    assert torch.equal(said, erring.score(batch).scores)
    assert [bool(a < b - 1e-4) for a, b in zip(said, clean, strict=True)] == changed
    assert torch.autograd.grad(said.sum(), images)[0].isfinite().all()


def test_closeness_is_of_the_objects_colours() -> None:
    scene = styles.drawn("a red circle", {}, 1)
    assert condition.closeness(scene, scene).tolist() == [1]
    ground = torch.tensor(scenes.GROUND)[:, None, None] / 255
    assert condition.closeness(scene, scene + 0.3 * ((scene - ground).abs().amax(1) > 0.1)).item() == pytest.approx(0.7)
    assert condition.closeness(scene, scene + 0.3 * ((scene - ground).abs().amax(1) <= 0.1)).item() == pytest.approx(1.0)


def test_the_page_of_a_condition(tmp_path: Path) -> None:
    def one(name: str, seed: int, end: float) -> dict[str, Any]:
        found = run(name, seed, 0.6)
        for point, value in zip(found["curve"], (0.5, 0.5, end), strict=True):
            point |= {"agreement": value, "closeness": 0.9}
        return found

    for seed in range(3):
        for name, end in (("erring_none", 0.6), ("erring_places", 0.7 + 0.01 * seed), ("clean_none", 0.8)):
            records.write(tmp_path / f"{name}-{seed}.json", one(name, seed, end))
    condition.write(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert row_of(text, "`erring` | places")[2:5] == ["3", "90", "0.500 → 0.710 ± 0.010"]
    assert row_of(text, "what weighting places is worth with the reward that errs")[1] == "0.110 ± 0.010, p = 0.001"
    assert row_of(text, "what weighting pictures is worth there")[1] == "not known: 0 seeds of both"
    assert "nan" not in text
    names = {"_".join(case) for case in condition.CASES}
    assert len(names) == len(condition.CASES)


def test_what_is_left_of_everything(tmp_path: Path) -> None:
    found = everything.jobs()
    assert {"toybox", "noise", "prdp", "subject", "condition", "guidance", "reward_model", "distillation"} <= {job.module for job in found}
    for job in found:
        assert len(set(job.files)) == len(job.files) > 0
    (tmp_path / "a.json").touch()
    some = [everything.Job("prdp", 30, [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"], ["--seeds", "0"])]
    text = everything.left(some)
    assert row_of(text, "prdp") == ["prdp --seeds 0", "1 of 3", "60"]
    assert text.endswith("About 1.0 hours left.")
