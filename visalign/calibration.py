"""DenseGRPO's exploration calibration (arXiv 2601.20218): how much noise each denoising step bears.

A noise level is right where a step makes a picture better about as often as worse: with less it explores too little, with more it only does
damage. Levels are found once before training by rolling out, counting the signs of the steps' gains and nudging every step's level; they
are saved with what they were made for, and refused for anything else.

Differs from the paper: levels are bounded, a step without a valid gain keeps its level, and counts can be summed over ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError


@dataclass(frozen=True)
class Purpose:
    """What a calibration was made for: other values of any of these need another calibration.

    Attributes:
        policy: name of the model.
        steps: T, of the grid.
        guidance: scale of classifier-free guidance.
        transition: kind of stochastic transition whose levels these are.
        rewards: names of the rewards.
    """

    policy: str
    steps: int
    guidance: float
    transition: str
    rewards: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """Noise levels and how they were found.

    Attributes:
        levels: (T,) float64.
        history: (rounds + 1, T) float64, from the initial levels to the final ones.
        imbalance: (rounds, T) int64, gains above 0 less gains below 0, as seen at the levels of the same row of `history`.
    """

    levels: Tensor
    history: Tensor
    imbalance: Tensor


def calibrate(
    gain_signs: Callable[[Tensor], Tensor],
    levels: Tensor,
    *,
    rounds: int,
    tolerance: float = 2,
    step: float = 0.01,
    lowest: float,
    highest: float,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Calibration:
    """Raise the level of every step whose gains are balanced and lower the others', `rounds` times.

    A step is balanced if |#(gain > 0) - #(gain < 0)| < tolerance (the paper's ε₁ = 2; its ε₂ = 0.01 is `step`). That difference grows with
    the root of the number n of non-zero gains even if both signs are equally likely: it is below 2 half of the time at n = 9, but only one
    time in six at n = 24, where every level then sinks to the lowest. A balanced step rises on average if the tolerance is above 0.67·√n;
    1.5·√n is met by 87 % of balanced rounds.

    Args:
        gain_signs: levels (T,) float64 -> (N, T) gains or their signs of a new rollout at these levels; NaN where there is none.
        levels: (T,) to start with.
        rounds: ≥ 1.
        lowest, highest: bounds of all levels, the first ones included.
        total: sums a (3, T) int64 tensor over ranks.

    Raises:
        ValueError: no rounds, no range or not one level per step.
    """
    if rounds < 1 or step <= 0 or not lowest <= highest or levels.ndim != 1:
        raise ValueError(
            f"calibration wants levels (T,), rounds >= 1, step > 0 and lowest <= highest, "
            f"not levels {tuple(levels.shape)}, rounds {rounds}, step {step}, lowest {lowest}, highest {highest}"
        )
    history = [levels.detach().cpu().double().clamp(lowest, highest)]
    imbalance: list[Tensor] = []
    for _ in range(rounds):
        found = gain_signs(history[-1])
        counts = torch.stack([(found > 0).sum(0), (found < 0).sum(0), found.isfinite().sum(0)])
        better, worse, valid = (counts if total is None else total(counts)).cpu().unbind()
        imbalance.append(better - worse)
        moved = torch.where(imbalance[-1].abs() < tolerance, history[-1] + step, history[-1] - step).clamp(lowest, highest)
        history.append(torch.where(valid > 0, moved, history[-1]))
    return Calibration(history[-1], torch.stack(history), torch.stack(imbalance))


def save(path: Path, calibration: Calibration, purpose: Purpose) -> None:
    """Write a calibration as JSON, beside what it is for."""
    tables = {field.name: getattr(calibration, field.name).tolist() for field in fields(calibration)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made_for": asdict(purpose), **tables}, indent=1), encoding="utf-8")


def load(path: Path, purpose: Purpose) -> Calibration:
    """Read a calibration that was made for this purpose.

    Raises:
        UserError: the file is missing or no calibration, or was made for something else.
    """
    if not path.is_file():
        raise UserError(f"calibration {path} does not exist; calibrate first, or give the path of a calibration's JSON file")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_for = Purpose(**{**content["made_for"], "rewards": tuple(content["made_for"]["rewards"])})
        levels, history = (torch.tensor(content[name], dtype=torch.float64) for name in ("levels", "history"))
        calibration = Calibration(levels, history, torch.tensor(content["imbalance"], dtype=torch.int64))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a calibration ({type(error).__name__}: {error}); calibrate again") from None
    found, wanted = asdict(made_for), asdict(purpose)
    if different := [f"{name} {found[name]!r}, not {wanted[name]!r}" for name in wanted if found[name] != wanted[name]]:
        raise UserError(f"calibration {path} was made for {'; '.join(different)}: calibrate again for this recipe")
    if levels.shape != (purpose.steps,) or not all(math.isfinite(level) and level >= 0 for level in levels.tolist()):
        raise UserError(f"calibration {path} must hold a level >= 0 for each of {purpose.steps} steps; calibrate again")
    return calibration
