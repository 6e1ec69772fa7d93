"""PromptEcho: how likely a vision-language model finds the prompt as a description of the picture.

(arXiv 2604.12652.) One forward and no sampling: the prompt is the answer that the model is made to give. The mean runs over tokens, so
that prompts of any length compare, and every word has its own share. Differs from the paper: the share of the prompt that the model finds
likely without looking can be subtracted (`control`), which makes scores of different prompts comparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from visalign.judges import Echo, Judge, Question, load_judge
from visalign.questions import CAPTION
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


class PromptEcho(Reward):
    """r(x, c) = mean over tokens of log P(c_t | x, q, c_<t), in nats (arXiv 2604.12652).

    Args:
        checkpoint, server, batch: see `visalign.judges.load_judge`; a server must be a vLLM that sends `prompt_logprobs`.
        query: q, what the prompt answers.
        control: subtract the same mean for a plain grey picture. It is the same for all pictures of a prompt.

    `info["words"]` has for each picture its (token, log-probability) pairs: a dense, word-level reward. Component "least" (N,) is the
    least likely token's.

    Raises:
        UserError: no such model or server.
    """

    spec = RewardSpec(
        "prompt_echo",
        differentiable=True,  # at best: a server's judge has no gradient
        needs=frozenset({"prompt"}),
        range=(-math.inf, 0.0),
        model_id="Qwen/Qwen3-VL-8B-Instruct",
        licence="Apache-2.0",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        server: str | dict[str, Any] | None = None,
        query: str = CAPTION,
        control: bool = False,
        batch: int = 16,
    ):
        self.judge: Judge = load_judge(checkpoint, server, batch)
        self.query, self.control = query, control
        limits = (-math.inf, math.inf) if control else (-math.inf, 0.0)
        self.spec = replace(self.spec, range=limits, differentiable=self.judge.differentiable, model_id=self.judge.name)
        self._blind: dict[tuple[str, tuple[int, ...]], float] = {}

    @classmethod
    def gradient_with(cls, options: Mapping[str, Any]) -> bool | None:
        """Not by a server; in this process it depends on the model's picture processor."""
        return None if options.get("server") is None else False

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; invalid where the judge failed, the prompt is empty or a picture isn't finite."""
        sound = batch.images.flatten(1).isfinite().all(1)
        echoes = self._echoes(batch.images, batch.prompts)
        means = [batch.images.new_tensor(math.nan) if echo is None else echo.log_probs.mean() for echo in echoes]
        least = [batch.images.new_tensor(math.nan) if echo is None else echo.log_probs.min() for echo in echoes]
        scores = torch.where(sound, torch.stack([m.float().to(sound.device) for m in means]), torch.nan)
        if self.control:
            scores = scores - self._without_looking(batch).to(scores)
        words = [None if e is None else list(zip(e.tokens, e.log_probs.detach().tolist(), strict=True)) for e in echoes]
        parts = {"least": torch.stack([v.detach().float().to(sound.device) for v in least])}
        return RewardOutput.of(scores, components=parts, info={"words": words, "errors": self.judge.errors(scores)})

    def _echoes(self, images: Tensor, prompts: list[str]) -> list[Echo | None]:
        asked = [n for n, prompt in enumerate(prompts) if prompt.strip()]
        found = iter(self.judge.echo([Question((images[n],), self.query, prompts[n].strip()) for n in asked]))
        return [next(found) if prompt.strip() else None for prompt in prompts]

    def _without_looking(self, batch: RewardInput) -> Tensor:
        """(N,) the score of a grey picture of the same size; computed once per prompt."""
        size = tuple(batch.images.shape[1:])
        new = [prompt for prompt in dict.fromkeys(batch.prompts) if (prompt, size) not in self._blind]
        if new:
            grey = torch.full((len(new), *size), 0.5, device=batch.images.device)
            for prompt, echo in zip(new, self._echoes(grey, new), strict=True):
                self._blind[prompt, size] = math.nan if echo is None else echo.log_probs.detach().mean().item()
        return torch.tensor([self._blind[prompt, size] for prompt in batch.prompts])
