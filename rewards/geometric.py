"""Weighted geometric or harmonic mean of rewards on one scale: all must be good, since one near 0 pulls the whole down.

Members are brought to [0, 1] by their known ranges, or by their distribution over pictures of the untrained model, frozen. The harmonic
mean of two members with known ranges is λ-Harmonic's (Miao et al. 2024, arXiv 2407.12164). Differs from a plain product: the weights are
normalised, and a floor of `epsilon` keeps the gradient of a member at 0 finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from visalign.composite import Calibrated, Members, valid_scores
from visalign.errors import UserError
from visalign.scoring import RewardInput, RewardOutput, Scores

LEVELS = 101  # of a quantile table


class Geometric(Calibrated):
    """Π u^w or 1 / Σ (w / u), with Σ w = 1 and u in [ε, 1] for each member; in [ε, 1], differentiable if the members are.

    Args:
        of: the members, with weights above 0; with weight 0 a member is only shown.
        mean: "geometric" or "harmonic".
        scale: "range" maps a member's documented range onto [0, 1]; "quantile" its score to the share of the untrained model's pictures
            that it beats (half of those that it equals), which is 0 below and 1 above them all, without gradient there.
        epsilon: ε, what u = 0 becomes.
        pictures: of the untrained model for the quantiles.
        quantiles: file with them, from an earlier run.

    Components ALIAS/unit (N,): u.

    Raises:
        UserError: a weight below 0, or a member without a finite range and scale="range".
    """

    def __init__(
        self,
        of: Members,
        mean: Literal["geometric", "harmonic"] = "geometric",
        scale: Literal["range", "quantile"] = "range",
        epsilon: float = 1e-3,
        pictures: int = 256,
        quantiles: str | None = None,
    ):
        used = [alias for alias, (_, weight) in of.items() if weight]
        learns = [f"quantiles.{alias}" for alias in used] if scale == "quantile" else []
        super().__init__(of, learns=learns, pictures=pictures, file=quantiles, name="geometric", range=(epsilon, 1.0))
        if not 0 < epsilon < 1:
            raise UserError(f"geometric: epsilon must be in (0, 1), got {epsilon:g}")
        if negative := [alias for alias, weight in self.panel.weights.items() if weight < 0]:
            raise UserError(f"geometric: the weight of {negative[0]} is below 0; a mean has none")
        for alias in used if scale == "range" else ():
            if not all(map(math.isfinite, self.panel.rewards[alias].spec.range)):
                raise UserError(f"geometric: {alias} has no finite range; use scale=quantile")
        self.mean, self.scale, self.epsilon = mean, scale, epsilon
        whole = sum(self.panel.weights.values())
        self.shares = {alias: self.panel.weights[alias] / whole for alias in used}

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in [ε, 1]; invalid where any member with a weight is."""
        scored = self.panel.score(batch)
        units = {alias: self._unit(alias, scored.outputs[alias].scores) for alias in self.shares}
        floored = {alias: self.epsilon + (1 - self.epsilon) * unit for alias, unit in units.items()}
        if self.mean == "geometric":
            scores = torch.stack([share * floored[alias].log() for alias, share in self.shares.items()]).sum(0).exp()
        else:
            scores = 1 / torch.stack([share / floored[alias] for alias, share in self.shares.items()]).sum(0)
        return self.result(scored, scores, components={f"{alias}/unit": unit for alias, unit in units.items()})

    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        levels = torch.linspace(0, 1, LEVELS)
        tables = {alias: valid_scores(scored, alias, "geometric") for alias in self.shares}
        return {f"quantiles.{alias}": scores.quantile(levels.to(scores.device)) for alias, scores in tables.items()}

    def _unit(self, alias: str, scores: Tensor) -> Tensor:
        """(N,) in [0, 1]."""
        if self.scale == "range":
            low, high = self.panel.rewards[alias].spec.range
            return (scores - low) / (high - low)
        return beaten(scores, self.known(f"quantiles.{alias}").to(scores.device))


def beaten(scores: Tensor, table: Tensor) -> Tensor:
    """The share of a distribution that lies below each score, in [0, 1]: (N,) from (N,) and its quantiles (Q,) at equal levels.

    Linear between quantiles; a score that several quantiles equal gets the middle of their levels, a mean rank.
    """
    sides: list[Tensor] = []
    for right in (False, True):
        after = torch.searchsorted(table, scores.detach(), right=right).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        within = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        sides.append((after - 1 + torch.where(high > low, within, float(right))) / (len(table) - 1))
    return torch.where(scores.isnan(), scores, (sides[0] + sides[1]) / 2)
