"""`python -m benchmarks.overhead [CONFIG] [key.sub=value …]`: seconds of a training step over those of its necessary network passes.

One step's passes are recorded (denoiser, text encoders, VAE, reward), then each is timed alone on the same inputs; whatever the step takes
beyond their sum is overhead. Needs a quiet machine. Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from visalign import build, config
from visalign.trainer import Trainer

ROUNDS = 5


@dataclass
class Pass:
    """A recorded call: what it was for, how to do it again, and whether its backward belongs to it."""

    kind: str
    again: Callable[[], Any]
    backward: bool = False


class Recorder:
    """Wraps methods so that one step's calls can be repeated."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.passes = trainer, list[Pass]()

    def __enter__(self) -> Recorder:
        family, rewards = self.trainer.policy.family, self.trainer.session.rewards
        self.targets = [
            (family, "forward", "denoiser"),
            (family, "decode", "vae"),
            (family, "encode", "text"),
            (rewards, "score", "reward"),
        ]
        for owner, name, kind in self.targets:
            setattr(owner, name, self._recorded(getattr(owner, name), kind))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, _ in self.targets:
            delattr(owner, name)  # the class's own method shows again

    def _recorded(self, method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            learning = torch.is_grad_enabled() and kind == "denoiser"
            self.passes.append(Pass(f"{kind}, replay" if learning else kind, lambda: method(*args), learning))
            return method(*args)

        return call


def seconds(item: Pass) -> float:
    """Median time of a recorded pass alone."""
    times: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.set_grad_enabled(item.backward):
            out = item.again()
            if item.backward:
                out.sum().backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(trainer: Trainer) -> dict[str, Any]:
    """Seconds of whole steps, of their passes by kind, and the ratio."""
    trainer.step(1)
    steps: list[float] = []
    passes: dict[str, list[float]] = {}
    nfe = 0.0
    for round_ in range(ROUNDS):  # in turn, so that a machine whose speed drifts slows both
        with Recorder(trainer) as recorder:
            row = trainer.step(2 + round_)
        started = time.perf_counter()
        trainer.step(2 + round_)
        steps.append(time.perf_counter() - started)
        nfe = row["nfe"]
        sums: dict[str, float] = {}
        for item in recorder.passes:
            sums[item.kind] = sums.get(item.kind, 0.0) + seconds(item)
        trainer.optimizer.zero_grad()
        for kind, value in sums.items():
            passes.setdefault(kind, []).append(value)
    split = {kind: round(statistics.median(values), 4) for kind, values in passes.items()}
    ratios = [step / sum(passes[kind][n] for kind in passes) for n, step in enumerate(steps)]
    return {
        "overhead": round(statistics.median(ratios), 4),
        "overhead_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "step_seconds": round(statistics.median(steps), 4),
        "passes_seconds": split,
        "nfe_last_step": nfe,
    }


def main() -> None:
    words = sys.argv[1:]
    recipe = words.pop(0) if words and "=" not in words[0] else "toybox"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.trainer(config.load(recipe, [*words, f"run.path={folder}", "run.resume=never"]))
        found = measure(trainer) | {"recipe": recipe, "overrides": words} | describe()
    print(json.dumps(found, indent=2))
    out = Path(__file__).parent / "results" / "overhead.json"
    out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
