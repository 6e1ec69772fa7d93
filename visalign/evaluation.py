"""Judging a policy: the same prompts and seeds each time, every judge, and the cheap signs of a hacked reward beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from visalign import monitors
from visalign.config import Config
from visalign.distributed import Processes
from visalign.pictures import before_after
from visalign.policy import Policy
from visalign.prompts import PromptSet
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.scoring import Panel, RewardInput


@dataclass(frozen=True)
class Evaluation:
    """What the judges say of N pictures.

    Attributes:
        prompts, images: N rows; videos (N, F, 3, H, W) for pictures where the policy draws these.
        scores: alias -> (N,) float32, NaN where a judge failed.
        metrics: `eval/ALIAS` means over valid scores, `eval/diversity` and `eval/tonal`, `image/*` statistics.
    """

    prompts: Prompts
    images: Tensor
    scores: dict[str, Tensor]
    metrics: dict[str, float]


def evaluate(
    policy: Policy,
    prompts: Prompts,
    judges: Panel,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    processes: Processes | None = None,
    describe: str = "evaluate",
) -> Evaluation:
    """Draw every prompt with the noise-free sampler and score the pictures; processes share the work and all get the whole result."""
    own = prompts.take(processes.shard(len(prompts), "eval.images")) if processes else prompts
    with tqdm(total=len(own), desc=describe, unit="img", leave=False, disable=processes is not None and not processes.main) as bar:
        images = pictures(policy, own, steps=steps, seed=seed, batch=batch, guidance=guidance, progress=bar.update)
    gather = processes.gather if processes else lambda values: values
    with torch.no_grad():
        judged = judges.score(RewardInput(images, own.texts, own.metadata, groups=own.groups))
    scores = {alias: gather(output.scores.to(policy.device)).cpu() for alias, output in judged.outputs.items()}
    embeddings = [gather(e.to(policy.device)).cpu() for output in judged.outputs.values() for e in output.embeddings.values()]
    images = gather(images).cpu()
    metrics = {f"eval/{alias}": score.nanmean().item() for alias, score in scores.items()}
    if embeddings:
        metrics["eval/diversity"] = monitors.diversity(embeddings[0], prompts.groups)
    stills = images.flatten(0, -4)  # of videos every frame
    metrics["eval/tonal"] = monitors.tonal_diversity(stills)
    statistics = monitors.image_statistics(stills) | monitors.spectral(stills) | (monitors.motion(images) if images.ndim == 5 else {})
    return Evaluation(prompts, images, scores, metrics | {f"image/{name}": value for name, value in statistics.items()})


class Examiner:
    """A run's evaluations: always the same prompts and noise, so that every grid shows the untrained model beside the trained."""

    def __init__(self, config: Config, policy: Policy, judges: Panel, test_prompts: PromptSet, processes: Processes):
        self.config, self.policy, self.judges, self.processes = config, policy, judges, processes
        self.prompts = test_prompts.evaluation(config.eval.images, config.prompts.balance)
        self.before: Evaluation | None = None

    def __call__(self, step: int, scan: bool = False) -> dict[str, float]:
        """Metrics of the policy as it is now; step 0 is what the later ones are compared with.

        Args:
            scan: judge it at every guidance of `eval.scan` as well, as base/eval/NAME@GUIDANCE.
        """
        section, policy = self.config.eval, self.config.policy
        guidance = policy.guidance if section.guidance is None else section.guidance
        found = self._evaluate(guidance, f"evaluate step {step}")
        metrics = dict(found.metrics)
        for scale in section.scan if scan else []:
            other = found if scale == guidance else self._evaluate(scale, f"guidance {scale:g}")
            metrics |= {f"base/{name}@{scale:g}": value for name, value in other.metrics.items() if name.startswith("eval/")}
        if step == 0:
            self.before = found
        elif self.processes.main:
            self._save_grid(step, found)
        return metrics

    def grid_path(self, step: int) -> Path:
        return self.config.run.path / "samples" / f"step_{step:05d}.png"

    def _evaluate(self, guidance: float, describe: str) -> Evaluation:
        steps = self.config.eval.steps or self.config.policy.steps
        common = {"steps": steps, "seed": self.config.run.seed, "batch": self.config.eval.batch}
        return evaluate(self.policy, self.prompts, self.judges, guidance=guidance, describe=describe, processes=self.processes, **common)

    def _save_grid(self, step: int, found: Evaluation) -> None:
        assert self.before is not None, "step 0 is judged first"
        rows = slice(0, self.config.eval.grid)
        old, new = (next(iter(judged.scores.values())) for judged in (self.before, found))
        marks = None
        if torch.isin(new.nan_to_num(), torch.tensor([0.0, 1.0])).all():  # a verdict, not a degree
            marks = [(bool(a), bool(b)) for a, b in zip(old[rows] > 0.5, new[rows] > 0.5, strict=True)]
        self.grid_path(step).parent.mkdir(parents=True, exist_ok=True)
        before_after(self.before.images[rows], found.images[rows], found.prompts.texts[rows], marks).save(self.grid_path(step))
