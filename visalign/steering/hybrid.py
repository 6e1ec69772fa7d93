"""Hybrid sampling: the aligned weights lay out the picture in the early steps, the base weights finish it in the late ones.

MixGRPO's advice against hacked rewards (arXiv 2507.21802, section 4.4): what a reward is for is decided early, and its traces in texture
are made late. No search: of a budget for several pictures it keeps the best, and where nothing was learned it is the plain sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from visalign.config import Fraction, Positive, Section
from visalign.errors import UserError
from visalign.findings import State
from visalign.guiding import Method
from visalign.tasks import MANY, Task


class Hybrid(Method):
    """Steps before `switch`·T by the policy as it is, the others by what it was before training."""

    class Config(Section):
        switch: Fraction = 0.6  # share of the steps that the aligned weights take
        candidates: Positive | None = None  # pictures to choose from by the reward; null: what the budget pays for, 1 without one

    needs_reward: ClassVar[bool] = False

    def run(self, task: Task) -> Iterator[State]:
        if not task.policy.has_reference:
            raise UserError(f"hybrid: {task.policy.name} has nothing learned to mix with its base; load a run folder")
        if task.panel is None and (self.settings.candidates or 1) > 1:
            raise UserError(f"hybrid.candidates={self.settings.candidates}: nothing to choose by; give a reward, or leave it out")
        count = task.evaluations(self.settings.candidates, 1) if task.panel else 1
        switch, rows = round(self.settings.switch * task.steps), task.rows()
        for candidate in range(count):
            x = task.walk(task.noise(candidate), rows, 0, switch)
            with task.policy.reference():
                x = task.walk(x, rows, switch)
            found = task.look(x, rows)
            task.keep(found)
            yield task.state(candidate + 1, count if count < MANY else 0, found, **found.figures)
