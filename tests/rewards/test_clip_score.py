"""CLIP score: the formula, goal-baseline regularisation, and that the toybox's CLIP knows what it looks at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.rewards.clip_score import ClipScore, goal_baseline
from visalign.scoring import RewardInput
from visalign.toybox import scenes


def drawn(prompts: Sequence[str]) -> torch.Tensor:
    rng = random.Random(3)
    records = [record for prompt in prompts if (record := scenes.parse(prompt))]
    pictures = np.stack([np.asarray(scenes.render(scenes.lay_out(record, rng))) for record in records])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def test_score_is_the_scaled_cosine() -> None:
    prompts = ["a red star", "two blue circles"]
    batch = RewardInput(drawn(prompts), prompts)
    reward = ClipScore("toybox", scale=2.5)
    output = reward.score(batch)
    expected = F.cosine_similarity(reward.encoder.encode_images(batch.images), reward.encoder.encode_texts(prompts), dim=-1)
    torch.testing.assert_close(output.scores, 2.5 * expected)
    torch.testing.assert_close(output.components["cosine"], expected)
    assert tuple(output.embeddings["clip"].shape) == (2, 96)
    assert reward.spec.range == (-2.5, 2.5)


def test_goal_baseline_equals_the_projection_matrix() -> None:
    image, goal, baseline = (F.normalize(torch.randn(5, 7, dtype=torch.float64), dim=-1) for _ in range(3))
    for weight in (0.0, 0.3, 0.5, 1.0):
        expected = []
        for s, g, b in zip(image, goal, baseline, strict=True):
            d = g - b
            projection = weight * torch.outer(d, d) / d.dot(d) + (1 - weight) * torch.eye(7, dtype=torch.float64)
            expected.append(1 - ((s - g) @ projection).square().sum() / 2)
        torch.testing.assert_close(goal_baseline(image, goal, baseline, weight), torch.stack(expected))


def test_goal_baseline_at_its_ends() -> None:
    image, goal = (F.normalize(torch.randn(4, 9), dim=-1) for _ in range(2))
    baseline = F.normalize(torch.randn(1, 9), dim=-1)
    torch.testing.assert_close(goal_baseline(image, goal, baseline, 0.0), (image * goal).sum(-1))
    torch.testing.assert_close(goal_baseline(goal, goal, baseline, 0.7), torch.ones(4))
    assert goal_baseline(image, goal, goal, 0.5).isfinite().all()  # no direction from a text to itself


def test_baseline_option() -> None:
    prompts = ["a red star", "two blue circles"]
    batch = RewardInput(drawn(prompts), prompts)
    plain = ClipScore("toybox").score(batch).scores
    torch.testing.assert_close(ClipScore("toybox", baseline="a picture", baseline_weight=0).score(batch).scores, plain)
    assert (ClipScore("toybox", baseline="a picture", baseline_weight=1).score(batch).scores - plain).abs().max() > 1e-3


def test_aspect_matters_for_wide_pictures_only() -> None:
    square, wide = torch.rand(1, 3, 48, 48), torch.rand(1, 3, 48, 80)
    crop, stretch = ClipScore("toybox", aspect="crop"), ClipScore("toybox", aspect="stretch")
    prompts = ["a ring"]
    torch.testing.assert_close(crop.score(RewardInput(square, prompts)).scores, stretch.score(RewardInput(square, prompts)).scores)
    assert (crop.score(RewardInput(wide, prompts)).scores - stretch.score(RewardInput(wide, prompts)).scores).abs() > 1e-5


def test_toybox_clip_prefers_the_true_prompt() -> None:
    """Of held-out compositions; the share of right choices is measured when the encoder is made, this only sees that it still works."""
    records = [record for kind in scenes.prompts(test=True).values() for record in kind][::8]
    prompts = [scenes.describe(record) for record in records]
    reward = ClipScore("toybox")
    images = reward.encoder.encode_images(drawn(prompts))
    logits = images @ reward.encoder.encode_texts(prompts).T
    assert (logits.argmax(1) == torch.arange(len(prompts))).float().mean() > 0.7


def test_ascent_on_the_gradient_raises_the_score() -> None:
    images, reward = drawn(["a red star"]), ClipScore("toybox")
    scores: list[float] = []
    for _ in range(6):
        images.requires_grad_()
        score = reward.score(RewardInput(images, ["a blue star"])).scores.sum()
        scores.append(score.item())
        (gradient,) = torch.autograd.grad(score, images)
        images = (images + 0.2 * gradient / gradient.norm()).clamp(0, 1).detach()
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.01


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"baseline_weight": 1.5}, {"aspect": "zoom"}, {"checkpoint": "/nowhere"}])
def test_bad_options_are_user_errors(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        ClipScore(**({"checkpoint": "toybox"} | options))  # type: ignore[arg-type]
