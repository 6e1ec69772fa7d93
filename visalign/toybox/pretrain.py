"""`python -m visalign.toybox.pretrain [PART …|all] [--out DIR] [--work DIR]`: make the toybox's weights again, from seeds.

Parts are made in order; each is resumable (its state is kept under --work) and writes its folder under --out once it is final.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from visalign.toybox import scenes

WORK = Path.home() / ".cache" / "visalign" / "pretrain"
PARTS = ("prompts", "sd3", "sd15", "turbo", "clip", "dino", "judge", "vlm", "wan")


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes: `images` (N, 3, 64, 64) uint8, and for each its `prompts` and `records`."""

    images: Tensor
    prompts: list[str]
    records: list[scenes.Metadata]

    def batch(self, index: Tensor) -> Tensor:
        """(B, 3, 64, 64) float in [0, 1]."""
        return self.images[index].float() / 255


def draw(count: int, seed: int, test: bool = False, renderer: Callable = scenes.render) -> Pictures:
    """`count` scenes of the train (or test) compositions, the six kinds in equal shares; 64 × 64, drawn by `renderer`."""
    rng = random.Random(seed)
    by_kind = scenes.prompts(test)
    records = [rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]]) for n in range(count)]
    layouts = (scenes.lay_out(record, rng) for record in records)
    images = np.stack([scenes.to_array(renderer(layout)) for layout in tqdm(layouts, "scenes", count, leave=False)])
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [scenes.describe(r) for r in records], records)


class Progress:
    """A training loop's state on disk: `for step in progress.steps(n)` goes on where the last run stopped.

    Args:
        path: file that holds the state.
        parts: objects with `state_dict` and `load_state_dict`, saved together.
        every: steps between two saves.
    """

    def __init__(self, path: Path, parts: Mapping[str, torch.nn.Module | torch.optim.Optimizer], every: int = 250):
        self.path, self.parts, self.every = path, parts, every
        self.note: dict[str, float] = {}

    def steps(self, total: int) -> Iterator[int]:
        first = self._load()
        bar = tqdm(range(first, total), self.path.stem, total, initial=first)
        for step in bar:
            torch.manual_seed(step)  # noise is a function of the step: a resumed run is the same run
            yield step
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.note.items()})
            if (step + 1) % self.every == 0 or step + 1 == total:
                self._save(step + 1)

    def smoothed(self, name: str, value: float, keep: float) -> float:
        """A figure's moving average over steps, for `note`."""
        return keep * self.note[name] + (1 - keep) * value if name in self.note else value

    def _load(self) -> int:
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def _save(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        torch.save({"step": step} | {name: part.state_dict() for name, part in self.parts.items()}, fresh)
        fresh.replace(self.path)


def warm_then_fall(step: int, total: int, warm_up: int = 100, hold: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, constant until `hold`·total, then linear to 2 % at the end."""
    if step < warm_up:
        return (step + 1) / warm_up
    return max(0.02, min(1.0, (total - step) / (total * (1 - hold))))


def muon_and_adamw(model: torch.nn.Module, blocks: torch.nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (ahead of AdamW in one 120-step trial), AdamW for all else."""
    hidden = [p for p in blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, 1.5e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return {"muon": muon, "adamw": torch.optim.AdamW(others, 1e-3, (0.9, 0.98), weight_decay=0.01)}


def descend(loss: Tensor, model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """A step down, gradients cut to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, step: int, most: float) -> None:
    """The running average of a model's weights, over few steps at first and with decay `most` later."""
    keep = min(most, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - keep)


def compiled(module: torch.nn.Module) -> None:
    """Compile a module's forward in place where there is a compiler: a quarter faster on a CPU."""
    if shutil.which("g++"):
        module.forward = torch.compile(module.forward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["all"], help=f"{', '.join(PARTS)} or all")
    parser.add_argument("--out", type=Path, default=Path("assets/toybox"), help="where the finished folders go")
    parser.add_argument("--work", type=Path, default=WORK, help=f"states of unfinished trainings (default: {WORK})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    names = PARTS if "all" in args.parts else tuple(args.parts)
    for name in names:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; known: {', '.join(PARTS)}, all")
        import_module(f"visalign.toybox.build_{name}").build(args.out, args.work, torch.device(args.device))


if __name__ == "__main__":
    main()
