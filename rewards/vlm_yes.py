"""The probability that a vision-language model answers yes: does the picture show the prompt, or does it so better than a reference?

RewardDance (Wu et al. 2025, arXiv 2509.08826). Differs from the paper: yes and no are compared with each other alone, over every way in
which the tokenizer writes them; the log-odds are kept beside the probability, which saturates; and a comparison is asked in both orders,
because judges prefer a position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.judges import Judge, Question, load_judge
from visalign.questions import PAIR, POINT, REASON, before_verdict, fill
from visalign.references import References
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class VlmYes(Reward):
    """P(yes), with P(yes) + P(no) = 1.

    Pointwise, r(x, c) = P(yes | x, c); in pairs with a reference r̃, r(x, r̃, c) = P(yes | r̃, x, c) for the question whether the second
    picture is better (arXiv 2509.08826, equation 2), or with `swap` (P(yes | r̃, x, c) + 1 - P(yes | x, r̃, c)) / 2.

    Args:
        checkpoint, server: see `visalign.judges.load_judge`.
        mode: "point", or "pair": against the prompt's first reference picture.
        references: where that comes from, see `visalign.references.References`.
        task: what to look at: "alignment", "quality", "style", "text", a sentence of one's own, or "".
        form: "probability" in [0, 1], or "log_odds".
        swap: in pairs, ask in both orders.
        reason: let the judge first say what is wrong, then answer (pointwise only; not differentiable).
        batch: questions per forward.

    Components, each (N,): `probability`, `log_odds`. In pairs asked in both orders, `uncertainty` (N,) is half of what the two differ by.

    Raises:
        UserError: no such model or server, or options that exclude each other.
    """

    spec = RewardSpec(
        "vlm_yes",
        differentiable=True,  # at best: a server's judge, and reasons, have no gradient
        needs=frozenset({"prompt"}),
        range=(0.0, 1.0),
        model_id="Qwen/Qwen2.5-VL-7B-Instruct",
        licence="Apache-2.0",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        server: str | dict[str, Any] | None = None,
        mode: Literal["point", "pair"] = "point",
        references: str | None = None,
        task: str = "alignment",
        form: Literal["probability", "log_odds"] = "probability",
        swap: bool = True,
        reason: bool = False,
        batch: int = 16,
    ):
        if mode == "pair" and reason:
            raise UserError("vlm_yes: reason=true is for mode=point; a comparison is decided before it is explained")
        self.judge: Judge = load_judge(checkpoint, server, batch)
        self.mode, self.task, self.form, self.swap, self.reason = mode, task, form, swap, reason
        self.references = References("vlm_yes", references, 1, lambda images: (images[:1],)) if mode == "pair" else None
        limits = (0.0, 1.0) if form == "probability" else (-math.inf, math.inf)
        differentiable = self.judge.differentiable and not reason
        self.spec = replace(self.spec, range=limits, differentiable=differentiable, model_id=self.judge.name)

    @classmethod
    def gradient_with(cls, options: Mapping[str, Any]) -> bool | None:
        """Not by a server, nor with reasons; in this process it depends on the model's picture processor."""
        return None if options.get("server") is None and not options.get("reason") else False

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; invalid where the judge failed or a picture isn't finite."""
        odds, spread, info = self._odds(batch)
        odds = torch.where(batch.images.flatten(1).isfinite().all(1), odds.to(batch.images.device), torch.nan)
        probability = odds.sigmoid()
        components = {"probability": probability, "log_odds": odds}
        info["errors"] = self.judge.errors(odds)
        return RewardOutput.of(components[self.form], components=components, uncertainty=spread, info=info)

    def _odds(self, batch: RewardInput) -> tuple[Tensor, Tensor | None, dict[str, list[str | None]]]:
        """(N,) log-odds of yes, their uncertainty in the unit of the score, and what the judge said."""
        if self.mode == "pair":
            return *self._compared(batch), {}
        template = REASON if self.reason else POINT
        questions = [
            Question((image,), fill(template, prompt, self.task)) for image, prompt in zip(batch.images, batch.prompts, strict=True)
        ]
        if not self.reason:
            return self._yes(questions), None, {}
        said = self.judge.write(questions)
        questions = [replace(q, answer=before_verdict(text or "")) for q, text in zip(questions, said, strict=True)]
        return self._yes(questions), None, {"texts": said}

    def _compared(self, batch: RewardInput) -> tuple[Tensor, Tensor | None]:
        assert self.references is not None
        pairs = zip(batch.images, self.references(batch), batch.prompts, strict=True)
        shown = [((reference[0].to(image), image), fill(PAIR, prompt, self.task)) for image, (reference,), prompt in pairs]
        first = self._yes([Question(pictures, text) for pictures, text in shown])
        if not self.swap:
            return first, None
        second = -self._yes([Question(pictures[::-1], text) for pictures, text in shown])
        if self.form == "log_odds":
            return (first + second) / 2, (first - second).detach().abs() / 2
        mean = (first.sigmoid() + second.sigmoid()) / 2
        return mean.logit(), (first.sigmoid() - second.sigmoid()).detach().abs() / 2

    def _yes(self, questions: list[Question]) -> Tensor:
        yes, no = self.judge.choose(questions, ("yes", "no")).unbind(1)
        return yes - no
