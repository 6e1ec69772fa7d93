"""Diversity: leave-one-out distances, effective numbers and tones of a group, and what a member adds to them."""

from __future__ import annotations

import pytest
import torch

from visalign import monitors
from visalign.rewards.diversity import Diversity, leave_one_out
from visalign.scoring import RewardInput
from visalign.toybox import styles


@pytest.fixture(scope="module")
def batch() -> RewardInput:
    """Three pictures of circles, of which two are copies; two of rings; one alone."""
    circles, rings = styles.drawn("two red circles", {}, 2), styles.drawn("three rings", {}, 3)
    return RewardInput(torch.cat([circles, circles[:1], rings]), ["x"] * 6, groups=torch.tensor([7, 7, 7, 2, 2, 5]))


def test_leave_one_out_is_the_mean_over_the_others() -> None:
    features = torch.randn(4, 6, dtype=torch.float64)
    table = 1 - torch.cosine_similarity(features[:, None], features, dim=-1)
    expected = torch.stack([table[n][torch.arange(4) != n].mean() for n in range(4)])
    torch.testing.assert_close(leave_one_out(features), expected)


def test_distance(dino: str, batch: RewardInput) -> None:
    output = Diversity(checkpoint=dino).score(batch)
    assert output.valid.tolist() == [True] * 5 + [False]
    assert output.scores[1] > output.scores[0]  # the one that has no copy
    torch.testing.assert_close(output.scores[0], output.scores[2])
    torch.testing.assert_close(output.components["set"][:3], output.scores[:3].mean().expand(3))
    together = output.components["set"]
    by_group = monitors.diversity(output.embeddings["diversity"][:5], batch.groups[:5] if batch.groups is not None else torch.zeros(0))
    assert (together[0] + together[3]).item() / 2 == pytest.approx(by_group, abs=1e-5)


def test_patches_see_that_the_same_things_are_elsewhere(dino: str) -> None:
    """Two circles that have moved are nearly the same picture and not at all the same places."""
    moved = styles.drawn("two red circles", {}, 2)
    batch = RewardInput(moved, ["x"] * 2, groups=torch.zeros(2, dtype=torch.int64))
    whole, places = (Diversity(checkpoint=dino, features=features).score(batch) for features in ("image", "patches"))
    assert places.scores[0] > 2 * whole.scores[0] > 0
    assert places.embeddings["diversity"].shape == whole.embeddings["diversity"].shape
    patches = Diversity(checkpoint=dino).encoder.encode(moved).patches  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(places.scores[0], 1 - torch.cosine_similarity(*patches, dim=-1).mean())


@pytest.mark.parametrize("measure", ["vendi", "tonal"])
def test_a_member_is_worth_what_the_set_loses_without_it(dino: str, batch: RewardInput, measure: str) -> None:
    output = Diversity(measure, checkpoint=dino).score(batch)  # pyright: ignore[reportArgumentType]
    whole = {
        "vendi": lambda rows: monitors.vendi(output.embeddings["diversity"][rows]),
        "tonal": lambda rows: monitors.tonal_diversity(batch.images[rows]),
    }[measure]
    for n, others in ((0, [1, 2]), (1, [0, 2]), (3, [4])):
        group = sorted([n, *others])
        assert output.scores[n].item() == pytest.approx(whole(group) - whole(others), abs=1e-5)
        assert output.components["set"][n].item() == pytest.approx(whole(group), abs=1e-5)
    assert not output.valid[5]
    as_set = Diversity(measure, "set", dino).score(batch)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(as_set.scores, output.components["set"], equal_nan=True)


@pytest.mark.parametrize("measure", ["distance", "vendi", "tonal"])
def test_gradients_are_finite_among_copies(dino: str, batch: RewardInput, measure: str) -> None:
    images = batch.images.clone().requires_grad_()
    output = Diversity(measure, "set", dino).score(RewardInput(images, batch.prompts, groups=batch.groups))  # pyright: ignore[reportArgumentType]
    (slope,) = torch.autograd.grad(output.scores[output.valid].sum(), images)
    assert slope.isfinite().all()
    assert (slope[:5].flatten(1).norm(dim=1) > 0).all()


def test_a_broken_picture_is_left_out(dino: str, batch: RewardInput) -> None:
    images = batch.images.clone()
    images[0] = torch.nan
    output = Diversity(checkpoint=dino).score(RewardInput(images, batch.prompts, groups=batch.groups))
    assert output.valid.tolist() == [False, True, True, True, True, False]
    pair = Diversity(checkpoint=dino).score(batch.take(torch.tensor([1, 2])))
    torch.testing.assert_close(output.scores[1:3], pair.scores)
