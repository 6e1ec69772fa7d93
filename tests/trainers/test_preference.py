"""Diffusion-DPO and RPO: which pairs, which sign, which labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_recipes import closeness, credited, forward
from visalign import pictures
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.trainers.preference import Preference, ranked
from visalign.trainers.rpo import RPO

NAN = math.nan


def dpo(path: Path, **changes: Any) -> Preference:
    built = forward(path, "preference", **({"trainer__beta": 20.0, "optimizer__lr": 0.05} | changes))
    assert isinstance(built, Preference)
    return built


def points(folder: Path, places: list[tuple[float, float]], shape: int = 16) -> list[str]:
    """Toy pictures of some points; of two sizes, as files may be."""
    family = Toy("gaussian")
    images = family.decode(torch.tensor(places))[..., :shape, :shape]
    return [path.name for path in pictures.save(images, folder, [f"{shape}_{n}" for n in range(len(places))])]


def test_the_best_and_the_worst_of_each_group_are_a_pair() -> None:
    groups = torch.tensor([5, 1, 5, 1, 5, 1, 2, 2, 2, 3, 3, 3])
    scores = torch.tensor([0.1, 7.0, NAN, 3.0, 0.2, 5.0, 1.0, 1.0, 1.0, NAN, 4.0, NAN])
    assert ranked(scores, groups).tolist() == [[1, 3], [4, 0]], "no pair where nothing differs or nothing is valid"


def test_at_the_reference_the_loss_is_ln_2_and_its_step_favours_the_better(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    ((batch,),) = trainer.minibatches(credited(trainer), 1)
    found = trainer.loss(batch)
    assert found.value.item() == pytest.approx(math.log(2), rel=1e-6)
    assert found.metrics["accuracy"] == 0.5
    errors = (trainer.predict(batch) - batch.target).square().mean(1)
    first, second = errors.chunk(2)
    shift = trainer.parameters[0]
    expected = torch.autograd.grad((20 / 4 * (first - second)).mean(), shift)[0]  # σ(0)·½β·(e_first - e_second)
    assert torch.allclose(torch.autograd.grad(found.value, shift)[0], expected, atol=1e-6)


def test_online_it_raises_the_reward_while_the_reference_stays(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    before = closeness(trainer)
    rows = [trainer.step(n) for n in range(1, 41)]
    assert closeness(trainer) > before + 0.5
    assert rows[0]["nfe_train"] == 0.5, "policy and reference on two of eight"
    assert rows[-1]["accuracy"] > 0.6
    assert all(not value.any() for value in trainer.old.values), "frozen"


def test_a_reference_that_is_renewed_every_step_still_learns(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, trainer__old={"every": 1}, trainer__draws="old", trainer__timesteps=4, trainer__updates=4)
    before = closeness(trainer)
    for n in range(1, 13):
        trainer.step(n)
    assert closeness(trainer) > before + 0.5
    assert torch.equal(trainer.old.values[0], trainer.parameters[0])


def test_pairs_from_a_file_are_encoded_labelled_and_learnt(tmp_path: Path) -> None:
    target, away = points(tmp_path, [(2.0, 1.0), (0.0, -2.0)])
    (small,) = points(tmp_path, [(1.5, 0.5)], shape=8)
    rows = [
        {"prompt": "a", "images": [away, target], "better": 1},
        {"prompt": "b", "images": [small, away], "better": 0},
        {"prompt": "c", "images": [target, away], "better": None},  # the rewards say
        {"prompt": "d", "images": [target, away], "better": "tie"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    changes = {"trainer__pairs": str(file), "trainer__group_size": 2, "trainer__prompts": 3, "trainer__micro_batch": 6}
    trainer = dpo(tmp_path, **changes)
    before = closeness(trainer)
    drawn = credited(trainer)
    texts = drawn.prompts.texts
    assert sorted(set(texts)) == ["a", "b", "c"]
    better = [drawn.trajectory.final[row] for row in trainer.units(drawn).rows[:, 0]]
    wanted = {"a": (2.0, 1.0), "b": (1.5, 0.5), "c": (2.0, 1.0)}
    for row, point in zip(trainer.units(drawn).rows[:, 0].tolist(), better, strict=True):
        assert point.tolist() == pytest.approx(wanted[texts[row]], abs=0.05)  # 8 bits
    rows = [trainer.step(n) for n in range(1, 31)]
    assert rows[0]["nfe"] == 0
    assert rows[-1]["accuracy"] > 0.9
    assert rows[-1]["gain/first"] > rows[-1]["gain/second"]
    assert closeness(trainer) > before
    with pytest.raises(UserError, match=r"trainer\.group_size=8: a pair of trainer\.pairs is a group of 2"):
        dpo(tmp_path, trainer__pairs=str(file))


def test_rpo_holds_the_subject_against_what_the_untrained_model_draws(tmp_path: Path) -> None:
    points(tmp_path, [(1.9, 0.9), (2.1, 1.1), (2.0, 1.0)])
    trainer = forward(tmp_path, "rpo", trainer__references=str(tmp_path), trainer__subject="a point", optimizer__lr=0.05)
    assert isinstance(trainer, RPO)
    before, drawn = closeness(trainer), credited(trainer)
    assert (len(drawn.prompts), len(drawn.images), len(drawn.rewards["total"])) == (128, 128, 128)
    found = trainer.units(drawn)
    assert found.rows.tolist() == [[64 + n, n] for n in range(64)]
    shown, chance = drawn.trajectory.final[found.rows[:, 0]], drawn.rewards["total"]
    assert (shown - torch.tensor([2.0, 1.0])).norm(dim=1).max() < 0.2
    assert torch.allclose(found.credit, (chance[64:] - chance[:64]).sigmoid())
    assert found.credit.min() > 0.5
    rows = [trainer.step(n) for n in range(1, 31)]
    assert closeness(trainer) > before + 0.5
    assert torch.equal(trainer.collect(trainer.draw(1), 1).trajectory.final[:64], drawn.trajectory.final[:64]), "the untrained model draws"
    assert rows[-1]["gain/first"] > 0
    with pytest.raises(UserError, match=r"trainer\.references: none given"):
        forward(tmp_path, "rpo")


def test_pictures_of_a_subject_may_have_prompts_of_their_own(tmp_path: Path) -> None:
    here, there, elsewhere = points(tmp_path, [(2.0, 1.0), (-2.0, 0.0), (-2.0, 1.0)])
    lines = [{"prompt": "here", "images": [here]}, {"prompt": "there", "images": [there, elsewhere]}]
    (tmp_path / "subject.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = forward(tmp_path, "rpo", trainer__references=str(tmp_path / "subject.jsonl"), trainer__subject=["here", "there"])
    drawn = trainer.collect(trainer.draw(1), 1)
    shown, turn = drawn.trajectory.final[64:], drawn.prompts.ids[:64] % 4
    for place, turns in (((2.0, 1.0), (0, 2)), ((-2.0, 0.0), (1, 3)), ((-2.0, 1.0), (1, 3))):
        near = (shown - torch.tensor(place)).norm(dim=1) < 0.1
        assert near.any()
        assert set(turn[near].tolist()) <= set(turns)
    with pytest.raises(UserError, match=r"trainer\.subject: an empty list"):
        forward(tmp_path, "rpo", trainer__references=str(tmp_path / "subject.jsonl"), trainer__subject=[])
