"""The model as it is: one noise-free chain per picture. What every method returns for a budget of one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from visalign.findings import State
from visalign.guiding import Method
from visalign.tasks import Task


class Plain(Method):
    """The ODE's Euler steps, to the bit `visalign.sampling.pictures`; a reward only scores."""

    needs_reward: ClassVar[bool] = False

    def run(self, task: Task) -> Iterator[State]:
        x, rows = task.noise(), task.rows()
        for step in range(task.steps):
            said = task.predict(x, step, rows)
            if step:
                yield task.state(step, task.steps, task.clean(x, said, step))
            x = task.euler(x, said, step)
        found = task.look(x, rows)
        task.keep(found)
        yield task.state(task.steps, task.steps, found)
