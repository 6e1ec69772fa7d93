"""Grids of times from noise to data, and plans of which of their steps are stochastic, recorded and branching.

A grid is a float32 tensor (T + 1,) of a path's times that decreases from noise to data; step j goes from `grid[j]` to `grid[j + 1]`. The
grids made here are of flows, whose times are σ from 1 to 0. Unlike most schedulers there are no integer timesteps: a model that wants them
gets σ·1000 as a float. Plans and tails are for the grid of any path.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

WindowRule = Literal["random", "fixed", "progressive", "exp_decay"]


def linear(steps: int, device: torch.device | str | None = None) -> Tensor:
    """Evenly spaced times from 1 to 0: (steps + 1,)."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).to(device, torch.float32)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """More steps at high noise, σ → k·σ/(1 + (k - 1)·σ) (arXiv 2403.03206, Eq. 23); k = e^μ is FLUX's resolution-dependent shift.

    Written so that 1 stays exactly 1 and 0 exactly 0 for every `shift` > 0.
    """
    return sigmas / (sigmas + (1 - sigmas) / shift)


def stretched(sigmas: Tensor, terminal: float) -> Tensor:
    """The non-zero part of a grid, at least two times from 1 on, stretched linearly so that it ends at `terminal` (Qwen-Image, LTX)."""
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def flow_match_euler(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler with a fixed shift: (steps + 1,) float32.

    Its smallest time 1/1000 is shifted once when the scheduler is built, and the even spacing that ends there is shifted again: the last
    step before 0 is therefore much smaller than that of `shifted(linear(steps), shift)`.

    Args:
        steps: T ≥ 1; at least 2 with a `terminal`.
        shift: k > 0; SD3.5 uses 3.
        terminal: where to stretch the last non-zero time to, if anywhere.

    Raises:
        ValueError: one step cannot both start at 1 and end at `terminal`.
    """
    if terminal is not None and steps < 2:
        raise ValueError(f"a grid of {steps} step cannot be stretched to end at {terminal}; take at least 2 steps")
    smallest = float(shifted(torch.tensor(1e-3, dtype=torch.float64), shift))
    sigmas = shifted(torch.linspace(1, smallest, steps, dtype=torch.float64), shift)
    if terminal is not None:
        sigmas = stretched(sigmas, terminal)
    return torch.nn.functional.pad(sigmas, (0, 1)).float()


def tail(sigmas: Tensor, start: int, steps: int) -> Tensor:
    """A coarser end of the grid: (steps + 1,) times from `sigmas[start]` to its last, evenly spaced in the grid's own index.

    Between its points the grid (T + 1,) is linear; with steps = T - start the result is `sigmas[start:]` to the bit.
    """
    last = len(sigmas) - 1
    index = torch.linspace(start, last, steps + 1, dtype=torch.float64, device=sigmas.device)
    below = index.floor().clamp(max=last - 1).long()
    return torch.lerp(sigmas[below], sigmas[below + 1], (index - below).to(sigmas))


@dataclass(frozen=True)
class StepPlan:
    """What happens at each of T steps.

    Attributes:
        stochastic: T flags; the others follow the ODE.
        recorded: increasing steps that are stored and may be trained; all of them stochastic, because the ODE has no density.
        widths: children per node at each of the T steps; empty for a chain.
        finish: steps of DPM-Solver++ 2M that replace Euler's after the last stochastic step; None keeps the grid's.

    Raises:
        ValueError: a recorded step lies outside the grid, is deterministic, or comes twice or out of order; a branching step isn't
            recorded; there is nothing to finish.
    """

    stochastic: tuple[bool, ...]
    recorded: tuple[int, ...]
    widths: tuple[int, ...] = ()
    finish: int | None = None

    def __post_init__(self) -> None:
        inside = all(0 <= step < len(self.stochastic) for step in self.recorded)
        if list(self.recorded) != sorted(set(self.recorded)) or not inside or not all(self.stochastic[step] for step in self.recorded):
            raise ValueError(f"recorded {self.recorded} must be increasing stochastic steps, and these are {self.stochastic}")
        if self.widths and (len(self.widths) != len(self) or min(self.widths) < 1):
            raise ValueError(f"widths {self.widths} must be {len(self)} numbers of children, each at least 1")
        if not set(self.splits) <= set(self.recorded):
            raise ValueError(f"branching steps {self.splits} must be stochastic and recorded, and recorded are {self.recorded}")
        if self.finish is not None and (self.finish < 1 or True not in self.stochastic or self.stochastic[-1]):
            raise ValueError(
                f"{self.finish} steps can't finish {self.stochastic}; want at least 1, after a stochastic step and before the end"
            )

    def __len__(self) -> int:
        return len(self.stochastic)

    @property
    def before(self) -> tuple[int, ...]:
        """For each recorded step its column among the stored states: consecutive steps share the state between them."""
        gaps = [0, *(int(b != a + 1) for a, b in pairwise(self.recorded))][: len(self.recorded)]
        return tuple(k + sum(gaps[: k + 1]) for k in range(len(self.recorded)))

    @property
    def stored(self) -> tuple[int, ...]:
        """For each column of the stored states its point of the grid."""
        return tuple(sorted({point for step in self.recorded for point in (step, step + 1)}))

    @property
    def splits(self) -> tuple[int, ...]:
        """The steps at which a node has several children."""
        return tuple(step for step, width in enumerate(self.widths) if width > 1)

    @property
    def leaves(self) -> int:
        """Pictures per tree; 1 for a chain."""
        return math.prod(self.widths)

    @property
    def handover(self) -> int:
        """The step at which the finishing solver takes over; T where there is none."""
        return len(self) if self.finish is None else len(self) - self.stochastic[::-1].index(True)


def span(steps: int, start: int, size: int) -> StepPlan:
    """Stochastic and recorded from `start` on for `size` steps, ODE elsewhere."""
    return StepPlan(tuple(start <= step < start + size for step in range(steps)), tuple(range(start, start + size)))


def all_steps(steps: int, last: bool = False) -> StepPlan:
    """Every step is stochastic and recorded but the last, which would leave noise in the picture; `last` includes it (Flow-GRPO)."""
    return span(steps, 0, steps if last else steps - 1)


def window(
    steps: int,
    size: int,
    low: int,
    high: int,
    seed: int,
    step: int,
    rule: WindowRule = "random",
    *,
    every: int = 25,
    stride: int = 1,
    rate: float = 0.1,
    after: int = 13,
) -> StepPlan:
    """`size` stochastic steps inside [low, high); where they start at training step `step` is `window_start`'s to say.

    Raises:
        ValueError: no window of that size fits.
    """
    if not 0 <= low < low + size <= high <= steps:
        raise ValueError(
            f"no window of {size} steps in [{low}, {high}) of {steps} steps; want size >= 1 and 0 <= low <= high - size <= steps - size"
        )
    return span(steps, window_start(rule, step, size, low, high, seed=seed, every=every, stride=stride, rate=rate, after=after), size)


def window_start(
    rule: WindowRule,
    step: int,
    size: int,
    low: int,
    high: int,
    *,
    seed: int = 0,
    every: int = 25,
    stride: int = 1,
    rate: float = 0.1,
    after: int = 13,
) -> int:
    """The first of a window's `size` steps inside [low, high).

    A function of (seed, training step) alone, so that all ranks take the same window and a resumed run the same sequence.

    - random: uniform in [low, high - size] (Flow-GRPO-Fast).
    - fixed: `low`.
    - progressive: from `low` towards data (MixGRPO, arXiv 2507.21802), `every` training steps at each start, then `stride` further. A
      window that would leave [low, high) begins again at `low`; the authors' code only rolls back one block after its window is empty.
    - exp_decay: the same, but ceil(every·exp(-rate·max(0, start - after))) training steps at each start, their late windows being short.

    Args:
        step: of the training, from 1 on.
        every, stride: at least 1.
    """
    if rule == "fixed":
        return low
    if rule == "random":
        return random.Random(f"window/{seed}/{step}").randint(low, high - size)
    decay = rate if rule == "exp_decay" else 0.0
    starts = range(low, high - size + 1, stride)
    ends = list(accumulate(math.ceil(every * math.exp(-decay * max(0, start - after))) for start in starts))
    position = (step - 1) % ends[-1]
    return next(start for start, end in zip(starts, ends, strict=True) if position < end)


def flash(plan: StepPlan, share: float) -> StepPlan:
    """`plan` with the Euler steps after its last stochastic one replaced by `share` times as many of DPM-Solver++ 2M, at least 1.

    MixGRPO-Flash (arXiv 2507.21802): l + w + share·(T - l - w) steps in all for a window of w from l on. The authors' code lays as many
    points as we lay steps.
    """
    left = len(plan) - replace(plan, finish=1).handover
    return replace(plan, finish=max(1, round(share * left)))


def tree(steps: int, branches: Sequence[int], width: int = 2, last: bool = False) -> StepPlan:
    """Every step stochastic and recorded but the last (`last` includes it), and `width` children at the steps `branches` (BranchGRPO).

    Raises:
        ValueError: a branching step lies outside the grid or isn't stochastic.
    """
    return _branching(all_steps(steps, last), branches, width)


def mixed_tree(steps: int, branches: Sequence[int], width: int = 2, *, size: int, interval: int) -> StepPlan:
    """BranchGRPO-Mix (arXiv 2509.06040): `size` stochastic steps at every multiple of `interval`, and the branching steps; ODE elsewhere.

    Only the stochastic steps are recorded; the last step is never one.

    Raises:
        ValueError: a branching step lies outside the grid or is its last.
    """
    stochastic = tuple(step < steps - 1 and (step % interval < size or step in branches) for step in range(steps))
    return _branching(StepPlan(stochastic, tuple(step for step in range(steps) if stochastic[step])), branches, width)


def _branching(plan: StepPlan, branches: Sequence[int], width: int) -> StepPlan:
    if not set(branches) <= set(plan.recorded):
        raise ValueError(f"branching steps {tuple(branches)} must be stochastic steps of the {len(plan)}, {plan.recorded}")
    return replace(plan, widths=tuple(width if step in branches else 1 for step in range(len(plan))))


def deterministic(steps: int) -> StepPlan:
    """The ODE at every step; nothing is recorded."""
    return span(steps, 0, 0)
