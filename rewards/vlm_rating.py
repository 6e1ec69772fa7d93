"""A vision-language model's rating from 1 to 5, as the expectation over the numbers that it might say.

The number that it does say takes five values, so that most members of a group tie, and training on ties has been seen to fall below the
base model (PromptEcho's ablation, arXiv 2604.12652); the expectation has no ties and costs the same forward. Aspects are VisionPrefer's
four (Wu et al. 2024, arXiv 2404.15100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from visalign.judges import Judge, Question, load_judge
from visalign.questions import RATE, fill
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

ASPECTS = {
    "prompt_following": "alignment",
    "aesthetic": "Check composition, colour and light.",
    "fidelity": "quality",
    "harmlessness": "Check whether anything in it is offensive, violent or unfair.",
}
Aspect = Literal["prompt_following", "aesthetic", "fidelity", "harmlessness"]
NUMBERS = ("1", "2", "3", "4", "5")


class VlmRating(Reward):
    """Σ_k k · P(k) over k = 1 … 5, scaled to [0, 1] as (r - 1) / 4, averaged over aspects.

    Args:
        checkpoint, server, batch: see `visalign.judges.load_judge`.
        aspects: of VisionPrefer's four; each is a question of its own.

    Components, each (N,): every aspect's rating from 1 to 5. `uncertainty` (N,) is the std of the distribution over numbers, averaged over
    aspects, in the unit of the score.

    Raises:
        UserError: no such model or server.
    """

    spec = RewardSpec(
        "vlm_rating",
        differentiable=True,  # at best: a server's judge has no gradient
        needs=frozenset({"prompt"}),
        range=(0.0, 1.0),
        model_id="Qwen/Qwen2.5-VL-7B-Instruct",
        licence="Apache-2.0",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        server: str | dict[str, Any] | None = None,
        aspects: tuple[Aspect, ...] = ("prompt_following",),
        batch: int = 16,
    ):
        self.judge: Judge = load_judge(checkpoint, server, batch)
        self.aspects = aspects
        self.spec = replace(self.spec, differentiable=self.judge.differentiable, model_id=self.judge.name)

    @classmethod
    def gradient_with(cls, options: Mapping[str, Any]) -> bool | None:
        """Not by a server; in this process it depends on the model's picture processor."""
        return None if options.get("server") is None else False

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in [0, 1]; invalid where the judge failed or a picture isn't finite."""
        sound = batch.images.flatten(1).isfinite().all(1)
        questions = [
            Question((image,), fill(RATE, prompt, ASPECTS[aspect]))
            for aspect in self.aspects
            for image, prompt in zip(batch.images, batch.prompts, strict=True)
        ]
        share = self.judge.choose(questions, NUMBERS).to(sound.device).softmax(-1).unflatten(0, (len(self.aspects), -1))
        numbers = torch.arange(1.0, 6.0, device=sound.device)
        rating = torch.where(sound, share @ numbers, torch.nan)  # (A, N)
        spread = (share @ numbers.square() - rating.square()).clamp_min(0).sqrt().detach()
        components = dict(zip(self.aspects, rating, strict=True))
        info = {"errors": self.judge.errors(rating.mean(0))}
        return RewardOutput.of((rating.mean(0) - 1) / 4, components=components, uncertainty=spread.mean(0) / 4, info=info)
