"""What a search over pictures may spend, what it has found, and the states in which it can be watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.config import Above, Positive, Section
from visalign.rollout import Sliceable


class Budget(Section):
    """What a search may spend; what is used up first ends it, and the best pictures so far are the result."""

    nfe: Above | None = None  # per returned picture: denoiser forwards, guidance counting 2, and backwards twice
    reward_calls: Positive | None = None  # per returned picture: pictures scored, by all rewards together
    seconds: Above | None = None  # of the whole call, once everything is loaded; the first picture is always finished
    memory: Above | None = None  # GB of a CUDA device that this process may hold, weights included; kept by smaller batches

    @property
    def ends(self) -> bool:
        """Whether it ends a search at all."""
        return any(limit is not None for limit in (self.nfe, self.reward_calls, self.seconds))


class Stochastic(Section):
    """How methods that choose among random steps make them; a noise-free chain leaves nothing to choose."""

    transition: Literal["ddim", "dpm_sde", "cps", "flow_sde", "dance_sde"] = "ddim"
    level: Above = 1.0  # noise level: a, η of the transition


@dataclass(frozen=True)
class Found(Sliceable):
    """Pictures that have been looked at.

    Attributes:
        latents: (M, ...) clean, or estimates of the clean.
        images: (M, 3, H, W) float in [0, 1], or videos (M, F, 3, H, W).
        scores: reward name -> (M,), with "total"; NaN where a reward failed; empty without a reward.
    """

    latents: Tensor
    images: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def take(self, rows: slice | Tensor) -> Found:
        return Found(self.latents[rows], self.images[rows], {name: values[rows] for name, values in self.scores.items()})

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """One behind the other."""
        scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
        return cls(torch.cat([part.latents for part in parts]), torch.cat([part.images for part in parts]), scores)

    @property
    def total(self) -> Tensor:
        """(M,) to compare by: -inf where a reward failed, 0 where there is none."""
        if "total" not in self.scores:
            return self.images.new_zeros(len(self.images))
        total = self.scores["total"]
        return torch.where(total.isnan(), -math.inf, total)

    @property
    def figures(self) -> dict[str, float]:
        """The mean score, for a trace; nothing without a reward."""
        return {"mean": self.scores["total"].nanmean().item()} if self.scores else {}


@dataclass(frozen=True)
class State:
    """Where a search is, for whoever watches.

    Attributes:
        step, steps: denoising steps, rounds or candidates done, and how many there will be; 0 where only the budget knows.
        latents: (N, ...) what each picture looks like now: clean latents, or estimates of them.
        best: of all pictures finished so far; None before the first.
        nfe, nfe_backward: denoiser forwards and backwards per returned picture, so far.
        reward_calls: pictures scored so far, all N together.
        seconds: since the start.
        figures: what else a method has to say, means over pictures.
        result: in the last state of a stream, the `visalign.drawing.Result`.
    """

    step: int
    steps: int
    latents: Tensor
    best: Found | None
    nfe: float
    nfe_backward: float
    reward_calls: int
    seconds: float
    figures: dict[str, float]
    decode: Callable[[Tensor], Tensor] = field(repr=False)
    decoded: Tensor | None = field(default=None, repr=False)
    result: Any = None

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, H, W) in [0, 1]: `latents`, decoded when they are first asked for, unless they have been before."""
        return self.decode(self.latents) if self.decoded is None else self.decoded

    def record(self) -> dict[str, float]:
        """The state as a row of a trace."""
        row = {"step": self.step, "nfe": self.nfe, "nfe_backward": self.nfe_backward, "reward_calls": self.reward_calls}
        best = {"best": self.best.scores["total"].nanmean().item()} if self.best is not None and self.best.scores else {}
        return row | {"seconds": self.seconds} | best | self.figures
