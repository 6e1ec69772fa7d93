"""DenseGRPO (arXiv 2601.20218): each denoising step is paid the reward that it gained, with noise calibrated step by step.

A point in the space of `flow_grpo`. What differs from Flow-GRPO:

1. credit (`credit.kind: gain`): the reward of a latent is that of the picture its ODE ends in; a step's credit is the latent's reward after
   it less before it, normalised in the group at that step, with a floor under the spread. Gains of a path telescope to its reward less that
   of its initial noise. `credit.completion: n` completes in n solver steps instead of all that are left (the paper finds 1 worse than
   terminal credit), `credit.solver: dpm2m` in second-order ones.
2. exploration: calibrated. Before training, rollouts move each step's noise level until gains and losses balance (§ exploration
   calibration); the levels are the diffusion itself, so Dance-SDE's transition with one level per step. They are saved as
   `calibration.json` in the run folder and used again when it resumes; `transition.calibration` names another run's.

The paper's tolerance, a difference of 2 between gains and losses, holds for few paths alone: that difference grows with the root of their
number, so ours is `tolerance` times that root.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from visalign import calibration
from visalign.config import AtLeastZero, Fraction
from visalign.credit import gains
from visalign.sampling import Dynamics
from visalign.trainer import Defaults
from visalign.trainers.flow_grpo import FlowGRPO


class DenseGRPO(FlowGRPO):
    defaults: ClassVar[Defaults] = {
        "exploration": {"kind": "all", "shared_noise": True},
        "transition": {"kind": "dance_sde", "level": 0.7},
        "credit": {"kind": "gain", "std": "group", "floor": 0.01},
    }

    class Config(FlowGRPO.Config):
        rounds: int = 0  # of calibration, each one rollout; 0 keeps transition.level at all steps
        tolerance: AtLeastZero = 1.5  # difference of gains and losses that counts as balanced, over the root of the number of paths
        rate: Fraction = 0.05  # by which a level moves in a round
        lowest: AtLeastZero = 0.1
        highest: AtLeastZero = 1.5

    def fit(self) -> Path:
        self.calibrate()
        return super().fit()

    def calibrate(self) -> None:
        """Find the noise level of every step, or read what was found before."""
        config, given = self.config, self.config.transition.calibration
        kept = config.run.path / "calibration.json"
        purpose = calibration.Purpose(
            config.policy.model, config.policy.steps, config.policy.guidance, config.transition.kind, tuple(sorted(config.rewards))
        )
        if given or kept.is_file():
            self.use(calibration.load(Path(given) if given else kept, purpose).levels)
        elif self.settings.rounds:
            start = torch.full((config.policy.steps,), config.transition.level, dtype=torch.float64)
            paths = self.settings.prompts * self.settings.group_size
            found = calibration.calibrate(
                partial(self.gains_at, count(1)),
                start,
                rounds=self.settings.rounds,
                tolerance=self.settings.tolerance * paths**0.5,
                step=self.settings.rate,
                lowest=self.settings.lowest,
                highest=self.settings.highest,
                total=self.processes.sum,
            )
            if self.processes.main:
                calibration.save(kept, found, purpose)
            self.use(found.levels)

    def gains_at(self, rounds: Iterator[int], levels: Tensor) -> Tensor:
        """(N, T) gains of the next round's rollout at these levels; NaN at steps it did not record."""
        self.use(levels)
        step = next(rounds)
        drawn = self.collect(self.draw(step), step)
        assert drawn.values is not None
        found = torch.full((len(drawn.prompts), len(levels)), torch.nan, device=drawn.values.device)
        return found.scatter(1, drawn.trajectory.steps.to(found.device), gains(drawn.values, drawn.trajectory.before.to(found.device)))

    def use(self, levels: Tensor) -> None:
        """Go on with one noise level per denoising step, (T,)."""
        grid = self.policy.family.grid(self.config.policy.steps)
        self.set_dynamics(Dynamics(self.config.transition.kind, levels, grid))
