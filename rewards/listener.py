"""Listener reward: does a second, frozen model agree with a judge once it has read the judge's reasons?

After Gambashidze et al. 2025 (arXiv 2506.22832), who train a reasoning judge with the confidence of a frozen listener in the right answer.
Here both are frozen and the picture is what is judged: reasons that convince nobody else weigh less. The paper's reward for a correct
format has no meaning without training the judge, and a later version of the paper was withdrawn: the choice of the mean is ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from visalign.judges import Judge, Question, load_judge
from visalign.questions import REASON, before_verdict, fill
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class Listener(Reward):
    """(P_judge(yes | x, c, reasons) + P_listener(yes | x, c, reasons)) / 2, in [0, 1].

    Args:
        checkpoint, server: the judge, which says what is wrong before it answers; see `visalign.judges.load_judge`.
        listener, listener_server: the one that reads its reasons and answers the same question. The same model makes a poor
            listener; "auto" is Qwen/Qwen3-VL-8B-Instruct, or the smaller of the toybox's two where the judge is the larger.
        task: what to look at, as in `vlm_yes`.
        batch: questions per forward.

    Components, each (N,): `judge`, `listener`; `uncertainty` (N,) is half of what they differ by; `info["texts"]` the reasons.

    Raises:
        UserError: no such model or server.
    """

    spec = RewardSpec(
        "listener", needs=frozenset({"prompt"}), range=(0.0, 1.0), model_id="Qwen/Qwen2.5-VL-7B-Instruct", licence="Apache-2.0"
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        listener: str = "auto",
        server: str | dict[str, Any] | None = None,
        listener_server: str | dict[str, Any] | None = None,
        task: str = "alignment",
        batch: int = 16,
    ):
        self.judge: Judge = load_judge(checkpoint, server, batch)
        if listener == "auto" and listener_server is None:
            listener = "toybox/vlm_small" if checkpoint.startswith("toybox") else "Qwen/Qwen3-VL-8B-Instruct"
        self.listener: Judge = load_judge(listener, listener_server, batch)
        self.task = task
        self.spec = replace(self.spec, model_id=f"{self.judge.name}, {self.listener.name}")

    @torch.no_grad()
    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in [0, 1]; invalid where either failed or a picture isn't finite."""
        pairs = zip(batch.images, batch.prompts, strict=True)
        questions = [Question((image,), fill(REASON, prompt, self.task)) for image, prompt in pairs]
        said = self.judge.write(questions)
        told = [replace(q, answer=before_verdict(text or "")) for q, text in zip(questions, said, strict=True)]
        silent = torch.tensor([text is None for text in said]) | ~batch.images.flatten(1).isfinite().all(1).cpu()
        own, other = (torch.where(silent, torch.nan, self._yes(who, told)).to(batch.images.device) for who in (self.judge, self.listener))
        parts = {"judge": own, "listener": other}
        errors = [mine or theirs for mine, theirs in zip(self.judge.errors(own), self.listener.errors(other), strict=True)]
        return RewardOutput.of(
            (own + other) / 2, components=parts, uncertainty=(own - other).abs() / 2, info={"texts": said, "errors": errors}
        )

    @staticmethod
    def _yes(who: Judge, questions: list[Question]) -> Tensor:
        yes, no = who.choose(questions, ("yes", "no")).cpu().unbind(1)
        return (yes - no).sigmoid()
