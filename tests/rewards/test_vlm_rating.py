"""vlm_rating: the expectation over the numbers that the judge might say, aspect by aspect."""

from __future__ import annotations

import torch

from visalign.judges import Question, load_judge
from visalign.questions import RATE, fill
from visalign.rewards.vlm_rating import ASPECTS, VlmRating
from visalign.scoring import RewardInput

BATCH = RewardInput(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a star", "two red rings"])


def test_expectation_over_the_numbers(tiny_vlm: str) -> None:
    output = VlmRating(tiny_vlm, aspects=("prompt_following", "fidelity")).score(BATCH)
    ratings = []
    for aspect in ("prompt_following", "fidelity"):
        questions = [Question((i,), fill(RATE, p, ASPECTS[aspect])) for i, p in zip(BATCH.images, BATCH.prompts, strict=True)]
        share = load_judge(tiny_vlm).choose(questions, ("1", "2", "3", "4", "5")).softmax(-1)
        ratings.append(sum(k * share[:, k - 1] for k in range(1, 6)))
        torch.testing.assert_close(output.components[aspect], ratings[-1])
    torch.testing.assert_close(output.scores, ((ratings[0] + ratings[1]) / 2 - 1) / 4)
    assert output.uncertainty is not None
    assert bool((output.uncertainty > 0).all())
