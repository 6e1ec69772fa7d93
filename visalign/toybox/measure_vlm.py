"""How good the toybox's vision-language models are, on held-out compositions and asked as rewards ask them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visalign.judges import LocalJudge, Question
from visalign.questions import CAPTION, PAIR, POINT, RATE, fill
from visalign.toybox import scenes
from visalign.toybox.vlm_lessons import rival

PICTURES = 960


@torch.no_grad()
def measure(folder: Path, count: int = PICTURES) -> dict[str, float]:
    """True texts against texts with one attribute changed.

    Returns:
        AUC over all pairs of (picture, text) by yes-log-odds and by the likelihood of the text as a caption; the accuracy within a
        picture, by attribute; accuracy of pairwise comparisons in one order and in both, and how often the two orders disagree; rank
        correlation of the expected rating with the share of clauses that are met.
    """
    judge, rng = LocalJudge(str(folder), 64), random.Random(7)
    by_kind = scenes.prompts(test=True)
    records = [rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]]) for n in range(count)]
    layouts = [scenes.lay_out(record, rng) for record in records]
    altered = [_altered(record, layout, rng) for record, layout in zip(records, layouts, strict=True)]
    images = [_drawn(layout) for layout in layouts]
    others = [rival(record, rng).float() / 255 for record in records]
    texts = [scenes.describe(record) for record in records], [scenes.describe(record) for _, record in altered]
    report: dict[str, float] = {}
    odds = [log_odds(judge, [Question((i,), fill(POINT, t)) for i, t in zip(images, some, strict=True)]) for some in texts]
    echo = [_echo(judge, images, some) for some in texts]
    report |= {"yes_auc": auc(*odds), "yes_accuracy": ((odds[0] > 0).float().mean() + (odds[1] < 0).float().mean()).item() / 2}
    report |= {"echo_auc": auc(*echo)}
    for name in sorted({attribute for attribute, _ in altered}):
        rows = torch.tensor([attribute == name for attribute, _ in altered])
        report[f"yes_accuracy_{name}"] = (odds[0] > odds[1])[rows].float().mean().item()
    shown = [(b, a) for a, b in zip(images, others, strict=True)], list(zip(images, others, strict=True))
    first, swapped = (log_odds(judge, [Question(p, fill(PAIR, t)) for p, t in zip(some, texts[0], strict=True)]) for some in shown)
    report |= {"pair_accuracy": ((first > 0).float().mean() + (swapped < 0).float().mean()).item() / 2}
    report |= {"pair_accuracy_both_orders": (first > swapped).float().mean().item()}
    report |= {"pair_disagreement": ((first > 0) == (swapped > 0)).float().mean().item()}
    asked = [Question((i,), fill(RATE, t)) for some in texts for i, t in zip(images, some, strict=True)]
    rating = (judge.choose(asked, "12345").softmax(-1) * torch.arange(1.0, 6)).sum(-1)
    met = [
        scenes.meets(layout, record)[1] for some in (records, [r for _, r in altered]) for layout, record in zip(layouts, some, strict=True)
    ]
    return report | {"rating_correlation": float(np.corrcoef(_ranks(rating.numpy()), _ranks(np.array(met)))[0, 1])}


def log_odds(judge: LocalJudge, questions: list[Question]) -> Tensor:
    yes, no = judge.choose(questions, ("yes", "no")).unbind(1)
    return yes - no


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a true pair scores above a false one."""
    return ((right[:, None] > wrong).float() + 0.5 * (right[:, None] == wrong)).mean().item()


def _echo(judge: LocalJudge, images: list[Tensor], texts: list[str]) -> Tensor:
    found = judge.echo([Question((image,), CAPTION, text) for image, text in zip(images, texts, strict=True)])
    return torch.stack([echo.log_probs.mean() for echo in found if echo])


def _altered(record: scenes.Metadata, layout: list[scenes.Object], rng: random.Random) -> tuple[str, scenes.Metadata]:
    """One attribute changed so that the scene doesn't meet it."""
    while True:
        attribute, other = scenes.alter(record, rng)
        if scenes.meets(layout, other)[0] == 0:
            return attribute, other


def _drawn(layout: list[scenes.Object]) -> Tensor:
    return torch.from_numpy(scenes.to_array(scenes.render(layout)).copy()).permute(2, 0, 1).float() / 255


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
