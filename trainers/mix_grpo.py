"""MixGRPO (arXiv 2507.21802): stochastic steps in a window that moves from noise to data as training goes on; ODE elsewhere.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. exploration: a window of four steps that moves by one every 25 training steps (`rule: exp_decay` is their other schedule,
   `fixed` their "frozen"). Groups share their initial noise, so the steps before the window are computed once per prompt; the authors
   compute them for every member. The window rolls back once it reaches the end; theirs is empty, without a gradient, for one period first.
2. credit: each reward is normalised in its group before the weighted sum, with the population's standard deviation (theirs has n - 1).
3. MixGRPO-Flash is `exploration.finish: 0.4`: second-order DPM-Solver++ over that share of the steps after the window; Flash* also has
   `exploration.rule: fixed`.
"""

from __future__ import annotations

from typing import ClassVar

from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class MixGRPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "window", "size": 4, "rule": "progressive", "every": 25, "stride": 1, "shared_noise": True},
        "transition": {"kind": "flow_sde", "level": 0.7},
        "credit": {"std": "group", "aggregation": "gdpo"},
        "ratio": {"clip": 1e-4},
    }
