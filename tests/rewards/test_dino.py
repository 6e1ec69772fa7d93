"""DINO similarity: hand-made features against the formulas, copies, caching, and the errors of missing references."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.rewards.dino import Dino
from visalign.scoring import RewardInput
from visalign.toybox import styles

PROMPTS = ["a red star", "two blue circles"]


@pytest.fixture(scope="module")
def batch() -> RewardInput:
    return RewardInput(torch.cat([styles.drawn(prompt, {}, 1, seed=5) for prompt in PROMPTS]), PROMPTS)


@pytest.mark.parametrize("patches", ["best", "aligned"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_score_is_the_formula(dino: str, batch: RewardInput, patches: str, reduce: str) -> None:
    reward = Dino(dino, "toybox", count=3, patch_weight=0.4, patches=patches, reduce=reduce)  # pyright: ignore[reportArgumentType]
    output = reward.score(batch)
    seen = reward.encoder.encode(batch.images)
    for n, prompt in enumerate(PROMPTS):
        known = reward.encoder.encode(styles.drawn(prompt, {}, 3))
        cosine = F.cosine_similarity(seen.image[n], known.image)
        table = torch.stack([F.cosine_similarity(seen.patches[n][:, None], part, dim=-1) for part in known.patches])
        per_patch = table.amax(2) if patches == "best" else table.diagonal(dim1=1, dim2=2)
        dense = per_patch[per_patch.mean(1).argmax()] if reduce == "max" else per_patch.mean(0)
        whole = cosine.amax() if reduce == "max" else cosine.mean()
        torch.testing.assert_close(output.components["global"][n], whole)
        torch.testing.assert_close(output.components["distance"][n], 1 - cosine.amax())
        assert output.dense is not None
        torch.testing.assert_close(output.dense[n].flatten(), dense)
        torch.testing.assert_close(output.scores[n], 0.6 * whole + 0.4 * dense.mean())


def test_a_copy_is_told(dino: str, batch: RewardInput) -> None:
    copies = [torch.cat([batch.images[n : n + 1], styles.drawn("a ring", {}, 1)]) for n in range(2)]
    reward = Dino(dino)
    output = reward.score(RewardInput(batch.images, PROMPTS, references=copies))
    torch.testing.assert_close(output.components["distance"], torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.scores, torch.ones(2))
    others = reward.score(RewardInput(batch.images, PROMPTS, references=[copies[1], copies[0]]))
    assert (others.components["distance"] > 1e-3).all()


def test_references_are_encoded_once(dino: str, batch: RewardInput) -> None:
    reward = Dino(dino, "toybox")
    first = reward.score(batch).scores
    reward.references.encode = None  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(reward.score(batch).scores, first)


def test_errors(dino: str, batch: RewardInput) -> None:
    with pytest.raises(UserError, match="dino has no reference pictures"):
        Dino(dino).score(batch)
    with pytest.raises(UserError, match="patch_weight"):
        Dino(dino, patch_weight=2.0)
