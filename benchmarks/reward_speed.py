"""`python -m benchmarks.reward_speed [NAME …]`: pictures per second of every reward, one at a time and in batches.

On the toybox's 64 × 64 pictures and its own weights, through a panel as in training; calibrated rewards have seen one batch before.
The fastest of the rounds counts. Rewards that the toybox has no weights for are measured in their published size with random weights, in
small batches and once (`benchmarks.full_size`); HPSv3 is not, since its 7 billion weights want 16 GB by themselves. A NAME is measured
again, the others stay. Results: results/reward_speed.json and benchmarks/reward_speed.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_size, records
from benchmarks.machine import describe
from visalign import registry
from visalign.config import RewardSection
from visalign.scoring import Panel, RewardInput
from visalign.toybox import scenes

FILE, PAGE = records.RESULTS / "reward_speed.json", Path(__file__).parent / "reward_speed.md"
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
TOO_LARGE = ("hps3",)
WEIGHTS = {"ocr": "its engine's", "preference": "random, on the toybox's encoder"}  # where they aren't the toybox's or of full size
FEW, ONCE = 4, 1  # pictures and rounds of rewards in full size
ASKED: dict[str, dict[str, Any]] = {  # what rewards want to be asked that don't know the toybox's world
    "geneval": {"metadata": {"include": [{"class": "cat", "count": 1, "color": "red"}]}},
    "ocr": {"prompts": 'a sign that says "ring"'},
}


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


def per_second(panel: Panel, batch: RewardInput, rounds: int = ROUNDS) -> float:
    """Pictures per second, after one call to warm up."""
    best = float("inf")
    with torch.no_grad():
        panel.score(batch)
        for _ in range(rounds):
            started = time.perf_counter()
            panel.score(batch)
            best = min(best, time.perf_counter() - started)
    return len(batch) / best


def measure(name: str) -> dict[str, float]:
    """One picture at a time, and `size` of them."""
    if name in full_size.BUILDERS:
        with tempfile.TemporaryDirectory() as folder:
            section = RewardSection.model_validate({"use": name, **full_size.BUILDERS[name](Path(folder))})
            panel = registry.build_panel({name: section}, "toybox", learning=True)
        batch = batch_of(FEW)
        batch = replace(batch, **{key: [value] * FEW for key, value in ASKED.get(name, {}).items()})
        return {"one": per_second(panel, batch.take(slice(0, 1)), ONCE), "batched": per_second(panel, batch, ONCE), "size": FEW}
    section = RewardSection.model_validate({"use": name, **OPTIONS.get(name, {})})
    panel = registry.build_panel({name: section}, "toybox", learning=True)
    reward, batch = panel.rewards[name], batch_of(BATCH)
    if reward.base_pictures:
        reward.calibrate(batch)
    alone = replace(batch.take(slice(0, 2)), groups=torch.zeros(2).long()) if reward.spec.scope != "point" else batch.take(slice(0, 1))
    return {"one": per_second(panel, alone), "batched": per_second(panel, batch), "size": BATCH}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_speed", description="Pictures per second of every reward.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rewards (default: all but the largest)")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    names = [] if given.only_table else given.names or [name for name in registry.names("rewards") if name not in TOO_LARGE]
    found: dict[str, dict[str, Any]] = records.read(FILE)["rewards"] if FILE.exists() else {}
    for name in names:
        found[name] = {key: records.rounded(value) for key, value in measure(name).items()} | describe()
        print(f"{name}: {found[name]['one']:.3g} one at a time, {found[name]['batched']:.3g} in batches", flush=True)
        records.write(FILE, {"rewards": dict(sorted(found.items()))})
    rows: list[list[str]] = []
    for name, value in sorted(found.items()):
        weights = WEIGHTS.get(name, "random, published size" if name in full_size.BUILDERS else "toybox")
        machine = f"{value['threads']} threads, torch {value['torch']}, {value['commit']}"
        rows.append([f"`{name}`", weights, f"{value['one']:.3g}", f"{value['batched']:.4g}", f"{value['size']:g}", machine])
    table = records.markdown(["reward", "weights", "one at a time (groups: two)", "in batches", "of", "made on"], rows)
    text = "Written by `python -m benchmarks.reward_speed`; don't edit. Pictures of 64 × 64 on a CPU."
    PAGE.write_text(f"# Pictures per second\n\n{text}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
