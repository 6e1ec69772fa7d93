"""Gate: quality counts only where a condition holds, so that no gain in one can pay for a loss of the other, as it can in a sum.

The hard gate in use as a safety or correctness mask. Differs from the usual product with an indicator: what a failing sample gets must be
no better than any passing one, which is checked; zero is not, for a reward that can be negative.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visalign.composite import Composite, Members
from visalign.errors import UserError
from visalign.scoring import RewardInput, RewardOutput


class Gate(Composite):
    """Σ weight · r over the other members where r_gate ≥ threshold, else `failed`; keeps the gradients of the others.

    Args:
        of: the members; the weight of the gate doesn't matter.
        gate: alias of the member that decides.
        threshold: τ, in the unit of the gate's score.
        failed: score of a sample that fails; "group_minimum": the lowest valid sum in its group, so that none of the group does worse.
            Give a number where there are no groups, as in `visalign score`.

    Component "passes" (N,): 1 or 0.

    Raises:
        UserError: no member of that alias, or `failed` is above the lowest possible score of the others.
    """

    def __init__(self, of: Members, gate: str, threshold: float, failed: float | Literal["group_minimum"] = "group_minimum"):
        if gate not in of:
            raise UserError(f"gate: gate={gate!r} is none of the rewards in `of`: {', '.join(of)}")
        super().__init__({alias: (reward, 0.0 if alias == gate else weight) for alias, (reward, weight) in of.items()}, name="gate")
        self.gate, self.threshold, self.failed = gate, threshold, failed
        ends = [sorted(weight * end for end in of[a][0].spec.range) for a, weight in self.panel.weights.items() if weight]
        low, high = (sum(end[side] for end in ends) for side in (0, 1))
        if isinstance(failed, str):
            self.own |= {"scope": "group", "needs": self.spec.needs | {"groups"}, "range": (low, high)}
        elif failed > low:
            raise UserError(
                f"gate: failed={failed:g} can be better than passing, since the other rewards go down to {low:g}; give no more than that, "
                "or failed=group_minimum"
            )
        else:
            self.own["range"] = failed, max(high, failed)

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; invalid where any member is."""
        scored = self.panel.score(batch)
        quality, decides = scored.total, scored.outputs[self.gate].scores.detach().to(scored.total.device)
        if isinstance(self.failed, str):
            assert batch.groups is not None
            failed = group_minimum(quality.detach(), batch.groups.to(quality.device))
        else:
            failed = torch.full_like(quality, self.failed)
        passes = decides >= self.threshold
        valid = quality.isfinite() & decides.isfinite()
        scores = torch.where(valid, torch.where(passes, quality, failed), torch.nan)
        return self.result(scored, scores, components={"passes": torch.where(valid, passes.float(), torch.nan)})


def group_minimum(values: Tensor, groups: Tensor) -> Tensor:
    """(N,) the lowest finite value in each one's group; +∞ in a group without any."""
    names, index = groups.unique(return_inverse=True)
    lowest = values.new_full((len(names),), torch.inf)
    return lowest.scatter_reduce(0, index, values.nan_to_num(torch.inf), "amin")[index]
