"""vlm_yes: probability and log-odds, pairs in both orders, reasons first, and a server instead of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.judge_server import serving
from visalign.errors import UserError
from visalign.judges import LocalJudge, Question, load_judge
from visalign.questions import PAIR, fill
from visalign.rewards.vlm_yes import VlmYes
from visalign.scoring import RewardInput

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = (torch.rand(3, 3, 64, 64, generator=GENERATOR) * 255).round() / 255
REFERENCES = [torch.rand(1, 3, 64, 64, generator=GENERATOR) for _ in range(3)]
BATCH = RewardInput(IMAGES, ["a star", "two red rings", "a cross left of a ring"], references=REFERENCES)


def test_log_odds_are_kept_beside_the_probability(tiny_vlm: str) -> None:
    output, odds = VlmYes(tiny_vlm).score(BATCH), VlmYes(tiny_vlm, form="log_odds").score(BATCH)
    torch.testing.assert_close(output.scores, odds.scores.sigmoid())
    torch.testing.assert_close(output.components["log_odds"], odds.scores)


def test_pairs_are_asked_in_both_orders(tiny_vlm: str) -> None:
    judge = load_judge(tiny_vlm)
    output, forward = VlmYes(tiny_vlm, mode="pair").score(BATCH), VlmYes(tiny_vlm, mode="pair", swap=False).score(BATCH)
    orders = []
    for picked in ((0, 1), (1, 0)):
        shown = [((r[0], i), fill(PAIR, p)) for r, i, p in zip(REFERENCES, IMAGES, BATCH.prompts, strict=True)]
        answers = judge.choose([Question((pair[picked[0]], pair[picked[1]]), text) for pair, text in shown], ("yes", "no"))
        orders.append(answers.softmax(-1)[:, 0])
    torch.testing.assert_close(forward.scores, orders[0])
    torch.testing.assert_close(output.scores, (orders[0] + 1 - orders[1]) / 2)
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty, (orders[0] - (1 - orders[1])).abs() / 2)


def test_swapping_a_pair_mirrors_its_score(tiny_vlm: str) -> None:
    swapped = replace(BATCH, images=torch.cat(REFERENCES), references=[image[None] for image in IMAGES])
    reward = VlmYes(tiny_vlm, mode="pair")
    torch.testing.assert_close(reward.score(BATCH).scores, 1 - reward.score(swapped).scores)


def test_reasons_come_first(tiny_vlm: str) -> None:
    reward = VlmYes(tiny_vlm, reason=True)
    output = reward.score(BATCH)
    assert output.valid.all()
    assert len(output.info["texts"]) == 3
    assert not reward.spec.differentiable
    with pytest.raises(UserError, match="reason=true is for mode=point"):
        VlmYes(tiny_vlm, mode="pair", reason=True)


def test_server_and_process_agree(tiny_vlm: str) -> None:
    local = load_judge(tiny_vlm)
    assert isinstance(local, LocalJudge)
    with serving(local, everything=True) as server:
        remote = VlmYes("auto", server={"url": server.url, "retries": 0})
        assert not remote.spec.differentiable
        torch.testing.assert_close(remote.score(BATCH).scores, VlmYes(tiny_vlm).score(BATCH).scores, rtol=0, atol=1e-4)
    with pytest.warns(UserWarning, match="its scores are invalid"):
        assert not remote.score(BATCH).valid.any()
