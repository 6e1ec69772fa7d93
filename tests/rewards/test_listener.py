"""listener: a second model's agreement with the judge's reasons."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conftest import save_tiny_vlm
from visalign.judges import Question, load_judge
from visalign.questions import REASON, before_verdict, fill
from visalign.rewards.listener import Listener
from visalign.scoring import RewardInput

BATCH = RewardInput(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a star", "two red rings"])


def test_mean_of_both_after_the_reasons(tiny_vlm: str, tmp_path: Path) -> None:
    other = save_tiny_vlm(tmp_path / "other")
    reward = Listener(tiny_vlm, listener=other)
    torch.nn.init.normal_(reward.listener.model.lm_head.weight)  # pyright: ignore[reportAttributeAccessIssue]
    output = reward.score(BATCH)
    questions = [Question((i,), fill(REASON, p)) for i, p in zip(BATCH.images, BATCH.prompts, strict=True)]
    said = load_judge(tiny_vlm).write(questions)
    assert output.info["texts"] == said
    told = [Question(q.images, q.text, before_verdict(text or "")) for q, text in zip(questions, said, strict=True)]
    own, heard = (judge.choose(told, ("yes", "no")).softmax(-1)[:, 0] for judge in (reward.judge, reward.listener))
    torch.testing.assert_close(output.scores, (own + heard) / 2)
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty, (own - heard).abs() / 2)
