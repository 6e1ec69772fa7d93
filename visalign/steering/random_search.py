"""Random search: rounds of 1, 2, 4, … fresh noises, until the budget ends or every picture is good enough.

Search over initial noises with a verifier (arXiv 2501.09732, section 3.2). What is good enough isn't searched on, which best of N can't do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from visalign.config import Positive, Section
from visalign.findings import State
from visalign.guiding import Method
from visalign.tasks import MANY, Task


class RandomSearch(Method):
    """Round r looks at 2^r fresh noises for each picture whose best score is below `target`."""

    class Config(Section):
        rounds: Positive | None = None  # null: what the budget pays for, 4 without one
        target: float | None = None  # a score that is good enough; null: none is

    def run(self, task: Task) -> Iterator[State]:
        rounds = self.settings.rounds or (MANY if task.budget.ends else 4)
        most, done, number = task.evaluations(MANY, MANY), 0, 0
        target = math.inf if self.settings.target is None else self.settings.target
        rows = task.rows()
        while number < rounds and done < most and len(rows):
            last = min(done + 2**number, most)
            yield from self.fresh(task, done, last, rows)
            assert task.best is not None
            done, number = last, number + 1
            rows = (task.best.total.cpu() < target).nonzero()[:, 0]
