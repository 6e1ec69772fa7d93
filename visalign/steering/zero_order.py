"""Zero-order search: look around the best initial noise so far, at noises of the same length in nearby directions.

arXiv 2501.09732, section 3.2; the neighbourhood is that of the tt-scale-flux code. Needs scores alone. Unlike a step of gradient ascent it
can't leave the shell on which Gaussian noise lies, so that no term has to hold it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from visalign.config import Positive, Section
from visalign.findings import State
from visalign.guiding import Method
from visalign.tasks import MANY, Task


class ZeroOrder(Method):
    """ε' = ‖ε‖·(τ·u + √(1 - τ²)·w), u the direction of the pivot ε, w ⟂ u a random one; the pivot moves to the best ε' if it is better."""

    class Config(Section):
        neighbours: Positive = 4  # per iteration
        similarity: Annotated[float, Field(gt=-1, lt=1)] = 0.95  # τ, the cosine of neighbour and pivot
        iterations: Positive | None = None  # after the plain sample; null: what the budget pays for, 4 without one

    def run(self, task: Task) -> Iterator[State]:
        settings, rows = self.settings, task.rows()
        iterations = settings.iterations or (MANY if task.budget.ends else 4)
        pivot = task.noise()
        task.keep(task.look(task.walk(pivot, rows), rows))
        assert task.best is not None
        steps = iterations if iterations < MANY else 0
        yield task.state(0, steps, task.best)
        for number in range(1, iterations + 1):
            count = min(settings.neighbours, task.affordable(task.evaluation, 1))
            if count == 0:
                return
            around = neighbours(pivot, task.draw(f"neighbours/{number}", count), settings.similarity)
            own, before = task.rows(count), task.best.total
            found = task.look(task.walk(around, own), own)
            best, place = found.total.view(-1, count).max(1)
            better = (best > before).nonzero()[:, 0]
            pivot[better] = around.unflatten(0, (-1, count))[better, place[better]]
            task.keep(found)
            yield task.state(number, steps, task.best, **found.figures)


def neighbours(pivot: Tensor, noise: Tensor, similarity: float) -> Tensor:
    """(N·K, ...) of exactly the length and cosine asked for, around each pivot (N, ...) with noise (N·K, ...) for directions."""
    u = pivot.flatten(1).cpu().double().repeat_interleave(len(noise) // len(pivot), 0)
    length = u.norm(dim=1, keepdim=True)
    u = u / length
    w = noise.flatten(1).cpu().double()
    w = torch.nn.functional.normalize(w - (w * u).sum(1, keepdim=True) * u, dim=1)
    return (length * (similarity * u + math.sqrt(1 - similarity**2) * w)).to(noise).view_as(noise)
