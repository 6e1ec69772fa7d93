"""`python -m benchmarks.reward_speed [NAME …]`: pictures per second of every reward, one at a time and in batches.

On the toybox's 64 × 64 pictures and its own weights, through a panel as in training; calibrated rewards have seen one batch before.
The fastest of the rounds counts. Results: results/reward_speed.json and benchmarks/reward_speed.md.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.machine import describe
from visalign import registry
from visalign.config import RewardSection
from visalign.scoring import Panel, RewardInput
from visalign.toybox import scenes

PAGE = Path(__file__).parent / "reward_speed.md"
BATCH, ROUNDS = 32, 3
CLIP = {"use": "clip_score"}
OPTIONS: dict[str, dict[str, Any]] = {
    "adversarial": {"references": "toybox"},
    "condition": {"references": "toybox"},
    "dino": {"references": "toybox"},
    "directional": {"of": CLIP},
    "gate": {"of": {"clip_score": 1.0, "toybox": 1.0}, "gate": "toybox", "threshold": 0.5},
    "geometric": {"of": {"clip_score": 1.0, "toybox": 1.0}},
    "lambda_harmonic": {"references": "toybox"},
    "listener": {"listener": "toybox/vlm_small"},
    "segmental": {"of": CLIP},
    "shaped": {"of": CLIP},
    "uncertainty": {"of": CLIP},
}
ELSEWHERE = ("aesthetic", "geneval", "hps3", "image_reward", "ocr", "preference", "video_reward")  # no weights of the toybox's


def batch_of(count: int) -> RewardInput:
    """Scenes with their prompts, groups of eight."""
    rng = random.Random(0)
    kinds = scenes.prompts(test=True)
    drawn = [rng.choice(kinds[scenes.KINDS[n % len(kinds)]]) for n in range(-(-count // 8))]
    wanted = [drawn[n // 8] for n in range(count)]
    pictures = [scenes.to_array(scenes.render(scenes.lay_out(record, rng))) for record in wanted]
    images = torch.stack([torch.from_numpy(picture.copy()) for picture in pictures]).permute(0, 3, 1, 2).float() / 255
    groups = torch.arange(count) // 8
    video = images[:, None].repeat(1, 8, 1, 1, 1)
    return RewardInput(images, [scenes.describe(record) for record in wanted], wanted, groups=groups, video=video)


def per_second(panel: Panel, batch: RewardInput) -> float:
    """Pictures per second, after one call to warm up."""
    best = float("inf")
    with torch.no_grad():
        panel.score(batch)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            panel.score(batch)
            best = min(best, time.perf_counter() - started)
    return len(batch) / best


def measure(name: str) -> dict[str, float]:
    """One picture at a time, and `BATCH` of them."""
    section = RewardSection.model_validate({"use": name, **OPTIONS.get(name, {})})
    panel = registry.build_panel({name: section}, "toybox", learning=True)
    reward, batch = panel.rewards[name], batch_of(BATCH)
    if reward.base_pictures:
        reward.calibrate(batch)
    alone = replace(batch.take(slice(0, 2)), groups=torch.zeros(2).long()) if reward.spec.scope != "point" else batch.take(slice(0, 1))
    return {"one": per_second(panel, alone), "batched": per_second(panel, batch)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_speed", description="Pictures per second of every reward.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rewards (default: all that the toybox has weights for)")
    names = parser.parse_args().names or [name for name in registry.names("rewards") if name not in ELSEWHERE]
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[name] = {key: records.rounded(value) for key, value in measure(name).items()}
        print(f"{name}: {found[name]['one']:.0f} one at a time, {found[name]['batched']:.0f} in batches", flush=True)
    machine = describe()
    records.write(records.RESULTS / "reward_speed.json", machine | {"batch": BATCH, "rewards": found})
    rows = [[f"`{name}`", f"{value['one']:.0f}", f"{value['batched']:.0f}"] for name, value in found.items()]
    table = records.markdown(["reward", "one at a time (groups: two)", f"batches of {BATCH}"], rows)
    head = "# Pictures per second\n\nWritten by `python -m benchmarks.reward_speed`; don't edit. 64 × 64, the toybox's weights."
    made = f"Made on: {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}."
    PAGE.write_text(f"{head}\n\n{table}\n\n{made}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
