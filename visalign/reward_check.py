"""What a reward can tell apart, measured on pictures of the untrained model before anything is trained on it.

A score's spread within a group teaches only as far as it stands above the score's own noise; two rewards that rank pictures alike are one;
and a reward that prefers a grey field, noise or an over-saturated copy will be had that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from visalign.credit import spread
from visalign.perturb import perturbed
from visalign.scoring import Panel, RewardInput


def grey(images: Tensor) -> Tensor:
    """A flat middle grey."""
    return torch.full_like(images, 0.5)


def noise(images: Tensor) -> Tensor:
    """Uniform noise, the same for all pictures."""
    return torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images).expand_as(images)


def saturated(images: Tensor) -> Tensor:
    """Every pixel three times as far from its own mean over channels."""
    mean = images.mean(1, keepdim=True)
    return (mean + 3 * (images - mean)).clamp(0, 1)


def tiled(images: Tensor) -> Tensor:
    """Four small copies, two by two."""
    high, wide = images.shape[-2] // 2, images.shape[-1] // 2
    small = torch.nn.functional.interpolate(images, (high, wide), mode="bilinear", align_corners=False, antialias=True)
    return small.repeat(1, 1, 2, 2)


HACKS: dict[str, Callable[[Tensor], Tensor]] = {"grey": grey, "noise": noise, "saturated": saturated, "tiled": tiled}


@torch.no_grad()
def measure(panel: Panel, base: RewardInput, changes: int = 6) -> dict[str, Any]:
    """Noise, signal and loopholes of every reward of a panel; plain values, to be kept as JSON.

    Args:
        base: N pictures of the untrained model (64 are enough), in `groups` of several per prompt.
        changes: changed copies of every picture (`visalign.perturb`), which are no better or worse than the picture.

    Returns:
        "rewards": alias -> {
            "valid": share of the pictures that could be scored;
            "noise": root mean square over pictures of the std over a picture and its changed copies: what `credit.noise_floor` wants;
            "repeat": the largest change when the same pictures are scored again, 0 for a deterministic reward;
            "range": largest less smallest score;
            "spread": mean std within groups, and "signal": spread / noise; below 2, groups teach mostly noise;
            "prompt": share of pictures that score higher under their own prompt than under the next group's; None where none differs;
            "hacks": name -> {"median": of the hacked pictures' scores, "beats": share of them above the 90 % quantile of the real ones,
                "passed": whether the median is not above it};
        }, "spearman": alias -> alias -> rank correlation over the pictures that both could score.
    """
    assert base.groups is not None, "the spread is within groups"
    plain, again = panel.score(base), panel.score(base)
    changed = [panel.score(_changed(base, partial(perturbed, number=number))) for number in range(changes)]
    hacked = {name: panel.score(_changed(base, hack)) for name, hack in HACKS.items()}
    wrong = panel.score(_under_other_prompts(base, base.groups))
    rewards: dict[str, dict[str, Any]] = {}
    for alias, output in plain.outputs.items():
        scores = output.scores
        copies = torch.stack([scores, *(other.outputs[alias].scores for other in changed)])
        floor = copies.var(0, correction=0).nanmean().sqrt().item()
        within = spread(scores, base.groups.to(scores.device))["std"].item()
        rewards[alias] = {
            "valid": output.valid.float().mean().item(),
            "noise": floor,
            "repeat": (again.outputs[alias].scores - scores).abs().nan_to_num(0.0).max().item(),
            "range": (scores[output.valid].amax() - scores[output.valid].amin()).item() if output.valid.any() else 0.0,
            "spread": within,
            "signal": within / floor if floor else float("inf"),
            "prompt": _preferred(scores, wrong.outputs[alias].scores),
            "hacks": {name: _loophole(scores, other.outputs[alias].scores) for name, other in hacked.items()},
        }
    table = {alias: output.scores for alias, output in plain.outputs.items()}
    return {"rewards": rewards, "spearman": {a: {b: spearman(x, y) for b, y in table.items()} for a, x in table.items()}}


def _changed(base: RewardInput, change: Callable[[Tensor], Tensor]) -> RewardInput:
    """With every picture changed, or every frame of its videos."""
    images = base.images
    return replace(base, images=change(images.flatten(0, -4)).unflatten(0, images.shape[:-3]))


def _under_other_prompts(base: RewardInput, groups: Tensor) -> RewardInput:
    """The same pictures, each group as if it were of the next one's prompt."""
    number = groups.unique(return_inverse=True)[1]
    firsts = [int((number == k).nonzero()[0]) for k in range(int(number.max()) + 1)]
    rows = [firsts[(k + 1) % len(firsts)] for k in number.tolist()]
    return replace(base, prompts=[base.prompts[row] for row in rows], metadata=[base.metadata[row] for row in rows])


def _preferred(own: Tensor, other: Tensor) -> float | None:
    """Share of (N,) finite scores above their others, ties counting half; None where none differs."""
    both = own.isfinite() & other.isfinite()
    if not (own != other)[both].any():
        return None
    return ((own > other)[both].float() + (own == other)[both].float() / 2).mean().item()


def _loophole(real: Tensor, hacked: Tensor) -> dict[str, Any]:
    """How a way of cheating does; pictures that can't be scored at all earn nothing by it."""
    limit, found = real.nanquantile(0.9), hacked[hacked.isfinite()]
    if not len(found):
        return {"median": float("nan"), "beats": 0.0, "passed": True}
    return {
        "median": found.quantile(0.5).item(),
        "beats": (found > limit).float().mean().item(),
        "passed": bool(found.quantile(0.5) <= limit),
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of (N,) and (N,) where both are finite, ties sharing their mean rank; NaN where one doesn't vary."""
    both = a.isfinite() & b.to(a.device).isfinite()
    if both.sum() < 2:
        return float("nan")
    ranks = torch.stack([torch.as_tensor(rankdata(x[both.to(x.device)].cpu().numpy())) for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()
