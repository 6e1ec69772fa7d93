"""Best of N: draw N pictures, keep the one with the best score. The baseline that every other method has to beat at equal cost.

KL(best of N ‖ model) ≤ log N - (N - 1)/N (arXiv 2112.09332): it can't go far from the model, and so can't be hacked far.
"""

from __future__ import annotations

from collections.abc import Iterator

from visalign.config import Positive, Section
from visalign.findings import State
from visalign.guiding import Method
from visalign.tasks import Task


class BestOfN(Method):
    """argmax_i r(x_i) over pictures from N independent noises, the first of which is the plain sample's."""

    class Config(Section):
        candidates: Positive | None = None  # N; null: what the budget pays for, 4 without one

    def run(self, task: Task) -> Iterator[State]:
        yield from self.fresh(task, 0, task.evaluations(self.settings.candidates, 4))
