"""Pictures to be found: what guided-sampling methods draw, look at and pay with.

Every picture is a search of its own, whatever its batch: all noise is a function of (seed, picture, a name).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.findings import Budget, Found, State, Stochastic
from visalign.noise import gaussian, uniform
from visalign.paths import endpoints
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import Walk
from visalign.schedules import deterministic
from visalign.scoring import Panel, RewardInput
from visalign.solvers import advance
from visalign.transitions import TRANSITIONS, Gaussian, kernel

MANY = 10**9  # where only time ends a search
Part = TypeVar("Part")


class Task:
    """N pictures to find, and what has been spent and found so far.

    A method that looks at K candidates for each of R pictures lays them out picture by picture: M = R·K rows.

    Attributes:
        policy, prompts, condition: of the N pictures.
        panel: what scores them; None without a reward.
        steps, guidance, seed: of the sampler.
        batch: latents per forward; halved where memory runs out.
        budget: see `Budget`.
        sigmas: (T + 1,) the grid.
        best: see `State`.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        panel: Panel | None = None,
        *,
        steps: int = 10,
        guidance: float = 1.0,
        seed: int = 0,
        batch: int = 16,
        budget: Budget | None = None,
    ):
        self.policy, self.prompts, self.panel = policy, prompts, panel
        self.steps, self.guidance, self.seed, self.batch, self.budget = steps, guidance, seed, batch, budget or Budget()
        self.started, self.forwards = time.perf_counter(), 0
        self._mark: int | None = None  # the policy's count when the current block of `counting` began
        self.backwards, self.scored = 0, 0  # passes, and pictures
        self.best: Found | None = None
        self.calls = 1 if guidance == 1.0 else 2  # forwards of a prediction
        self.evaluation = steps * self.calls  # NFE of a plain picture
        if self.budget.nfe is not None and self.budget.nfe < self.evaluation:
            raise UserError(
                f"budget.nfe={self.budget.nfe:g} is less than one picture: {steps} steps at guidance {guidance:g} are {self.evaluation} NFE"
            )
        self.condition = policy.family.encode(prompts.texts, prompts.metadata)
        self.sigmas = policy.family.grid(steps).to(policy.device)

    def __len__(self) -> int:
        return len(self.prompts)

    # --- spending ------------------------------------------------------------------------------------------------------

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The policy's forwards within the block are this task's; others may use it between blocks."""
        self._mark = self.policy.nfe
        try:
            yield
        finally:
            self.forwards, self._mark = self.forwards + self.policy.nfe - self._mark, None

    @property
    def nfe(self) -> float:
        """Denoiser forwards per returned picture so far."""
        return (self.forwards + (0 if self._mark is None else self.policy.nfe - self._mark)) / len(self)

    @property
    def nfe_backward(self) -> float:
        return self.backwards / len(self)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return self.budget.seconds is not None and self.seconds >= self.budget.seconds

    def affordable(self, nfe: float, calls: float, otherwise: int = MANY, *, besides: tuple[float, float] = (0.0, 0.0)) -> int:
        """How many more things the budget pays for, per returned picture, that cost so many NFE and reward calls each.

        Args:
            otherwise: the answer of a budget that limits neither.
            besides: NFE and reward calls that have to be paid as well, once.
        """
        spent = self.nfe + 2 * self.nfe_backward, self.scored / len(self)
        limits = self.budget.nfe, self.budget.reward_calls
        left = [
            (limit - done - fixed) / cost
            for limit, done, fixed, cost in zip(limits, spent, besides, (nfe, calls), strict=True)
            if limit is not None and cost
        ]
        return max(0, math.floor(min(left) + 1e-6)) if left else otherwise

    def evaluations(self, wanted: int | None, otherwise: int) -> int:
        """How many plain pictures to look at: `wanted`, or what the budget pays for (`otherwise` without one); never more than that."""
        if wanted is None:
            wanted = MANY if self.budget.ends else otherwise
        return min(wanted, self.affordable(self.evaluation, 1))

    # --- drawing -------------------------------------------------------------------------------------------------------

    def noise(self, candidate: int = 0) -> Tensor:
        """(N, ...) initial noise; candidate 0 is the plain sample's."""
        ids, stream = (self.prompts.noise_ids, 0) if candidate == 0 else (self.prompts.ids, f"candidate/{candidate}")
        return gaussian(self.policy.family.latent_shape, self.seed, ids, stream, device=self.policy.device)

    def noises(self, first: int, last: int, rows: Tensor | None = None) -> Tensor:
        """(R·K, ...) of the candidates `first` to `last` - 1 for the pictures `rows` (R,)."""
        rows = self.rows() if rows is None else rows
        return torch.stack([self.noise(candidate)[rows] for candidate in range(first, last)], 1).flatten(0, 1)

    def starts(self, count: int, number: int) -> Tensor:
        """(N·count, ...) initial noise of run `number`; the first row of each picture's first run is the plain sample's."""
        if number:
            return self.draw(f"starts/{number}", count)
        more = self.draw("starts/0", count - 1).unflatten(0, (len(self), count - 1))
        return torch.cat([self.noise()[:, None], more], 1).flatten(0, 1)

    def draw(self, stream: str, count: int = 1) -> Tensor:
        """(N·count, ...) standard normal rows by name."""
        shape = (count, *self.policy.family.latent_shape)
        return gaussian(shape, self.seed, self.prompts.ids, stream, device=self.policy.device).flatten(0, 1)

    def chance(self, stream: str, count: int) -> Tensor:
        """(N, count) uniform in [0, 1) by name; on the CPU, where choices are made."""
        return uniform((count,), self.seed, self.prompts.ids, stream)

    def rows(self, count: int = 1) -> Tensor:
        """(N·count,) the picture to which each of the rows belongs."""
        return torch.arange(len(self)).repeat_interleave(count)

    def pieces(self, work: Callable[[Tensor], Part], count: int, size: int | None = None) -> list[Part]:
        """`work(rows)` for `count` rows in batches (of `size`, if given); where memory runs out, the batch is halved and tried again."""
        done: list[Part] = []
        first = 0
        while first < count:
            piece, before = torch.arange(first, min(first + (size or self.batch), count)), self.policy.nfe
            try:
                done.append(work(piece))
                first += len(piece)
                continue
            except torch.OutOfMemoryError:
                if len(piece) == 1 or size is not None:
                    raise
                self.batch, self.policy.nfe = len(piece) // 2, before
            torch.cuda.empty_cache()  # once the exception, and what its frames hold, is gone
        return done

    def predict(self, x: Tensor, step: int, rows: Tensor) -> Tensor:
        """(M, ...) what the network says of x at the start of a step, for the pictures `rows` (M,)."""

        def work(piece: Tensor) -> Tensor:
            t = self.sigmas[step].expand(len(piece))
            return self.policy.predict(x[piece], t, self.condition.take(rows[piece]), self.guidance)

        return torch.cat(self.pieces(work, len(x)))

    def clean(self, x: Tensor, said: Tensor, step: int) -> Tensor:
        """(M, ...) the estimate of the clean latents that a prediction implies."""
        return endpoints(self.policy.family.path, x, said, self.sigmas[step])[0]

    def euler(self, x: Tensor, said: Tensor, step: int) -> Tensor:
        """(M, ...) after the ODE's step."""
        return advance(self.policy.family.path, x, said, self.sigmas[step], self.sigmas[step + 1], "euler", None)[0]

    def law(self, x: Tensor, said: Tensor, step: int, options: Stochastic) -> Gaussian:
        """Where a stochastic step may lead from x (M, ...); the last step of a chain should not be one."""
        path, t, t_next = self.policy.family.path, self.sigmas[step], self.sigmas[step + 1]
        try:
            return kernel(path, x, said, t, t_next, TRANSITIONS[options.transition](path, t, t_next, options.level))
        except ValueError as error:
            raise UserError(f"transition={options.transition}: {error}") from None

    def walk(self, x: Tensor, rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """(M, ...) after the ODE's steps `first` to `last` (the end), for the pictures `rows` (M,)."""
        still = Walk(self.policy, self.sigmas, self.guidance, deterministic(self.steps), None, lambda *_: x)
        end = self.steps if last is None else last
        return torch.cat(self.pieces(lambda p: still(x[p], self.condition.take(rows[p]), rows[p], first, end).final, len(x)))

    def decode(self, latents: Tensor) -> Tensor:
        """(M, 3, H, W) in [0, 1], without gradients."""
        with torch.no_grad():
            return torch.cat(self.pieces(lambda p: self.policy.family.decode(latents[p]), len(latents)))

    # --- scoring -------------------------------------------------------------------------------------------------------

    def inputs(self, rows: Tensor) -> RewardInput:
        """What a panel is told of R·K pictures, without them; rewards that compare see the k-th candidates of a prompt together."""
        drawn, count = self.prompts.take(rows), int((rows == rows[0]).sum())
        groups = drawn.groups * count + torch.arange(len(rows)) % count
        return RewardInput(torch.empty(len(rows), 0), drawn.texts, drawn.metadata, groups=groups)

    @property
    def whole(self) -> int | None:
        """How many pictures a panel must see at once where it compares them; None where each is scored by itself."""
        compares = self.panel is not None and any(reward.spec.scope != "point" for reward in self.panel.rewards.values())
        return MANY if compares else None

    def look(self, latents: Tensor, rows: Tensor) -> Found:
        """Decode and score (M, ...), R·K candidates of the pictures `rows` (M,)."""
        inputs, panel = self.inputs(rows), self.panel
        if panel is None:
            return Found(latents, self.decode(latents))

        def work(piece: Tensor) -> Found:
            images = self.policy.family.decode(latents[piece])
            scores = panel.score(replace(inputs.take(piece), images=images)).by_name()
            return Found(latents[piece], images, {name: values.detach().to(images.device) for name, values in scores.items()})

        found = Found.join(self.pieces(work, len(latents), self.whole))
        self.scored += len(latents)
        return found

    def keep(self, found: Found, rows: Tensor | None = None) -> None:
        """Remember the best candidate of each picture, R·K of them for the pictures `rows` (R,), if it beats what was found before."""
        rows = torch.arange(len(self)) if rows is None else rows
        count = len(found.images) // len(rows)
        chosen = found.take(found.total.view(-1, count).argmax(1) + torch.arange(len(rows), device=found.images.device) * count)
        if self.best is None:
            self.best = chosen
            return
        place = rows.to(found.images.device)
        better = chosen.total > self.best.total[place]
        new, place, old = chosen.take(better), place[better], self.best
        latents, images = old.latents.index_copy(0, place, new.latents), old.images.index_copy(0, place, new.images)
        self.best = Found(latents, images, {name: values.index_copy(0, place, new.scores[name]) for name, values in old.scores.items()})

    def state(self, step: int, steps: int, shown: Tensor | Found, **figures: float) -> State:
        """The search as it stands; `shown` are latents (N, ...) of what the pictures look like, or pictures that have been looked at."""
        counts = {"nfe": self.nfe, "nfe_backward": self.nfe_backward, "reward_calls": self.scored, "seconds": self.seconds}
        latents, decoded = (shown, None) if isinstance(shown, Tensor) else (shown.latents, shown.images)
        return State(step, steps, latents, self.best, **counts, figures=figures, decode=self.decode, decoded=decoded)
