"""Noise optimisation (ReNO, arXiv 2406.04312): for every prompt of a list, the initial noise that a few-step generator draws best from.

Nothing learns here: the weights stay as they are, and what is optimised belongs to one picture. The search itself is
`visalign.steering.noise_optimization`; this is a run of it over a list of prompts: in batches, split over processes, resumed picture by
picture. Optimised are the first `eval.images` of `prompts.test`, from the noise of every other algorithm's evaluation, so that `eval/NAME`
before and after compare with theirs. RUN/found holds noise, pictures, traces and scores (`visalign.searches`).

Of the recipe's other sections count: `policy.steps` and `policy.guidance` for the sampler, `rewards` for what is climbed, `eval.rewards`
for what only judges. `run.steps` and `optimizer` do not: iterations and step size are the trainer's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor
from tqdm import tqdm

from visalign.config import Config as Recipe
from visalign.config import Positive
from visalign.distributed import Processes
from visalign.loop import Defaults, Job, Session
from visalign.rollout import Prompts
from visalign.scoring import RewardInput
from visalign.searches import Record, Store, digest, plain
from visalign.steering.noise_optimization import Found, Search, Settings, State


class NoiseOptimization(Job):
    """Optimise, judge, write down, picture by picture."""

    class Config(Settings):
        batch: Positive = 8  # pictures that are optimised side by side; each by itself, so that no result depends on it

    defaults: ClassVar[Defaults] = {"policy": {"lora": None, "ema": None, "steps": 1}}

    @classmethod
    def climbs(cls, settings: Config) -> bool:
        return settings.gradient == "exact"

    @classmethod
    def of(cls, config: Recipe, processes: Processes, session: Callable[[], Session]) -> Self:
        return cls(config, processes, session())

    def __init__(self, config: Recipe, processes: Processes, session: Session):
        super().__init__(config, processes)
        self.session = session
        session.policy.family.network.requires_grad_(False)
        policy, settings = config.policy, Settings.model_validate(self.settings.model_dump(exclude={"batch"}))
        common = {"steps": policy.steps, "guidance": policy.guidance, "seed": config.run.seed}
        self.search = Search(session.policy, session.rewards, settings, **common)
        self.store = Store(config.run.path, digest(config), config.run.resume)
        self.prompts = session.test_prompts.evaluation(config.eval.images, config.prompts.balance)

    def fit(self) -> Path:
        """Optimise every picture that has no result yet; returns the run folder."""
        count, world = len(self.prompts), self.processes.count
        own = [n for n in range(self.processes.rank, count, world) if not self.store.has(n)]
        size, iterations = self.settings.batch, self.settings.iterations
        with tqdm(total=len(own) * iterations, desc="optimise", unit="it", disable=not self.processes.main) as bar:
            for batch in (own[n : n + size] for n in range(0, len(own), size)):
                self.optimise(batch, bar)
        self.processes.wait()
        if self.processes.main:
            self.store.summarise(count, self.config)
        self.processes.wait()
        return self.config.run.path

    def optimise(self, numbers: Sequence[int], bar: tqdm) -> None:
        """A batch of pictures from their first noise to their files."""
        prompts, started = self.prompts.take(torch.tensor(numbers)), time.perf_counter()
        states = self.search(prompts)
        state = next(states)
        first, trace = state.now, [figures(state)]
        for state in states:
            trace.append(figures(state))
            bar.set_postfix(reward=f"{state.best.scores['total'].nanmean().item():.3g}")
            bar.update(len(numbers))
        seconds = (time.perf_counter() - started) / len(numbers)
        bar.update(len(numbers))
        scores = {"before": self.judged(first, prompts), "after": self.judged(state.best, prompts), "rewards": state.best.scores}
        for row, number in enumerate(numbers):
            record = Record(
                prompt=prompts.texts[row],
                metadata=prompts.metadata[row],
                recipe=self.store.recipe,
                best_iteration=int(state.best.iteration[row]),
                trace={name: [plain(figures[name][row]) for figures in trace] for name in trace[0]},
                seconds=seconds,
                **{name: {alias: plain(values[row]) for alias, values in said.items()} for name, said in scores.items()},
                **vars(state.spent),
            )
            noises = {"noise": first.noise[row], "best": state.best.noise[row]}
            self.store.write(number, record, noises, first.images[row], state.best.images[row])

    @torch.no_grad()
    def judged(self, found: Found, prompts: Prompts) -> dict[str, Tensor]:
        """judge -> (N,)."""
        scores = self.session.judges.score(RewardInput(found.images, prompts.texts, prompts.metadata, groups=prompts.groups))
        return {name: output.scores for name, output in scores.outputs.items()}


def figures(state: State) -> dict[str, Tensor]:
    """name -> (N,): what the trace keeps of an iteration."""
    scores = {"reward/mean" if name == "total" else f"reward/{name}": values for name, values in state.now.scores.items()}
    scores["reward/best"] = state.best.scores["total"]
    noise = {"grad_norm" if name == "gradient" else f"noise/{name}": values for name, values in state.figures.items()}
    return {name: values.cpu() for name, values in (scores | noise).items()}
