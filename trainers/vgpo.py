"""VGPO (arXiv 2512.12387): values of denoising steps from one-step estimates, with an anchor that outlives the group's spread.

A point in the space of `flow_grpo`. What differs from Flow-GRPO is the credit (`credit.kind: value`):

1. Eq. 9: a step's instant reward is that of the picture which one Euler step to the end reaches from the latents after it. The
   network's output there is that of the next rollout step, so it costs decoding and scoring, no denoising.
2. Eq. 10: a step's value is the discounted sum of the instant rewards from it to the end (`credit.discount`; the paper's is not known).
3. Eq. 11: advantages are weighted by value over its mean along the path.
4. Eq. 13: besides the group-normalised value an absolute term, `credit.anchor` × value, on the first `credit.anchor_steps` steps, so that
   a signal stays where the group's spread vanishes and GRPO has none (the paper's factor std/(std + ε) would vanish with it).

Weights and anchor need rewards that are never negative; others are refused.
"""

from __future__ import annotations

from typing import ClassVar

from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class VGPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {"credit": {"kind": "value", "std": "group"}}
