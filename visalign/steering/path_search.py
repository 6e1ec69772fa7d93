"""Search over paths (arXiv 2501.09732, section 3.2; with a VLM's verdict RewardDance's, arXiv 2509.08826): re-noise, go on, keep the best.

Paths are taken to some point of the chain by the ODE; then, until the end, each is branched by taking it back a little to higher noise and
forward again by more. What a branch is worth is the reward of its clean estimate, and the best paths of a picture go on. Unlike
particles, paths need no stochastic sampler: between re-noisings they follow the ODE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from visalign.config import Fraction, Positive, Section
from visalign.errors import UserError
from visalign.findings import State
from visalign.guiding import Method
from visalign.paths import renoise
from visalign.tasks import Task


class PathSearch(Method):
    """K paths of M branches each: the best K of K·M go on; the best at the end is the result."""

    class Config(Section):
        paths: Positive | None = None  # K; null: what the budget pays for, 2 without one
        branches: Annotated[int, Field(ge=2)] = 3  # M
        start: Fraction = 0.3  # share of the steps before the first branching
        back: Positive = 1  # steps that a branch is re-noised by (the paper's Δf)
        ahead: Positive = 3  # steps that it then goes on (Δb); more than `back`

    def run(self, task: Task) -> Iterator[State]:
        settings, number = self.settings, 0
        if settings.ahead <= settings.back:
            raise UserError(f"path_search: ahead={settings.ahead} must be more than back={settings.back}, or a path never arrives")
        start, plan = self.plan(task.steps)
        length = sum(last - first for first, last in plan)
        cost = task.calls * (start + settings.branches * length), settings.branches * len(plan)
        most = task.affordable(*cost, settings.paths or 2)
        count = min(settings.paths or most, most)
        if not plan or count < 1:
            yield from self.fresh(task, 0, task.evaluations(None, 1))
            return
        while number == 0 or (task.budget.ends and task.affordable(*cost) >= count):
            yield from self.search(task, count, start, plan, number)
            number += 1

    def plan(self, steps: int) -> tuple[int, list[tuple[int, int]]]:
        """The step at which paths first branch, and for each round the steps between which a branch goes on."""
        settings = self.settings
        at = start = min(max(round(settings.start * steps), 1), steps - 1)
        rounds: list[tuple[int, int]] = []
        while at < steps and steps > 1:
            first = max(at - settings.back, 0)
            last = min(first + settings.ahead, steps)
            rounds.append((first, last))
            at = last
        return start, rounds

    def search(self, task: Task, count: int, start: int, plan: list[tuple[int, int]], number: int) -> Iterator[State]:
        """One picture of each prompt from K new noises."""
        at, branches = start, self.settings.branches
        x = task.walk(task.starts(count, number), task.rows(count), 0, start)
        rows = task.rows(count * branches)
        for turn, (first, last) in enumerate(plan):
            noise = task.draw(f"branches/{number}/{turn}", count * branches)
            x = x.repeat_interleave(branches, 0)
            x = renoise(task.policy.family.path, x, task.sigmas[at], task.sigmas[first], noise)
            x, clean = self.onward(task, x, rows, first, last)
            found = task.look(clean, rows)
            if last == task.steps:
                task.keep(found)
            kept = best(found.total.view(len(task), -1), count)
            x, at = x[kept.flatten()], last
            yield task.state(last, task.steps, found.take(kept[:, 0]), **found.figures)

    def onward(self, task: Task, x: Tensor, rows: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """(M, ...) after the ODE's steps `first` to `last`, and the clean estimate that the last of them went towards."""
        x = task.walk(x, rows, first, last - 1)
        said = task.predict(x, last - 1, rows)
        return task.euler(x, said, last - 1), task.clean(x, said, last - 1)


def best(totals: Tensor, count: int) -> Tensor:
    """(N, count) rows among N·M of the best candidates of each picture, best first, by the totals (N, M)."""
    place = totals.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return place + torch.arange(len(totals), device=totals.device)[:, None] * totals.shape[1]
