"""BranchGRPO (arXiv 2509.06040): a group is a tree of denoising paths with a common root; rewards flow from the leaves upward.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. exploration: every node splits at the steps `exploration.branches`; prefixes are shared and drawn once. `trainer.group_size` is the
   number of leaves, width^splits. Siblings' noise has unit variance and a correlation of 1/(1 + spread²), as in the paper; their code
   multiplies the noise by four instead and scores it with the density of the unscaled, which is off-policy by construction.
2. credit: a node is worth the mean of its leaves, normalised over the nodes of its depth and tree; an edge has its child's advantage.
3. transition: DanceGRPO's SDE.
4. pruning (`exploration.prune`): by depth, moving one step earlier every so many training steps, and by width: the best leaves of each
   last split, or the best and worst of the tree. The authors' first form keeps the earliest edges by sort order; ours compares leaves.
5. BranchGRPO-Mix is `exploration.interval`: stochastic in windows of `exploration.size` steps from its multiples on, ODE between them.

The authors step the optimizer every 12 edges of one rollout; here one rollout is `trainer.updates` steps.
"""

from __future__ import annotations

from typing import ClassVar

from visalign.config import Positive
from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class BranchGRPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "tree", "branches": [0, 3, 6, 9], "width": 2, "spread": 4.0, "shared_noise": True},
        "transition": {"kind": "dance_sde", "level": 0.3},
        "credit": {"kind": "tree", "std": "group"},
        "ratio": {"clip": 1e-3},
    }

    class Config(FlowGRPO.Config):
        group_size: Positive = 16
