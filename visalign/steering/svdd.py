"""SVDD (arXiv 2408.08252): at every step several places to go on from are drawn, and the one with the best estimated value is taken.

SVDD-PM, Algorithm 3: the value of a noisy state is the reward of the clean estimate there, so that nothing is trained and no gradient is
needed. The network's prediction at the chosen place is known from valuing it: a step costs M forwards, not M + 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visalign.config import AtLeastZero, Positive
from visalign.findings import State, Stochastic
from visalign.guiding import Method
from visalign.tasks import Task


class SVDD(Method):
    """x' ~ Σ_m softmax_m(r(x̂0(x'_m)) / α)·δ(x'_m), with x'_m from the model's own stochastic step; α = 0 takes the best."""

    class Config(Stochastic):
        proposals: Positive | None = None  # M; null: what the budget pays for, 4 without one
        temperature: AtLeastZero = 0.0  # α, in units of the score

    def run(self, task: Task) -> Iterator[State]:
        choices, number = task.steps - 1, 0
        cost = task.calls * choices, choices
        first = (float(task.calls), 1.0)
        most = task.affordable(*cost, self.settings.proposals or 4, besides=first) if choices else 1
        count = min(self.settings.proposals or most, most)
        if count < 2:
            yield from self.fresh(task, 0, task.evaluations(1, 1))
            return
        while number == 0 or (task.budget.ends and task.affordable(*cost, besides=first) >= count):
            yield from self.chain(task, count, number)
            number += 1

    def chain(self, task: Task, count: int, number: int) -> Iterator[State]:
        """One picture of each prompt."""
        x, rows, own = task.noise(number), task.rows(), task.rows(count)
        said = task.predict(x, 0, rows)
        for step in range(task.steps - 1):
            law = task.law(x.repeat_interleave(count, 0), said.repeat_interleave(count, 0), step, self.settings)
            places = law.draw(task.draw(f"proposals/{number}/{step}", count))
            predictions = task.predict(places, step + 1, own)
            found = task.look(task.clean(places, predictions, step + 1), own)
            taken = self.choose(found.total.cpu().view(-1, count), task, f"choice/{number}/{step}")
            x, said = places[taken], predictions[taken]
            yield task.state(step + 1, task.steps, found.take(taken), **found.figures)
        x = task.euler(x, said, task.steps - 1)
        found = task.look(x, rows)
        task.keep(found)
        yield task.state(task.steps, task.steps, found, **found.figures)

    def choose(self, values: Tensor, task: Task, name: str) -> Tensor:
        """(N,) rows among N·M of the places taken, by the values (N, M)."""
        if self.settings.temperature:
            share = (values / self.settings.temperature).softmax(1).nan_to_num(1 / values.shape[1])
            point = task.chance(name, 1) * share.sum(1, keepdim=True)
            place = torch.searchsorted(share.cumsum(1), point, right=True)[:, 0].clamp(max=values.shape[1] - 1)
        else:
            place = values.argmax(1)
        return place + torch.arange(len(values)) * values.shape[1]
