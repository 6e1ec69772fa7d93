"""DanceGRPO (arXiv 2505.07818): Flow-GRPO with constant noise, one initial noise per group, on a random subset of timesteps.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. transition: the same SDE with diffusion η = 0.3 at all times, so no singularity at σ = 1 and far less excess noise.
2. exploration: all steps but the last are stochastic (the authors add noise there too and decode the clean estimate instead), and a group
   shares its initial noise.
3. what is trained: for every sample a random `fraction` of its steps, and with `credit.keep: [4, 4]` the four best and the four worst of
   each group alone (their best-of-n).
4. credit: normalised by the group's own standard deviation, the population's (theirs has n - 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from visalign.config import Fraction
from visalign.noise import seed_for
from visalign.rollout import Rollout
from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class DanceGRPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "all", "shared_noise": True},
        "transition": {"kind": "dance_sde", "level": 0.3},
        "credit": {"std": "group"},
        "ratio": {"clip": 1e-4},
    }

    class Config(FlowGRPO.Config):
        fraction: Fraction = 0.6  # of its recorded steps that a sample trains, drawn anew for each

    def select(self, rollout: Rollout, step: int) -> Tensor:
        chosen = super().select(rollout, step)
        columns = chosen.shape[1]
        count = max(1, int(columns * self.settings.fraction))
        seed = seed_for(self.config.run.seed, self.processes.rank, step)
        order = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).to(chosen.device)
        return chosen & (order < count)
