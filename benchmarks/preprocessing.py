"""`python -m benchmarks.preprocessing [--cases 210]`: how far each scorer's differentiable preprocessing is from its official one.

Pictures of odd sizes go through both, and both results through one random encoder. The error is ‖ours - official‖ / ‖official‖ of its
features. Writes benchmarks/results/preprocessing.json and benchmarks/preprocessing.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from benchmarks import records
from visalign.preprocess import Preprocess
from visalign.qwen_pixels import QwenPixels

PAGE = Path(__file__).with_suffix(".md")
BOUND = 0.01
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
AREAS = {"hps3": (256 * 28 * 28, 256 * 28 * 28), "video_reward": (128 * 28 * 28, 256 * 28 * 28)}  # least and most pixels of a frame

Pipeline = Callable[[Any], Tensor]  # a picture -> a tensor


def sources() -> list[Image.Image]:
    """Photographs that scikit-image and scikit-learn bring along, where they are installed, and drawn pictures."""
    found: list[Image.Image] = []
    if find_spec("skimage"):
        from skimage import data

        found += [Image.fromarray(getattr(data, name)()[..., :3]) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    if find_spec("sklearn"):
        from sklearn.datasets import load_sample_images

        found += [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [*found, *(draw(seed) for seed in range(6))]


def draw(seed: int) -> Image.Image:
    """Slopes, shapes, text and grain: soft and hard edges at all scales."""
    random = np.random.default_rng(seed)
    slopes = np.cumsum(np.cumsum(random.normal(size=(400, 560, 3)), 0), 1)
    slopes = (slopes - slopes.min((0, 1))) / (slopes.max((0, 1)) - slopes.min((0, 1)))
    picture = Image.fromarray((slopes * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, size = (int(value) for value in random.integers((0, 0, 8), (560, 400, 120)))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        (pen.ellipse, pen.rectangle)[size % 2]((x, y, x + size, y + size // 2 + 4), fill=colour)
        pen.text((y, x % 380), f"visalign {seed}", fill=colour, font=ImageFont.load_default(10 + size // 4))
    grain = np.asarray(picture) + random.normal(scale=6, size=(400, 560, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def cases(count: int, seed: int = 0) -> list[Image.Image]:
    """`count` pictures: sources in turn, cut at random places and scaled to sides from 90 to 700 pixels, at most 3 to 1."""
    random, pictures = np.random.default_rng(seed), sources()
    found: list[Image.Image] = []
    for n in range(count):
        picture = pictures[n % len(pictures)]
        width, height = picture.size
        left, top, right, bottom = random.uniform((0, 0, 0.7, 0.7), (0.3, 0.3, 1, 1))
        box = (int(left * width), int(top * height), int(right * width), int(bottom * height))
        long = int(random.integers(160, 701))
        short = int(random.integers(max(90, long // 3), long + 1))
        found.append(picture.crop(box).resize((long, short) if n % 2 else (short, long), Image.Resampling.BICUBIC))
    return found


def tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0) / 255


def clip(picture: Image.Image) -> Tensor:
    """(3, 3, H, W) uint8: a picture and two that are shifted."""
    frame = (tensor(picture)[0] * 255).round().to(torch.uint8)
    return torch.stack([frame.roll(5 * n, -1) for n in range(3)])


def pipelines() -> dict[str, tuple[Pipeline, Pipeline]]:
    """scorer -> (ours, official), both from a PIL picture."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision import transforms
    from transformers import CLIPImageProcessor, Qwen2VLImageProcessor, SiglipImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    def ours(preprocess: Callable[[Tensor], Tensor]) -> Pipeline:
        return lambda picture: preprocess(tensor(picture))

    def processor(official: Any) -> Pipeline:
        return lambda picture: official(picture, return_tensors="pt").pixel_values

    def openclip(mode: str) -> Pipeline:
        transform: Any = image_transform_v2(PreprocessCfg(resize_mode=mode), is_train=False)
        return lambda picture: transform(picture).unsqueeze(0)

    blip = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    qwen = {name: {"shortest_edge": least, "longest_edge": most} for name, (least, most) in AREAS.items()}
    still: Any = Qwen2VLImageProcessor(size=qwen["hps3"])
    moving: Any = Qwen2VLVideoProcessor(size=qwen["video_reward"], cap_pixels_per_frame=False)
    square = partial(Preprocess, (224, 224), MEAN, STD)
    return {
        "clip_score, pickscore, hps with crop (open_clip)": (ours(square()), openclip("shortest")),
        "pickscore, aesthetic (transformers' CLIP)": (ours(square(rounds=False)), processor(CLIPImageProcessor())),
        "hps (letterbox)": (ours(square(aspect="letterbox")), openclip("longest")),
        "clip_score (SigLIP, 384)": (
            ours(Preprocess((384, 384), HALF, HALF, aspect="stretch")),
            processor(SiglipImageProcessor(size={"height": 384, "width": 384})),
        ),
        "image_reward": (ours(square()), lambda picture: blip(picture).unsqueeze(0)),  # type: ignore[union-attr]
        "hps3": (ours(lambda images: QwenPixels.of(still)(images)[0]), processor(still)),
        "video_reward": (
            lambda picture: QwenPixels.of(moving)(clip(picture).unsqueeze(0) / 255)[0],
            lambda picture: moving(videos=[clip(picture)], return_tensors="pt").pixel_values_videos,
        ),
    }


def features(pixels: Tensor) -> Tensor:
    """Patch features (P, 64) of a random two-layer encoder, for pictures (1, 3, H, W) and for Qwen's patches (P, D)."""
    rows = F.unfold(pixels, 16, stride=16)[0].T if pixels.ndim == 4 else pixels
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(rows.shape[1], 128, generator=generator) / rows.shape[1] ** 0.5
    second = torch.randn(128, 64, generator=generator) / 128**0.5
    return F.gelu(rows @ first) @ second


@torch.no_grad()
def measure(pictures: list[Image.Image]) -> dict[str, dict[str, float]]:
    """scorer -> mean, 95th percentile and maximum of the relative feature error, and the mean difference of normalised pixels."""
    table: dict[str, dict[str, float]] = {}
    for name, (ours, official) in pipelines().items():
        errors, differences = [], []
        for picture in pictures:
            mine, theirs = ours(picture).float(), official(picture).float()
            assert mine.shape == theirs.shape, (name, picture.size, mine.shape, theirs.shape)
            expected = features(theirs)
            errors.append(((features(mine) - expected).norm() / expected.norm()).item())
            differences.append((mine - theirs).abs().mean().item())
        percentile = float(np.quantile(errors, 0.95))
        table[name] = {"mean": statistics.fmean(errors), "p95": percentile, "max": max(errors), "pixels": statistics.fmean(differences)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=210)
    count = parser.parse_args().cases
    table = measure(cases(count))
    photographs = [name for name in ("skimage", "sklearn") if find_spec(name)]
    found = {
        "cases": count,
        "photographs": photographs,
        "scorers": {k: {m: records.rounded(v) for m, v in row.items()} for k, row in table.items()},
    }
    records.write(records.RESULTS / "preprocessing.json", found)
    rows = [[name, *(f"{100 * row[key]:.2f} %" for key in ("mean", "p95", "max")), f"{row['pixels']:.4f}"] for name, row in table.items()]
    head = ["scorer", "feature error, mean", "95th percentile", "largest", "pixels, mean difference"]
    of = f"photographs of {' and '.join(photographs)}, and drawings" if photographs else "drawings (no packaged photographs installed)"
    PAGE.write_text(
        "# Differentiable preprocessing against the official one\n\n"
        f"`python -m benchmarks.preprocessing`: {count} crops of {of}, sides from 90 to 700 pixels. Errors are relative, of a random "
        "encoder's features; pixels are normalised, so that one step of 8 bits is about 0.015.\n\n" + records.markdown(head, rows) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
