"""The Python API: what the commands do, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign import build, config, pictures, registry
from visalign.distributed import pick_device
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.scoring import Panel, Reward, RewardInput


def load(source: Any = "toybox", device: str = "auto", **options: Any) -> Policy:
    """A policy to sample and train.

    Args:
        source: "toybox", a folder or a hub id of a diffusers pipeline, a pipeline object, or the folder of a run, with what it learned.
        device: "auto" is cuda, else mps, else cpu.
        options: further arguments of the family; `precision` and `dtype` are "fp32", "bf16" or "fp16".

    Raises:
        UserError: nothing there, or no family knows the pipeline.
    """
    if isinstance(source, str | Path) and (Path(source) / "config.yaml").is_file():
        if options:
            raise UserError(f"{source} is a run's folder, whose recipe says how to load it; leave out {', '.join(sorted(options))}")
        return build.restore(Path(source), pick_device(device), reference=True)
    return registry.load_policy(source, **options).to(pick_device(device))


def load_reward(name: str, device: str = "auto", **options: Any) -> Reward:
    """A reward by its file stem or `package.module:Class`, with its options (`visalign list rewards`)."""
    return registry.load_reward(name, **options).to(pick_device(device))


def panel(rewards: Any, model: str | None = None, device: torch.device | str = "cpu") -> Panel:
    """Rewards with weights: a name, a reward object, a panel as it is, or a mapping name -> weight, options, or reward object.

    `model` is what the policy was loaded from: on the toybox, model rewards take the toybox's weights.

    Raises:
        UserError: no such reward, or an option that it refuses.
    """
    if isinstance(rewards, Panel):
        return rewards
    objects, sections = split(rewards)
    built = registry.build_panel(sections, model, device) if sections else None
    members = objects | ({alias: (built.rewards[alias], built.weights[alias]) for alias in sections} if built else {})
    named = rewards if isinstance(rewards, Mapping) else members
    return Panel({alias: members[alias] for alias in named})


def split(rewards: Any, where: str = "rewards") -> tuple[dict[str, tuple[Reward, float]], dict[str, config.RewardSection]]:
    """What `panel` takes as rewards that are built, with their weights, and as sections to build from; checked, nothing is loaded."""
    if isinstance(rewards, Panel):
        return {alias: (reward, rewards.weights[alias]) for alias, reward in rewards.rewards.items()}, {}
    if isinstance(rewards, str):
        rewards = {rewards: 1.0}
    if isinstance(rewards, Reward):
        rewards = {rewards.spec.name: rewards}
    if not isinstance(rewards, Mapping) or not rewards:
        raise UserError(f"{where}: expected a name, a reward, or a mapping of names to weights or options, got {rewards!r}")
    objects = {name: (value, 1.0) for name, value in rewards.items() if isinstance(value, Reward)}
    plain = {name: value for name, value in rewards.items() if name not in objects}
    expanded = config.expand_rewards(plain, where)
    sections = {name: config.validate(config.RewardSection, section, f"{where}.{name}") for name, section in expanded.items()}
    registry.check_rewards(sections, where)
    return objects, sections


def score(
    images: Tensor | Sequence[str | Path], prompts: str | Sequence[str], rewards: Any, metadata: Sequence[dict[str, Any]] = ()
) -> dict[str, Tensor]:
    """Score pictures or videos.

    Args:
        images: (N, 3, H, W) in [0, 1], videos (N, F, 3, H, W), or files of any size; of an animated one, rewards of pictures see the
            first frame.
        prompts: N texts, or one for all.
        rewards: as in `panel`.
        metadata: what is known of each prompt, for rewards that need it; N dicts, or none.

    Returns:
        reward name -> (N,) float32, with "total"; NaN where a score failed.
    """
    count = len(images)
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count or not count:
        raise UserError(f"{count} pictures and {len(texts)} prompts: expected one prompt for all, or one each")
    if metadata and len(metadata) != count:
        raise UserError(f"{count} pictures and metadata of {len(metadata)}: expected one each")
    judges = panel(rewards)
    if isinstance(images, Tensor):
        return judges.score(RewardInput(images, texts, list(metadata))).by_name()
    found: list[dict[str, Tensor]] = []
    for n, path in enumerate(images):  # files may differ in size
        video = pictures.load_video(path)[None] if any(reward.spec.modality == "video" for reward in judges.rewards.values()) else None
        still = pictures.load(path)[None] if video is None else video[:, 0]
        found.append(judges.score(RewardInput(still, [texts[n]], list(metadata[n : n + 1]), video=video)).by_name())
    return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}


def align(recipe: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Path:
    """Train by a recipe; the same as `visalign train RECIPE key.sub=value …`. Returns the run folder."""
    return build.loop(config.load(recipe, dict(overrides) if isinstance(overrides, Mapping) else overrides)).fit()


__all__ = ["align", "load", "load_reward", "panel", "score", "split"]
