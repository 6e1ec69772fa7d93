"""Gradient guidance: every step is pushed along the gradient of the reward of the clean estimate there.

Universal guidance (arXiv 2302.07121, Eq. 6) and FreeDoM (arXiv 2303.09833), for any path. FreeDoM sizes the push by the root mean square of
the classifier-free direction over that of the gradient; here it is the step's own length over the gradient's, which exists without
guidance, too, and makes one `strength` do for every reward. Steps may be repeated from noise added back (universal guidance's
self-recurrence, FreeDoM's time travel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.backprop import predict
from visalign.config import Above, Fraction, Positive, Section
from visalign.findings import State
from visalign.guiding import Method
from visalign.paths import endpoints, expand, renoise
from visalign.tasks import Task


class Gradient(Method):
    """x' = step(x) + strength·rms(step(x) - x)/rms(g)·g with g = ∇_x r(x̂0(x)), at the steps within `range`, as many as the budget pays."""

    class Config(Section):
        strength: Above = 0.2  # length of the push, in that of the step
        range: tuple[Fraction, Fraction] = (0.1, 0.8)  # shares of the steps between which they are pushed
        repeats: Positive = 1  # of every pushed step, with noise added back in between
        through: Literal["network", "estimate"] = "network"  # estimate: take the prediction as constant; no backward, but biased

    @property
    def needs_gradient(self) -> bool:
        return True

    def run(self, task: Task) -> Iterator[State]:
        low, high = (round(share * task.steps) for share in self.settings.range)
        number = 0
        while number == 0 or (task.budget.ends and task.affordable(task.evaluation, 1)):
            yield from self.chain(task, self.pushed(task, list(range(low, high))), number)
            number += 1

    def pushed(self, task: Task, wanted: list[int]) -> set[int]:
        """As many of the wanted steps as the budget pays for besides a plain picture, spread evenly over them."""
        settings = self.settings
        forwards = settings.repeats - 1  # beyond the step's own
        backwards = settings.repeats if settings.through == "network" else 0
        cost = task.calls * (forwards + 2 * backwards), settings.repeats
        count = min(len(wanted), task.affordable(*cost, besides=(float(task.evaluation), 1.0)))
        return {wanted[(2 * n + 1) * len(wanted) // (2 * count)] for n in range(count)}

    def chain(self, task: Task, pushed: set[int], number: int) -> Iterator[State]:
        """One picture of each prompt."""
        x, rows, figures = task.noise(number), task.rows(), {}
        clean = x
        for step in range(task.steps):
            if step in pushed:
                for turn in range(self.settings.repeats):
                    if turn:
                        noise = task.draw(f"repeat/{number}/{step}/{turn}")
                        x = renoise(task.policy.family.path, x, task.sigmas[step + 1], task.sigmas[step], noise)
                    x, clean, mean = self.push(task, x, step, rows)
                    figures = {"mean": mean}
            else:
                said = task.predict(x, step, rows)
                clean, x = task.clean(x, said, step), task.euler(x, said, step)
            if step + 1 < task.steps:
                yield task.state(step + 1, task.steps, clean, **figures)
        found = task.look(x, rows)
        task.keep(found)
        yield task.state(task.steps, task.steps, found, **found.figures)

    def push(self, task: Task, x: Tensor, step: int, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        """(N, ...) after a pushed step, the clean estimate before it, and the mean score of that."""
        assert task.panel is not None
        inputs, panel, path, sigma = task.inputs(rows), task.panel, task.policy.family.path, task.sigmas[step]
        exact = self.settings.through == "network"

        def work(piece: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                leaf = x[piece].detach().requires_grad_()
                with torch.set_grad_enabled(exact):
                    said = predict(task.policy, leaf, sigma.expand(len(piece)), task.condition.take(piece), task.guidance)
                clean, _ = endpoints(path, leaf, said, sigma)
                scores = panel.score(replace(inputs.take(piece), images=task.policy.family.decode(clean)))
                total = torch.where(scores.valid, scores.total, 0.0).sum()
                gradient = torch.autograd.grad(total, leaf)[0]
            return said.detach(), clean.detach(), gradient, scores.total.detach()

        said, clean, gradient, total = (torch.cat(parts) for parts in zip(*task.pieces(work, len(x), task.whole), strict=True))
        task.scored += len(x)
        task.backwards += len(x) * task.calls * exact
        stepped = task.euler(x, said, step)
        size = self.settings.strength * rms(stepped - x) / rms(gradient).clamp_min(1e-30)
        sound = gradient.flatten(1).isfinite().all(1)
        return torch.where(expand(sound, x), stepped + expand(size, x) * gradient, stepped), clean, total.nanmean().item()


def rms(x: Tensor) -> Tensor:
    """(N,) root mean squares of the rows of (N, ...)."""
    return x.flatten(1).square().mean(1).sqrt()
