"""Pictures and videos in and out: files to tensors and back, and contact sheets that people can read.

A video file is an animated PNG: lossless, of the same suffix, and its first frame is what reads as a picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import Tensor

from visalign.errors import UserError

MAX_PIXELS = 64_000_000
INK, FAINT, PAPER = (28, 32, 38), (112, 120, 132), (255, 255, 255)
GOOD, BAD = (22, 155, 80), (214, 58, 58)
CELL = (160, 256)  # pixels: smaller pictures are enlarged to the first, larger ones reduced to the second
GAP = 12
TEXT = 14  # pixels
LEADING = 18
LINES = 3  # of a caption, at most
FRAMES = 5  # of a video on a sheet, at most
FPS = 16  # of video files

# --- files -------------------------------------------------------------------------------------------------------------


def load(path: str | Path, formats: tuple[str, ...] | None = None, most: int = MAX_PIXELS) -> Tensor:
    """A picture file as (3, H, W) float32 in [0, 1]: turned as its EXIF says, transparency laid on white, the first frame of several.

    Args:
        formats: Pillow's names of those that are read, whatever the file's name says; None: all.
        most: pixels.

    Raises:
        UserError: no such file, not a picture, broken, or too large.
    """
    return _load(path, 1, formats, most)[0]


def load_video(path: str | Path) -> Tensor:
    """All frames of an animated file (PNG, WebP, GIF) as (F, 3, H, W); otherwise as `load`."""
    return _load(path, None)


def shown(paths: Sequence[str | Path]) -> Tensor:
    """Files of one kind and size: pictures (N, 3, H, W), or videos (N, F, 3, H, W)."""
    media = torch.stack([load_video(path) for path in paths])
    return media[:, 0] if media.shape[1] == 1 else media


def _load(path: str | Path, frames: int | None, formats: tuple[str, ...] | None = None, most: int = MAX_PIXELS) -> Tensor:
    """The first so many frames (F, 3, H, W), or all."""
    limit = f"at most {most / 1e6:g} megapixels; scale it down"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and an error
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > most:
                    raise UserError(f"{path} is too large: {image.width} × {image.height}, {limit}")
                shown = [np.array(_upright(frame)) for frame in islice(ImageSequence.Iterator(image), frames)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} is too large, {limit}") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError on a broken PNG
        if isinstance(error, UserError):
            raise
        expected = "PNG, JPEG, WebP or another format that Pillow reads" if formats is None else ", ".join(formats)
        raise UserError(f"{path} can't be read as a picture ({error}); expected {expected}") from None
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255


def _upright(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit grey to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture of 8 bits, rounded; what lies outside is cut off."""
    array = image.detach().float().nan_to_num(0).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def save(images: Tensor, folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write (N, 3, H, W) in [0, 1] as `NAME.png` (by default 0000.png, 0001.png, …) into a folder, made if missing; returns the paths.

    Videos (N, F, 3, H, W) become animated files that repeat.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in (names or [f"{n:04d}" for n in range(len(images))])]
    for image, path in zip(images, paths, strict=True):
        write(image, path)
    return paths


def write(image: Tensor, target: Path | BinaryIO, kind: str = "PNG", **options: Any) -> None:
    """Write one picture (3, H, W), or a video (F, 3, H, W) as an animation, in a format of Pillow's that has such, with its options."""
    first, *others = [to_image(frame) for frame in (image if image.ndim == 4 else image[None])]
    animation: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 1000 / FPS, "loop": 0} if others else {}
    if kind == "PNG":
        animation |= {"blend": [n % 2 for n in range(len(others) + 1)]}  # all the same, opaque; but Pillow joins equal frames of one kind
    first.save(target, kind, **animation, **options)


# --- contact sheets ----------------------------------------------------------------------------------------------------


def grid(images: Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """A contact sheet of (N, 3, H, W) in [0, 1], row by row, with a caption under each picture; videos (N, F, 3, H, W) are strips."""
    return sheet([images], min(columns, len(images)), captions)


def before_after(
    before: Tensor, after: Tensor, prompts: Sequence[str], marks: Sequence[tuple[bool, bool]] | None = None, columns: int = 6
) -> Image.Image:
    """Pictures of the same prompts and seeds, before above after, the prompt under each pair.

    Args:
        before, after: (N, 3, H, W) in [0, 1], or videos (N, F, 3, H, W), shown as strips of frames.
        prompts: N texts.
        marks: whether each (before, after) is right, shown as a tick or a cross in the corner.
        columns: pairs in a row.
    """
    return sheet([before, after], min(columns, len(before)), prompts, ("before", "after"), marks)


def sheet(
    bands: Sequence[Tensor],
    columns: int,
    captions: Sequence[str] | None,
    labels: Sequence[str] = (),
    marks: Sequence[tuple[bool, bool]] | None = None,
) -> Image.Image:
    """Rows of cells; a cell is one picture (or strip) of every band, one above the other, over a caption."""
    count, (height, width) = len(bands[0]), bands[0].shape[-2:]
    scale = min(max(max(height, width), CELL[0]), CELL[1]) / max(height, width)
    if bands[0].ndim == 5:
        bands = [strips(band) for band in bands]
        columns, width = max(1, columns * width // bands[0].shape[-1]), bands[0].shape[-1]
    width, height = round(width * scale), round(height * scale)
    font = ImageFont.load_default(TEXT)
    texts = [_wrap(caption, font, width) for caption in captions or [""] * count]
    inner = GAP // 3  # between the bands of a cell
    margin = GAP + max((round(font.getlength(label)) + GAP for label in labels), default=0)
    block = len(bands) * (height + inner) - inner
    tops, bottom = [], GAP
    for row in range(0, count, columns):
        tops.append(bottom)
        lines = max(len(text) for text in texts[row : row + columns])
        bottom += block + (lines * LEADING + GAP if lines else 0) + GAP
    sheet = Image.new("RGB", (margin + columns * (width + GAP), bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    for n in range(count):
        x, top = margin + n % columns * (width + GAP), tops[n // columns]
        for b, band in enumerate(bands):
            y = top + b * (height + inner)
            sheet.paste(_resized(band[n], (width, height)), (x, y))
            if marks is not None:
                _mark(sheet, x + width, y, marks[n][b])
            if labels and n % columns == 0:
                draw.text((margin - GAP, y + height / 2), labels[b], FAINT if b == 0 else INK, font, anchor="rm")
        for line, text in enumerate(texts[n]):
            draw.text((x + width / 2, top + block + GAP // 2 + line * LEADING), text, INK, font, anchor="ma")
    return sheet


def strips(videos: Tensor) -> Tensor:
    """(N, F, 3, H, W) as (N, 3, H, W'): up to `FRAMES` frames from first to last, side by side."""
    count = videos.shape[1]
    at = torch.linspace(0, count - 1, min(FRAMES, count)).round().long().to(videos.device)
    return videos[:, at].permute(0, 2, 3, 1, 4).flatten(3)


def _resized(image: Tensor, size: tuple[int, int]) -> Image.Image:
    picture = to_image(image)
    larger = size[0] > picture.width
    return picture.resize(size, Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit a width; a text of more than `LINES` ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = lines[:LINES]
    if len(lines) > LINES:
        kept[-1] += " …"
    return [_cut(line, font, width) for line in kept]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _mark(sheet: Image.Image, right: int, top: int, good: bool) -> None:
    """A tick or a cross on a disc in the upper right corner, drawn four times larger and reduced for smooth edges."""
    size, fine = 22, 88
    badge = Image.new("RGBA", (fine, fine), (*PAPER, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse([0, 0, fine - 1, fine - 1], fill=(*PAPER, 255))
    draw.ellipse([6, 6, fine - 7, fine - 7], fill=(*(GOOD if good else BAD), 255))
    strokes = [[(25, 46), (39, 60), (64, 31)]] if good else [[(30, 30), (58, 58)], [(58, 30), (30, 58)]]
    for stroke in strokes:
        draw.line(stroke, fill=(*PAPER, 255), width=10, joint="curve")
    badge = badge.resize((size, size), Image.Resampling.LANCZOS)
    sheet.paste(badge, (right - size - 4, top + 4), badge)
