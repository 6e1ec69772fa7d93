"""prompt_echo: mean log-likelihood of the prompt, word by word."""

from __future__ import annotations

import pytest
import torch

from visalign.judges import Question, load_judge
from visalign.questions import CAPTION
from visalign.rewards.prompt_echo import PromptEcho
from visalign.scoring import RewardInput

BATCH = RewardInput(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a star", "two red rings", "a star"])


def test_score_is_the_mean_over_words(tiny_vlm: str) -> None:
    output, judge = PromptEcho(tiny_vlm).score(BATCH), load_judge(tiny_vlm)
    for n, words in enumerate(output.info["words"]):
        (echo,) = judge.echo([Question((BATCH.images[n],), CAPTION, BATCH.prompts[n])])
        assert echo is not None
        assert [word for word, _ in words] == BATCH.prompts[n].split()
        torch.testing.assert_close(output.scores[n], echo.log_probs.mean(), rtol=1e-4, atol=1e-4)
        assert min(value for _, value in words) == pytest.approx(output.components["least"][n].item(), abs=1e-4)


def test_control_is_the_same_for_all_pictures_of_a_prompt(tiny_vlm: str) -> None:
    plain, controlled = PromptEcho(tiny_vlm).score(BATCH).scores, PromptEcho(tiny_vlm, control=True).score(BATCH).scores
    subtracted = plain - controlled
    torch.testing.assert_close(subtracted[0], subtracted[2])
    grey = PromptEcho(tiny_vlm).score(RewardInput(torch.full((1, 3, 64, 64), 0.5), ["two red rings"])).scores
    torch.testing.assert_close(subtracted[1], grey[0], rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_is_invalid(tiny_vlm: str) -> None:
    output = PromptEcho(tiny_vlm).score(RewardInput(BATCH.images[:2], ["", "a ring"]))
    assert output.valid.tolist() == [False, True]
