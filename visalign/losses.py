"""The clipped policy loss and the two penalties that keep a policy near its reference.

Densities are means over latent dimensions (`visalign.transitions`), so ratios are close to 1 and clip ranges are tiny: clipping is decided
on the log-ratio, where float32 still tells 1e-6 from 2e-6. Nothing here waits for the accelerator: metrics are tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visalign.paths import wide


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and what to log beside it: name -> () tensor without gradient."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def clipped_policy(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    weight: Tensor | None = None,
) -> Loss:
    """PPO's clipped surrogate (arXiv 1707.06347, Eq. 7), mean of weight·max(-A·r, -A·clip(r, 1 - low, 1 + high)).

    With `old_log_prob` zero, `log_prob` may be any log-ratio in closed form.

    Args:
        log_prob: (B,) with gradient.
        old_log_prob: (B,) of the policy that drew the samples.
        advantage: (B,); 0 where a sample carries no signal.
        clip_low, clip_high: ≥ 0; a `clip_low` of 1 or more never clips from below.
        weight: (B,) of each transition, or None for 1; the mean is over B, not over weights.

    Returns:
        The loss with metrics ratio/mean, ratio/std, ratio/max_deviation (largest |r - 1|), clip/high and clip/low (fractions of B that are
        clipped), kl/approximate (½·mean(log r)², accurate where r - 1 - log r would cancel).
    """
    log_ratio = log_prob - old_log_prob.detach()
    highest, lowest = math.log1p(clip_high), math.log1p(-clip_low) if clip_low < 1 else -math.inf
    above = (advantage > 0) & (log_ratio > highest)
    below = (advantage < 0) & (log_ratio < lowest)
    # replaced before the exponential, so that an overflow that is clipped sends no NaN back
    kept = log_ratio.masked_fill(above, highest).masked_fill(below, lowest)
    terms = -advantage * kept.exp()
    value = (terms if weight is None else weight * terms).mean()
    with torch.no_grad():
        ratio = log_ratio.exp()
        metrics = {
            "ratio/mean": ratio.mean(),
            "ratio/std": ratio.std(correction=0),
            "ratio/max_deviation": log_ratio.expm1().abs().max(),
            "clip/high": above.float().mean(),
            "clip/low": below.float().mean(),
            "kl/approximate": log_ratio.square().mean() / 2,
        }
    return Loss(value, metrics)


def velocity_kl(prediction: Tensor, reference: Tensor, weight: Tensor | None = None) -> Tensor:
    """weight·mean(prediction - reference)² per sample, (N,): the penalty with an explicit weight (N,) instead of a schedule's accident.

    Args:
        prediction, reference: (N, ...) of policy and reference at the same latents; gradients reach only the first.
        weight: (N,) or None for 1; κ²/(2ς²) makes it `path_kl`.
    """
    square = (wide(prediction) - wide(reference).detach()).square().flatten(1).mean(1)
    return square if weight is None else weight * square


def path_kl(kappa: Tensor, std: Tensor, prediction: Tensor, reference: Tensor) -> Tensor:
    """KL(policy ‖ reference) of one transition per latent dimension, (N,): κ²·mean(Δprediction)²/(2ς²).

    Both Gaussians have the same std, so this is exact; summed over steps it is the KL of the paths.

    Args:
        kappa, std: (N,) or () `visalign.paths.gain` and the std of the step, which must not be 0.
        prediction, reference: as in `velocity_kl`.
    """
    square = velocity_kl(prediction, reference)
    return (kappa / std).square().to(square) / 2 * square
