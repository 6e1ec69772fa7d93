"""OCR: is the text that the prompt puts in double quotes written in the picture?

The reward of Flow-GRPO (arXiv:2505.05470, section 4.1), r = 1 - min(lev, len) / len, with the edit distance between the recognised and the
asked text, both without spaces and in lower case. Differences from the published code: the engine is RapidOCR (PP-OCRv4 on onnxruntime, no
paddle), and a picture that holds the text among other letters pays for these, because the exemption is the easiest hole to exploit
(`exempt_substring: true` gives it back).
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec


def target_text(prompt: str, metadata: dict[str, Any]) -> str | None:
    """`metadata["text"]`, else what stands between the first two double quotes of the prompt; None if there is neither."""
    if metadata.get("text"):
        return str(metadata["text"])
    parts = prompt.split('"', 2)
    return parts[1] if len(parts) == 3 else None


def normalise(text: str) -> str:
    """Without white space, in lower case."""
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (left != right)))
    return row[-1]


def text_score(recognised: str, target: str, exempt_substring: bool = False) -> float:
    """1 - min(lev, len) / len in [0, 1] of normalised texts; `len` is that of `target`, which must not be empty."""
    if exempt_substring and target in recognised:
        return 1.0
    return 1.0 - min(edit_distance(recognised, target), len(target)) / len(target)


def character_iou(recognised: str, target: str) -> float:
    """Intersection over union of the two multisets of characters, in [0, 1]."""
    a, b = Counter(recognised), Counter(target)
    return (a & b).total() / (a | b).total()


class Ocr(Reward):
    """How well the asked text is written; samples that ask for none are invalid.

    Args:
        exempt_substring: full score whenever the target occurs anywhere in the recognised text, as in the published reward.

    Components, each (N,): `exact` (1 where the recognised text is the target and nothing else), `iou` (see `character_iou`, a metric that
    repeated or extra text cannot raise). `info["texts"]` has what was read. Reading takes about 0.25 s of one CPU core for 512 px.
    """

    def __init__(self, exempt_substring: bool = False):
        self.spec = RewardSpec("ocr", needs=frozenset({"prompt"}), range=(0.0, 1.0), licence="Apache-2.0", model_id="PP-OCRv4")
        self.exempt_substring = exempt_substring
        self.engine = _engine()

    @torch.no_grad()
    def score(self, batch: RewardInput) -> RewardOutput:
        """Scores in [0, 1]; NaN without a target or for a picture with non-finite pixels."""
        table = torch.full((len(batch), 3), math.nan)
        texts: list[str | None] = [None] * len(batch)
        for n, (image, prompt, metadata) in enumerate(zip(batch.images, batch.prompts, batch.metadata, strict=True)):
            target = normalise(target_text(prompt, metadata) or "")
            if target and image.isfinite().all():
                texts[n] = self.read(image)
                read = normalise(texts[n] or "")
                row = text_score(read, target, self.exempt_substring), float(read == target), character_iou(read, target)
                table[n] = torch.tensor(row)
        scores, exact, iou = table.to(batch.images.device).unbind(1)
        return RewardOutput.of(scores, components={"exact": exact, "iou": iou}, info={"texts": texts})

    def read(self, image: Tensor) -> str:
        """The lines that the engine is sure of by at least one half, from top to bottom, joined by spaces. image: (3, H, W) in [0, 1]."""
        pixels = (image.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        lines, _ = self.engine(pixels.flip(0).permute(1, 2, 0).contiguous().numpy(), use_cls=False)  # the engine reads BGR
        return " ".join(text for _, text, _ in lines or [])


@cache
def _engine() -> Any:
    """The one engine of this process; it uses as many threads as torch, so that the ranks of one machine don't fight for its cores."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError(f"reward ocr needs RapidOCR ({error}): pip install visalign[ocr]") from error
    return RapidOCR(intra_op_num_threads=torch.get_num_threads(), inter_op_num_threads=1)
