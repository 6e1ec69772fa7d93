"""The toybox's DINO: a `Dinov2Model` whose class token says what a scene shows, and whose patch tokens say what lies where.

Trained on pairs of scenes instead of by self-distillation (Oquab et al. 2023, arXiv 2304.07193), which needs far more pictures. Two losses:

1. Contrastive between two augmented views (arXiv 1807.03748), on the class token itself, because rewards compare that and no projection
   of it. A view of the same objects at other places is a positive of a third of the weight: a reward of similarity must rank a right
   scene laid out otherwise above a wrong one, and a measure of diversity must still see that something moved.
2. Every patch token tells the shares of its 64 pixels that each colour and each shape covers: without it, the patches of so small a model
   carry little that is local.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from visalign.toybox import scenes
from visalign.toybox.build_clip import augment
from visalign.toybox.pretrain import Progress, warm_then_fall

STEPS, BATCH, RECORDS = 2000, 64, 12000  # a batch holds two layouts of each of BATCH / 2 records
MEASURED = 1200, 640  # training records that probes are fitted on, held-out ones that are judged
WIDTH, LAYERS, HEADS, PATCH = 96, 4, 3, 8
MEAN = STD = 0.5
TEMPERATURE, MOVED, DENSE = 0.1, 0.25, 1.0  # MOVED: a quarter of the target is the same objects at other places
LEARNING_RATE = 1e-3
GRID = scenes.SIZE // PATCH
KEYS = list(scenes.COLOURS)


@dataclass(frozen=True)
class Pairs:
    """Two layouts of the same objects, N times: `images` (N, 2, 3, 64, 64) uint8, what covers each patch, and the first object of each.

    Attributes:
        colours, shapes: (N, 2, 64, 9) shares of each patch in [0, 1]; the ground last, which shapes are numbered before as colours are.
        single: (N,) bool: one object alone.
        first: (N, 2) int64: shape and colour of the first object.
    """

    images: Tensor
    colours: Tensor
    shapes: Tensor
    single: Tensor
    first: Tensor


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet, save it to `out`/dino with its measured quality."""
    model = train(work, device).cpu().eval()
    save(model, out / "dino")
    quality = measure(model, pairs(MEASURED[0], seed=12), pairs(MEASURED[1], seed=13, test=True))
    (out / "dino" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("dino:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


def small_dino() -> Dinov2Model:
    """Untrained model, 0.5 M parameters."""
    size: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "mlp_ratio": 4}
    return Dinov2Model(Dinov2Config(**size, image_size=scenes.SIZE, patch_size=PATCH))


# --- scenes ------------------------------------------------------------------------------------------------------------


def pairs(count: int, seed: int, test: bool = False) -> Pairs:
    """`count` records of the train (or test) compositions, the six kinds in equal shares, each laid out twice."""
    rng = random.Random(seed)
    by_kind = scenes.prompts(test)
    pictures, coded, single, first = [], [], [], []
    for n in tqdm(range(count), "scenes", leave=False):
        record = rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]])
        here = scenes.lay_out(record, rng)
        there = [replace(new, colour=old.colour) for new, old in zip(scenes.lay_out(record, rng), here, strict=True)]
        pictures.append([scenes.to_array(scenes.render(layout)) for layout in (here, there)])
        coded.append([scenes.to_array(scenes.render([_by_shape(item) for item in layout])) for layout in (here, there)])
        single.append(len(here) == 1)
        first.append([scenes.SHAPES.index(here[0].shape), KEYS.index(here[0].colour)])
    images, codes = (torch.from_numpy(np.array(arrays)).permute(0, 1, 4, 2, 3).contiguous() for arrays in (pictures, coded))
    return Pairs(images, _shares(images), _shares(codes), torch.tensor(single), torch.tensor(first))


def _by_shape(item: scenes.Object) -> scenes.Object:
    """The object in the colour that has its shape's number: its picture says which shape covers a pixel."""
    return replace(item, colour=KEYS[scenes.SHAPES.index(item.shape)])


def _shares(images: Tensor) -> Tensor:
    """(N, 2, 3, 64, 64) uint8 -> (N, 2, 64, 9): share of each patch's pixels nearest to each colour, the ground last."""
    palette = torch.tensor([*scenes.COLOURS.values(), scenes.GROUND]).float()
    found: list[Tensor] = []
    for piece in images.flatten(0, 1).split(256):
        pixels = piece.permute(0, 2, 3, 1).reshape(len(piece), -1, 3).float()
        nearest = F.one_hot(torch.cdist(pixels, palette[None]).argmin(-1), len(palette)).float()
        plane = nearest.transpose(1, 2).unflatten(2, (scenes.SIZE, scenes.SIZE))
        found.append(F.avg_pool2d(plane, PATCH).flatten(2).transpose(1, 2))
    return torch.cat(found).unflatten(0, (-1, 2))


# --- training ----------------------------------------------------------------------------------------------------------


def train(work: Path, device: torch.device) -> Dinov2Model:
    torch.manual_seed(0)
    model, head = small_dino(), nn.Linear(WIDTH, 2 * (len(KEYS) + 1))
    for module in (model, head):
        nn.Module.to(module, device)
    model.set_attn_implementation("eager")  # on a CPU and at this size, faster than the fused kernel
    parameters = [*model.parameters(), *head.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05}, {"params": [p for p in parameters if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.98), weight_decay=0.0)
    progress = Progress(work / "dino.pt", {"model": model, "head": head, "optimizer": optimizer})
    data = pairs(RECORDS, seed=11)
    for step in progress.steps(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_then_fall(step, STEPS, hold=0.3)
        index = torch.randperm(len(data.images))[: BATCH // 2]
        images = data.images[index].flatten(0, 1).float() / 255
        wanted = torch.cat([data.colours[index].flatten(0, 1), data.shapes[index].flatten(0, 1)], -1).to(device)
        views = torch.cat([augment(images), augment(images)])
        with torch.autocast(device.type, torch.bfloat16):
            output = model(((views - MEAN) / STD).to(device))
            told = head(output.last_hidden_state[:, 1:])
        dense = composition(told.float(), wanted.repeat(2, 1, 1))
        alike = contrastive(*F.normalize(output.pooler_output.float(), dim=-1).chunk(2))
        (alike + DENSE * dense).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fresh = {"alike": alike.item(), "dense": dense.item()}
        progress.note = {name: 0.95 * progress.note.get(name, value) + 0.05 * value for name, value in fresh.items()}
    return model


def contrastive(first: Tensor, second: Tensor) -> Tensor:
    """Cross entropy between views (B, D) of unit length in both directions; rows 2k and 2k + 1 hold the same objects at other places."""
    logits = first @ second.T / TEMPERATURE
    same = torch.eye(len(logits), device=logits.device)
    target = (1 - MOVED) * same + MOVED * same.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def composition(told: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of each patch's shares (B, P, 2·9): of colours, and of shapes."""
    pieces = zip(told.chunk(2, -1), wanted.chunk(2, -1), strict=True)
    return sum((F.cross_entropy(said.flatten(0, 1), share.flatten(0, 1)) for said, share in pieces), told.new_zeros(()))


# --- saving and measuring ----------------------------------------------------------------------------------------------


def save(model: Dinov2Model, folder: Path) -> None:
    """What AutoModel and AutoImageProcessor load, float32 safetensors."""
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    processor = BitImageProcessor(size={"shortest_edge": scenes.SIZE}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


@torch.no_grad()
def measure(model: Dinov2Model, fitted: Pairs, held_out: Pairs) -> dict[str, float]:
    """Retrieval of a picture's other view among 64; linear probes, fitted on training compositions and read on held-out ones: shape and
    colour of a single object from the class token, and of what covers most of a patch from its token; mean cosines."""
    torch.manual_seed(0)
    clean = [_features(model, data.images[:, 0].float() / 255) for data in (fitted, held_out)]
    views = [augment(held_out.images[:, n].float() / 255) for n in (0, 0, 1)]
    own, again, moved = (F.normalize(_features(model, view)[:, 0], dim=-1) for view in views)
    right = [(a @ b.T).argmax(1) == torch.arange(len(a)) for a, b in zip(own.split(64), again.split(64), strict=True) if len(a) == 64]
    report = {
        "retrieval_1_of_64": torch.cat(right).float().mean().item(),
        "cosine_view": (own * again).sum(1).mean().item(),
        "cosine_moved": (own * moved).sum(1).mean().item(),
        "cosine_other": (own * again.roll(1, 0)).sum(1).mean().item(),
    }
    for n, name in enumerate(("shape", "colour")):
        x, x_new = (found[data.single, 0] for found, data in zip(clean, (fitted, held_out), strict=True))
        report[f"probe_{name}"] = probe(x, fitted.first[fitted.single, n], x_new, held_out.first[held_out.single, n])
    for name in ("shapes", "colours"):
        y, y_new = (getattr(data, name)[:, 0].argmax(-1).flatten() for data in (fitted, held_out))
        inked, inked_new = y < len(KEYS), y_new < len(KEYS)  # the ground alone would be right nine times in ten
        x, x_new = (found[:, 1:].flatten(0, 1) for found in clean)
        report[f"patch_{name}"] = probe(x[inked], y[inked], x_new[inked_new], y_new[inked_new])
    return report


def _features(model: Dinov2Model, images: Tensor) -> Tensor:
    """(N, 1 + P, D)."""
    return torch.cat([model((piece - MEAN) / STD).last_hidden_state for piece in images.split(64)])


def probe(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> float:
    """Accuracy of ridge regression onto one-hot classes."""
    x, x_new = (F.pad(value.double(), (0, 1), value=1.0) for value in (x, x_new))
    weights = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ F.one_hot(y, len(KEYS) + 1).double())
    return ((x_new @ weights).argmax(1) == y_new).float().mean().item()
