"""The Python API: what the commands do, as functions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign import build, config, pictures, registry, sampling
from visalign.distributed import pick_device
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.scoring import Panel, Reward, RewardInput

METHODS = ("plain",)


def load(source: Any = "toybox", device: str = "auto", **options: Any) -> Policy:
    """A policy to sample and train.

    Args:
        source: "toybox", a folder or a hub id of a diffusers pipeline, or a pipeline object.
        device: "auto" is cuda, else mps, else cpu.
        options: further arguments of the family; `precision` and `dtype` are "fp32", "bf16" or "fp16".

    Raises:
        UserError: nothing there, or no family knows the pipeline.
    """
    return registry.load_policy(source, **options).to(pick_device(device))


def load_reward(name: str, device: str = "auto", **options: Any) -> Reward:
    """A reward by its file stem or `package.module:Class`, with its options (`visalign list rewards`)."""
    return registry.load_reward(name, **options).to(pick_device(device))


def panel(rewards: str | Reward | Mapping[str, Any], model: str | None = None, device: torch.device | str = "cpu") -> Panel:
    """Rewards with weights: a name, a reward object, or a mapping name -> weight, options or reward object.

    `model` is what the policy was loaded from: on the toybox, model rewards take the toybox's weights.
    """
    if isinstance(rewards, str):
        rewards = {rewards: 1.0}
    if isinstance(rewards, Reward):
        rewards = {rewards.spec.name: rewards}
    objects = {name: value for name, value in rewards.items() if isinstance(value, Reward)}
    plain = {name: value for name, value in rewards.items() if name not in objects}
    expanded = config.expand_rewards(plain, "rewards")
    sections = {name: config.validate(config.RewardSection, section, f"rewards.{name}") for name, section in expanded.items()}
    built = registry.build_panel(sections, model, device) if sections else None
    members = {
        name: (built.rewards[name], built.weights[name]) if built and name in built.rewards else (objects[name], 1.0) for name in rewards
    }
    return Panel(members)


@dataclass(frozen=True)
class Result:
    """What `sample` returns.

    Attributes:
        images: (N, 3, H, W) float in [0, 1].
        scores: reward name -> (N,), with "total"; empty without a reward.
        trace: one record per evaluation of a search; empty for `plain`.
        nfe: denoiser forwards per returned picture.
        reward_calls: pictures scored.
        seconds: of the whole call.
    """

    images: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    nfe: float = 0.0
    reward_calls: int = 0
    seconds: float = 0.0


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: str | Sequence[str],
    reward: Any = None,
    method: str = "plain",
    n: int = 1,
    steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
) -> Result:
    """Draw pictures and score them.

    Args:
        policy: from `load`.
        prompts: one or more texts.
        reward: what scores the pictures, as in `panel`; None scores nothing.
        method: "plain" samples the model as it is.
        n: pictures per prompt, in the order of the prompts.
        steps, guidance: of the sampler.

    Raises:
        UserError: an unknown method or reward.
    """
    if method not in METHODS:
        raise UserError(f"sampling method {method!r} is not in this version; there is: {', '.join(METHODS)}")
    started, before = time.perf_counter(), policy.nfe
    texts = [text for text in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(n)]
    if not texts:
        raise UserError("no prompt given")
    drawn = Prompts.of(texts)
    images = sampling.pictures(policy, drawn, steps=steps, seed=seed, guidance=guidance)
    judges = panel(reward, policy.name, policy.device) if reward is not None else None
    scores = judges.score(RewardInput(images, texts, drawn.metadata, groups=drawn.groups)).by_name() if judges else {}
    return Result(images, scores, [], (policy.nfe - before) / len(texts), judges.calls if judges else 0, time.perf_counter() - started)


def score(
    images: Tensor | Sequence[str | Path], prompts: str | Sequence[str], rewards: Any, metadata: Sequence[dict[str, Any]] = ()
) -> dict[str, Tensor]:
    """Score pictures.

    Args:
        images: (N, 3, H, W) in [0, 1], or files of any size.
        prompts: N texts, or one for all.
        rewards: as in `panel`.
        metadata: what is known of each prompt, for rewards that need it; N dicts, or none.

    Returns:
        reward name -> (N,) float32, with "total"; NaN where a score failed.
    """
    batches = [images] if isinstance(images, Tensor) else [pictures.load(path)[None] for path in images]
    count = sum(len(batch) for batch in batches)
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count or not count:
        raise UserError(f"{count} pictures and {len(texts)} prompts: expected one prompt for all, or one each")
    if metadata and len(metadata) != count:
        raise UserError(f"{count} pictures and metadata of {len(metadata)}: expected one each")
    judges, found, first = panel(rewards), [], 0
    for batch in batches:  # files may differ in size
        rows = slice(first, first + len(batch))
        found.append(judges.score(RewardInput(batch, texts[rows], list(metadata[rows]))).by_name())
        first += len(batch)
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def align(recipe: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Path:
    """Train by a recipe; the same as `visalign train RECIPE key.sub=value …`. Returns the run folder."""
    return build.loop(config.load(recipe, dict(overrides) if isinstance(overrides, Mapping) else overrides)).fit()


__all__ = ["Result", "align", "load", "load_reward", "panel", "sample", "score"]
