"""TempFlow-GRPO (arXiv 2508.04324): one stochastic step per path, so that the terminal reward is that step's own.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. exploration: members of a group with equal initial noise follow one ODE path; each leaves it at its own step by one stochastic
   transition and goes on by the ODE. `exploration.seeds` initial noises per group; branch steps are dealt out evenly within
   `exploration.range`. The authors' 24 are 4 seeds × 6 explorations.
2. credit: a member is compared with those that left the same path at the same step (`credit.kind: own_branch`).
3. ratio: plain, and each step's loss is weighted by its noise over the mean of the steps', ς/mean ς (`ratio.weight: noise`).
"""

from __future__ import annotations

from typing import ClassVar

from visalign.config import Positive
from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class TempFlowGRPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "one_branch", "seeds": 4},
        "credit": {"kind": "own_branch", "std": "group"},
        "ratio": {"weight": "noise"},
    }

    class Config(FlowGRPO.Config):
        group_size: Positive = 24
