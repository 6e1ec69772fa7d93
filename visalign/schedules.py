"""Grids of times from noise to data, and plans of which of their steps are stochastic and recorded.

A grid is a float32 tensor (T + 1,) that decreases to 0; step j goes from `grid[j]` to `grid[j + 1]`. Unlike most schedulers there are no
integer timesteps: a model that wants them gets σ·1000 as a float.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class StepPlan:
    """What happens at each of T steps.

    Attributes:
        stochastic: T flags; the others follow the ODE.
        recorded: the contiguous steps that are stored and may be trained; all of them stochastic, because the ODE has no density.

    Raises:
        ValueError: a recorded step lies outside the grid, is deterministic, or steps are left out between recorded ones.
    """

    stochastic: tuple[bool, ...]
    recorded: range

    def __post_init__(self) -> None:
        inside = all(0 <= step < len(self.stochastic) for step in self.recorded)
        if self.recorded.step != 1 or not inside or not all(self.stochastic[step] for step in self.recorded):
            raise ValueError(f"recorded {self.recorded} must be consecutive stochastic steps, and these are {self.stochastic}")

    def __len__(self) -> int:
        return len(self.stochastic)


def span(steps: int, start: int, size: int) -> StepPlan:
    """Stochastic and recorded from `start` on for `size` steps, ODE elsewhere."""
    return StepPlan(tuple(start <= step < start + size for step in range(steps)), range(start, start + size))


def all_steps(steps: int, last: bool = False) -> StepPlan:
    """Every step is stochastic and recorded but the last, which would leave noise in the picture; `last` includes it (Flow-GRPO)."""
    return span(steps, 0, steps if last else steps - 1)


def window(steps: int, size: int, low: int, high: int, seed: int, step: int) -> StepPlan:
    """`size` stochastic steps inside [low, high) (Flow-GRPO-Fast); the start is uniform in [low, high - size].

    A function of (seed, training step) alone, so that all ranks draw the same window and a resumed run the same sequence.

    Raises:
        ValueError: no window of that size fits.
    """
    if not 0 <= low < low + size <= high <= steps:
        raise ValueError(
            f"no window of {size} steps in [{low}, {high}) of {steps} steps; want size >= 1 and 0 <= low <= high - size <= steps - size"
        )
    return span(steps, random.Random(f"window/{seed}/{step}").randint(low, high - size), size)


def deterministic(steps: int) -> StepPlan:
    """The ODE at every step; nothing is recorded."""
    return span(steps, 0, 0)
