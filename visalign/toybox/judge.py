"""The second judge: a small detector that checks what the verifier says, and that no policy is ever trained on.

A gain that the verifier sees and the second judge doesn't is reward hacking. So they share nothing but the world: this one is a network
trained on pictures of another renderer (`build_judge.render_smooth`), with no colour threshold and no template. It is a CenterNet (Zhou et
al. 2019, arXiv:1904.07850) on a stride-4 grid; objects have no boxes, and a seventh shape, "unknown", takes what is none of the six.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox.scenes import COLOURS, SHAPES, SIZE, Object, meets, wanted

STRIDE = 4
KINDS = (*SHAPES, "unknown")


class Detector(nn.Module):
    """(N, 3, 64, 64) in [0, 1] -> dict of (N, C, 16, 16): "centre" (1), "shape" (7) and "colour" (8) logits, "offset" (2) in cells."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.stem = nn.Sequential(_block(3, width // 2, 2), _block(width // 2, width, 2), _block(width, width))
        self.deep = nn.Sequential(_block(width, width * 2, 2), _block(width * 2, width * 2))
        self.lateral = nn.Conv2d(width * 2, width, 1)
        self.neck = nn.Sequential(_block(width, width), _block(width, width))
        self.heads = nn.ModuleDict(
            {
                name: nn.Conv2d(width, size, 1)
                for name, size in (("centre", 1), ("shape", len(KINDS)), ("colour", len(COLOURS)), ("offset", 2))
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images * 2 - 1)
        coarse = F.interpolate(self.lateral(self.deep(fine)), scale_factor=2.0, mode="nearest")
        fine = self.neck(fine + coarse)
        return {name: head(fine) for name, head in self.heads.items()}


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@torch.no_grad()
def detect(network: Detector, images: Tensor, least: float = 0.5, sure: float = 0.5) -> list[list[Object]]:
    """The objects of (N, 3, H, W) pictures in [0, 1].

    Args:
        least: probability of a centre from which on it is an object.
        sure: probability of a shape, or of a colour, below which it is "unknown".
    """
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    # The toybox has its centres on multiples of 8 pixels, where cells meet and none is sure: half a cell of padding moves them inside.
    seen = network(F.pad(images.float(), (STRIDE // 2, STRIDE + STRIDE // 2) * 2, mode="replicate"))
    centre = seen["centre"].sigmoid()[:, 0]
    peaks = (centre >= least) & (centre == F.max_pool2d(centre, 3, 1, 1))
    objects: list[list[Object]] = [[] for _ in range(len(images))]
    n, row, column = peaks.nonzero(as_tuple=True)
    shape, colour = (seen[name][n, :, row, column].softmax(1).max(1) for name in ("shape", "colour"))
    at = (torch.stack([column, row], 1) + seen["offset"][n, :, row, column] - 0.5) * STRIDE
    rows = zip(n.tolist(), at.tolist(), *shape, *colour, strict=True)
    for k, (x, y), shape_sure, s, colour_sure, c in rows:
        name = KINDS[int(s)] if shape_sure >= sure else "unknown"
        objects[k].append(Object(name, list(COLOURS)[int(c)] if colour_sure >= sure else "unknown", x, y))
    return objects


class SecondJudge(Reward):
    """1 where a detector finds exactly what the prompt asks for (`scenes.meets`, strict), else 0. For reports only.

    Args:
        folder: of `config.json` and `model.safetensors`; the packaged weights when None.

    Raises:
        UserError: the folder holds no judge.
    """

    spec = RewardSpec("second_judge", needs=frozenset({"prompt"}), range=(0.0, 1.0), licence="Apache-2.0")
    held_out_only = True  # training on it would leave nothing to check the verifier with

    def __init__(self, folder: str | None = None):
        where = Path(folder) if folder else Path(str(files("visalign.assets"))) / "toybox" / "judge"
        if not (where / "model.safetensors").is_file():
            raise UserError(f"second_judge: no model.safetensors in {where}; make it with `python -m visalign.toybox.pretrain judge`")
        settings = json.loads((where / "config.json").read_text())
        self.network = Detector(settings["width"])
        self.network.load_state_dict(load_file(where / "model.safetensors"))
        self.network.eval().requires_grad_(False)

    def perceive(self, images: Tensor) -> list[list[Object]]:
        """The objects of (N, 3, H, W) pictures in [0, 1]."""
        return detect(self.network, images.to(next(self.network.parameters()).device))

    def score(self, batch: RewardInput) -> RewardOutput:
        """0 or 1 for each of (N, 3, H, W) pictures; invalid where neither metadata nor prompt can be read, or a value isn't finite."""
        sound = batch.images.flatten(1).isfinite().all(1).tolist()
        records = [wanted(m, p) if ok else None for m, p, ok in zip(batch.metadata, batch.prompts, sound, strict=True)]
        pairs = zip(self.perceive(torch.nan_to_num(batch.images)), records, strict=True)
        scores = [float("nan") if record is None else meets(objects, record)[0] for objects, record in pairs]
        return RewardOutput.of(torch.tensor(scores, dtype=torch.float32, device=batch.images.device))
