"""Pictures of the past, as features: what a reward that learns is shown again, so that it does not forget how it was fooled before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """N pictures as a head sees them: `image` (N, D), `patches` (N, S, D), and `prompt` (N,) int64, a number for each prompt."""

    image: Tensor
    patches: Tensor
    prompt: Tensor


class Replay(nn.Module):
    """A uniform sample of all generated pictures so far, as features in half precision (reservoir sampling)."""

    image: Tensor
    patches: Tensor
    prompt: Tensor
    seen: Tensor

    def __init__(self, capacity: int, patches: int, width: int):
        super().__init__()
        self.register_buffer("image", torch.zeros(capacity, width, dtype=torch.float16))
        self.register_buffer("patches", torch.zeros(capacity, patches, width, dtype=torch.float16))
        self.register_buffer("prompt", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def add(self, features: Features, generator: torch.Generator) -> None:
        first, capacity = int(self.seen), len(self.prompt)
        for row in range(len(features.prompt)):
            place = first + row if first + row < capacity else int(torch.randint(first + row + 1, (), generator=generator))
            if place < capacity:
                self.image[place], self.patches[place] = features.image[row].half(), features.patches[row].half()
                self.prompt[place] = features.prompt[row]
        self.seen += len(features.prompt)

    def sample(self, count: int, generator: torch.Generator) -> Features:
        """At most `count` of them, without repeats."""
        rows = torch.randperm(min(int(self.seen), len(self.prompt)), generator=generator)[:count].to(self.prompt.device)
        return Features(self.image[rows].float(), self.patches[rows].float(), self.prompt[rows])
