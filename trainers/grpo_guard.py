"""GRPO-Guard (arXiv 2510.22319): a ratio without bias and of equal scale at every step, so that clipping works on both sides.

A point in the space of `flow_grpo`. What differs from Flow-GRPO is the ratio (`ratio.kind: guard`):

1. Eq. 8: the log-ratio's mean, -κ²mean(Δv²)/2ς² under the old policy, is added back, and what is left is multiplied by ς. In closed form,
   from the noise that was drawn and the velocity that was predicted: log r = κ·mean(ε ⊙ Δv); no density is evaluated.
2. Eq. 12: a step's loss is divided by its size Δ (`ratio.weight: inverse_gap`), which makes the gradient's gain equal at all steps of
   Flow-SDE, where |κ| = Δ(1 + a²/2). For other transitions `ratio.weight: equal_gain` divides by |κ| itself.

Its log-ratios are smaller by ς, so the clip range is, too; the authors' is not known.
"""

from __future__ import annotations

from typing import ClassVar

from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class GRPOGuard(FlowGRPO):
    defaults: ClassVar[Defaults] = {"ratio": {"kind": "guard", "weight": "inverse_gap", "clip": 2e-6}}
