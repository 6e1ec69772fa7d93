"""The Python API: what `visalign.` offers, and that it does what the commands do."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import visalign
from visalign.families.toy import Toy
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox import scenes


class Fixed(Reward):
    """A score that is told."""

    spec = RewardSpec("fixed")

    def __init__(self, *values: float):
        self.values = torch.tensor(values)

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(self.values[: len(batch)])


def test_few_names_and_each_explains_itself() -> None:
    assert len(visalign.__all__) <= 20
    assert len(set(visalign.__all__)) == len(visalign.__all__)
    for name in visalign.__all__:
        assert (inspect.getdoc(getattr(visalign, name)) or "").strip(), name
        assert name in dir(visalign)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sampel'"):
        visalign.sampel  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


# --- load and sample ---------------------------------------------------------------------------------------------------


def test_sample_draws_whole_groups_and_counts() -> None:
    policy = visalign.load("toy:gaussian", device="cpu")
    assert isinstance(policy.family, Toy)
    one = visalign.sample(policy, ["a", "b"], n=3, steps=5, seed=1)
    assert one.images.shape[:2] == (6, 3)
    assert one.nfe == 5
    assert (one.scores, one.reward_calls, one.trace) == ({}, 0, [])
    assert one.seconds > 0
    again, other = (visalign.sample(policy, ["a", "b"], n=3, steps=5, seed=seed).images for seed in (1, 2))
    assert torch.equal(one.images, again)
    assert not torch.equal(one.images, other)


def test_sample_scores_with_any_form_of_reward() -> None:
    policy = visalign.load("toy:gaussian", device="cpu")
    by_name = visalign.sample(policy, "a", reward="tests.toy_rewards:Closeness", n=2)
    assert set(by_name.scores) == {"tests.toy_rewards:Closeness", "total"}
    assert by_name.reward_calls == 2
    by_object = visalign.sample(policy, "a", reward=visalign.load_reward("tests.toy_rewards:Closeness"), n=2)
    assert torch.equal(by_object.scores["total"], by_name.scores["total"])


def test_sample_refuses() -> None:
    policy = visalign.load("toy:gaussian", device="cpu")
    with pytest.raises(visalign.UserError, match="no sampling method named 'best_of_m'; did you mean best_of_n"):
        visalign.sample(policy, "a", method="best_of_m")
    with pytest.raises(visalign.UserError, match="no prompt given"):
        visalign.sample(policy, [])
    with pytest.raises(visalign.UserError, match="no reward named 'jpg'"):
        visalign.sample(policy, "a", reward="jpg")


# --- score -------------------------------------------------------------------------------------------------------------


def test_score_weighs_and_names() -> None:
    images = torch.rand(2, 3, 16, 16)
    scores = visalign.score(images, "noise", {"jpeg": 0.5, "fixed": Fixed(1.0, 2.0)})
    assert set(scores) == {"jpeg", "fixed", "total"}
    assert all(values.shape == (2,) and values.dtype == torch.float32 for values in scores.values())
    torch.testing.assert_close(scores["total"], 0.5 * scores["jpeg"] + scores["fixed"])
    options = visalign.score(images, "noise", {"small": {"use": "jpeg", "quality": 10, "weight": 2.0}})
    torch.testing.assert_close(options["total"], 2 * options["small"])
    assert (options["small"] < scores["jpeg"]).all()


def test_score_of_files_is_score_of_pictures(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    assert torch.equal(visalign.score(paths, "noise", "jpeg")["total"], visalign.score(images, "noise", "jpeg")["total"])


def test_a_failed_score_is_nan_and_stays_apart() -> None:
    scores = visalign.score(torch.rand(2, 3, 16, 16), "noise", {"fixed": Fixed(float("nan"), 2.0)})
    assert scores["total"].isnan().tolist() == [True, False]


def test_score_refuses() -> None:
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(visalign.UserError, match="2 pictures and 3 prompts"):
        visalign.score(images, ["a", "b", "c"], "jpeg")
    with pytest.raises(visalign.UserError, match="2 pictures and metadata of 1"):
        visalign.score(images, "a", "jpeg", metadata=[{}])
    with pytest.raises(visalign.UserError, match="0 pictures"):
        visalign.score([], "a", "jpeg")
    with pytest.raises(visalign.UserError, match=r"rewards\.jpeg\.weight: expected a valid number"):
        visalign.score(images, "a", {"jpeg": {"weight": "much"}})


def test_the_toyboxs_clip_tells_right_from_wrong_prompts() -> None:
    texts = ["a red circle", "a blue square"]
    images = torch.stack([_scene(text) for text in texts])
    right, wrong = (
        visalign.score(images, prompts, {"clip_score": {"checkpoint": "toybox"}})["clip_score"] for prompts in (texts, texts[::-1])
    )
    assert (right > wrong).all()
    reward = visalign.load_reward("clip_score", device="cpu", checkpoint="toybox")
    torch.testing.assert_close(reward.score(RewardInput(images, texts)).scores, right)


def _scene(text: str) -> torch.Tensor:
    metadata = scenes.parse(text)
    assert metadata
    picture = scenes.render(scenes.lay_out(metadata, random.Random(0)))
    return torch.from_numpy(scenes.to_array(picture)).permute(2, 0, 1).float() / 255


# --- align -------------------------------------------------------------------------------------------------------------


def test_align_is_the_train_command(tiny_sd3: Path, tmp_path: Path) -> None:
    overrides = {
        "run.steps": 1,
        "run.path": str(tmp_path / "run"),
        "run.device": "cpu",
        "policy.model": str(tiny_sd3),
        "policy.steps": 4,
        "policy.options": {"max_sequence_length": 10},
        "rewards": {"jpeg": 1},
        "eval.rewards": {},
        "eval.images": 2,
        "eval.scan": [],
        "trainer.prompts": 1,
        "trainer.group_size": 2,
        "trainer.micro_batch": 2,
    }
    folder = visalign.align("configs/toybox.yaml", overrides)
    assert folder == tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "report.html", "checkpoints/step_1/state.json"):
        assert (folder / name).is_file(), name
    assert list((folder / "samples").glob("*.png"))
