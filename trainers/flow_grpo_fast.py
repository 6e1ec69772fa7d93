"""Flow-GRPO-Fast (arXiv 2505.05470, code of October 2025): stochastic steps, and training, in a short random window only.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. exploration: three steps, their start uniform in the first half of the grid; ODE before and after. One window for all ranks and all
   members of a group (the authors draw it per call, so that members of a group may have different windows).
2. transition: coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952) with η = 0.8.
3. ratio: CPS's own scale, the log-ratio times 2ς², with a clip range of 1e-5; without this a small clip range is a must (authors' README).
4. no guidance and no KL, as they recommend: training absorbs guidance.
"""

from __future__ import annotations

from typing import ClassVar

from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class FlowGRPOFast(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "window", "size": 3, "rule": "random"},
        "transition": {"kind": "cps", "level": 0.8},
        "ratio": {"kind": "cps", "clip": 1e-5},
    }
