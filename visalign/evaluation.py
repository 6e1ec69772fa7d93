"""Judging a policy: the same prompts and seeds each time, every judge, and the cheap signs of a hacked reward beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from visalign import monitors
from visalign.distributed import Processes
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.scoring import Panel, RewardInput


@dataclass(frozen=True)
class Evaluation:
    """What the judges say of N pictures.

    Attributes:
        prompts, images: N rows.
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
    metrics["eval/tonal"] = monitors.tonal_diversity(images)
    statistics = monitors.image_statistics(images) | monitors.spectral(images)
    return Evaluation(prompts, images, scores, metrics | {f"image/{name}": value for name, value in statistics.items()})
