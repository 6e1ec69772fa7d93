"""Pairwise win rate: the share of its own group that a picture beats, by a vision-language model's verdict on every pair.

Pref-GRPO (Wang et al. 2025, arXiv 2508.20751). Scores of single pictures differ within a group by less than the scorer's noise, and
normalisation blows that up; a win rate has no such scale, and its mean over a group is always one half. Differs from the paper: every pair
is asked in both orders and averaged, and a verdict is a probability, so that close pairs are close.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.judges import Judge, Question, load_judge
from visalign.questions import PAIR, fill
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class PairwiseWinRate(Reward):
    """r_i = mean over j ≠ i of win_ij, with win_ij + win_ji = 1, in [0, 1] (arXiv 2508.20751, equation 4).

    Args:
        checkpoint, server, batch: see `visalign.judges.load_judge`. A group of G costs G (G - 1) questions.
        task: what to look at, as in `vlm_yes`.
        verdict: "soft" takes the probability of winning, "hard" 1, 0, or a half when the two orders contradict each other.

    `uncertainty` (N,) is how far the two orders of a picture's pairs differ, on average, divided by two. A picture that isn't finite is
    invalid and has no part in its group.

    Raises:
        UserError: no such model or server, or a batch without groups.
    """

    spec = RewardSpec(
        "pairwise_winrate",
        scope="group",
        needs=frozenset({"prompt", "groups"}),
        range=(0.0, 1.0),
        model_id="Qwen/Qwen2.5-VL-7B-Instruct",
        licence="Apache-2.0",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        server: str | dict[str, Any] | None = None,
        task: str = "alignment",
        verdict: Literal["soft", "hard"] = "soft",
        batch: int = 16,
    ):
        self.judge: Judge = load_judge(checkpoint, server, batch)
        self.task, self.verdict = task, verdict
        self.spec = replace(self.spec, model_id=self.judge.name)

    @torch.no_grad()
    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; NaN for the only member of a group, and where the judge answered none of a picture's pairs."""
        if batch.groups is None:
            raise UserError("pairwise_winrate compares the members of a group; this batch has none")
        groups = batch.groups.tolist()
        sound = batch.images.flatten(1).isfinite().all(1).tolist()
        pairs = [(i, j) for i, j in combinations(range(len(groups)), 2) if groups[i] == groups[j] and sound[i] and sound[j]]
        forth, back = (self._second_wins(batch, some) for some in (pairs, [(j, i) for i, j in pairs]))
        wins = torch.full((len(groups), len(groups)), torch.nan)
        gaps = torch.full_like(wins, torch.nan)
        if pairs:
            i, j = torch.tensor(pairs).unbind(1)
            second = (forth + 1 - back) / 2  # the later member of each pair
            if self.verdict == "hard":
                second = ((forth > 0.5).float() + (back < 0.5).float()) / 2 + 0 * second  # NaN stays NaN
            wins[j, i], wins[i, j] = second, 1 - second
            gaps[j, i] = gaps[i, j] = (forth - (1 - back)).abs() / 2
        device = batch.images.device
        rate = wins.nanmean(1)
        return RewardOutput.of(rate.to(device), uncertainty=gaps.nanmean(1).to(device), info={"errors": self.judge.errors(rate)})

    def _second_wins(self, batch: RewardInput, pairs: list[tuple[int, int]]) -> Tensor:
        """(P,) probability that the second picture of each pair is the better one."""
        if not pairs:
            return torch.zeros(0)
        images = list(batch.images)
        questions = [Question((images[a], images[b]), fill(PAIR, batch.prompts[a], self.task)) for a, b in pairs]
        yes, no = self.judge.choose(questions, ("yes", "no")).cpu().unbind(1)
        return (yes - no).sigmoid()
