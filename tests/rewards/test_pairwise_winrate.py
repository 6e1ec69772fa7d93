"""pairwise_winrate: shares of pairs won within a group, whatever the judge's bias."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from visalign.judges import Question
from visalign.rewards.pairwise_winrate import PairwiseWinRate
from visalign.scoring import RewardInput

IMAGES = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BATCH = RewardInput(IMAGES, ["a star"] * 5, groups=torch.tensor([7, 7, 7, 3, 3]))


@pytest.mark.parametrize("verdict", ["soft", "hard"])
def test_a_group_shares_its_wins(tiny_vlm: str, verdict: str) -> None:
    output = PairwiseWinRate(tiny_vlm, verdict=verdict).score(BATCH)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(output.scores[:3].mean(), torch.tensor(0.5))
    torch.testing.assert_close(output.scores[3:].mean(), torch.tensor(0.5))


def test_a_judge_of_brightness_with_a_position_bias(tiny_vlm: str) -> None:
    """Verdicts of a judge that sees brightness and likes the second picture: averaging both orders leaves the brightness."""
    reward = PairwiseWinRate(tiny_vlm, verdict="hard")
    levels = torch.tensor([0.2, 0.8, 0.5])

    def biased(questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        del words
        gap = torch.stack([q.images[1].mean() - q.images[0].mean() for q in questions])
        odds = 10 * gap + 1.0
        return torch.stack([odds, torch.zeros_like(odds)], 1).log_softmax(-1)

    reward.judge.choose = biased
    output = reward.score(RewardInput(levels[:, None, None, None].expand(3, 3, 8, 8), ["a star"] * 3, groups=torch.zeros(3).long()))
    torch.testing.assert_close(output.scores, torch.tensor([0.0, 1.0, 0.5]))
    assert output.uncertainty is not None
    assert bool((output.uncertainty > 0).all()), "the two orders differ by the bias"


def test_alone_in_a_group_is_invalid_and_a_broken_picture_has_no_part(tiny_vlm: str) -> None:
    reward = PairwiseWinRate(tiny_vlm)
    assert reward.score(BATCH.take(slice(2, 5))).valid.tolist() == [False, True, True]
    broken = IMAGES.clone()
    broken[0] = torch.nan
    output = reward.score(RewardInput(broken, BATCH.prompts, groups=BATCH.groups))
    assert output.valid.tolist() == [False, True, True, True, True]
    torch.testing.assert_close(output.scores[1:3].sum(), torch.tensor(1.0))
