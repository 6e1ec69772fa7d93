"""The clipped policy loss, GRPO-Guard's ratio, two penalties that keep a policy near its reference, PRDP's loss, and that of preferences.

Densities are means over latent dimensions (`visalign.transitions`), so ratios are close to 1 and clip ranges are tiny: clipping is decided
on the log-ratio, where float32 still tells 1e-6 from 2e-6. Nothing here waits for the accelerator: metrics are tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.paths import wide

Bound = Tensor | float


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and what to log beside it.

    Attributes:
        value: ().
        metrics: name -> () tensor without gradient.
        log_ratio, clipped: (B,) without gradient, of each transition; `per_step_statistics` sums them up. None where there is no ratio.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    log_ratio: Tensor | None = None
    clipped: Tensor | None = None


def clipped_policy(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_low: Bound,
    clip_high: Bound,
    weight: Tensor | None = None,
    temperature: Bound = 1.0,
) -> Loss:
    """PPO's clipped surrogate (arXiv 1707.06347, Eq. 7), mean of weight·max(-A·r, -A·clip(r, 1 - low, 1 + high)).

    With `old_log_prob` zero, `log_prob` may be any log-ratio in closed form, such as `guard_log_ratio`.

    Args:
        log_prob: (B,) with gradient.
        old_log_prob: (B,) of the policy that drew the samples.
        advantage: (B,); 0 where a sample carries no signal.
        clip_low, clip_high: ≥ 0, one for all or (B,); a `clip_low` of 1 or more never clips from below.
        weight: (B,) of each transition, or None for 1; the mean is over B, not over weights.
        temperature: > 0, one for all or (B,); log r is this times the difference of the log-probabilities. CPS's published log-prob drops
            1/(2ς²) (arXiv 2509.05952), which is a temperature of 2ς².

    Returns:
        The loss with metrics ratio/mean, ratio/std, ratio/max_deviation (largest |r - 1|), clip/high and clip/low (fractions of B that are
        clipped), kl/approximate (½·mean of the squared difference of the log-probabilities, accurate where r - 1 - log r would cancel).
    """
    difference = log_prob - old_log_prob.detach()
    log_ratio = temperature * difference
    highest, lowest = _log1p(clip_high), _log1p(-clip_low)
    above = (advantage > 0) & (log_ratio > highest)
    below = (advantage < 0) & (log_ratio < lowest)
    # replaced before the exponential, so that an overflow that is clipped sends no NaN back
    kept = torch.where(above, highest, torch.where(below, lowest, log_ratio))
    terms = -advantage * kept.exp()
    value = (terms if weight is None else weight * terms).mean()
    return Loss(value, ratio_metrics(difference, log_ratio, above, below), log_ratio.detach(), above | below)


@torch.no_grad()
def ratio_metrics(difference: Tensor, log_ratio: Tensor, above: Tensor, below: Tensor) -> dict[str, Tensor]:
    """What `clipped_policy` says of its ratios, from differences of log-probabilities, log r, and who is clipped from where, (B,) each."""
    ratio = log_ratio.exp()
    return {
        "ratio/mean": ratio.mean(),
        "ratio/std": ratio.std(correction=0),
        "ratio/max_deviation": log_ratio.expm1().abs().max(),
        "clip/high": above.float().mean(),
        "clip/low": below.float().mean(),
        "kl/approximate": difference.square().mean() / 2,
    }


def guard_log_ratio(noise: Tensor, delta: Tensor, kappa: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (arXiv 2510.22319, Eq. 8) in closed form, κ·mean(ε⊙δ) per sample: (B,), to be used as `clipped_policy`'s.

    The paper writes ς·(log p_θ - log p_old + b) with b = mean(μ_θ - μ_old)²/(2ς²). Since x' = μ_old + ς·ε and μ_θ - μ_old = κ·δ, the
    difference of the log-densities is κ·mean(ε⊙δ)/ς - b, and no density is left over: the mean is 0 under the old policy and the std |κ|
    times that of mean(ε⊙δ), without the 1/ς of the plain ratio.

    At r = 1 its gradient is κ·mean(ε⊙∇prediction), so steps weigh as |κ|. The weight that makes them equal is 1/|κ| for every transition.
    The paper's 1/Δ is that up to the constant 1 + a²/2 for Flow-SDE, where |κ| = Δ·(1 + a²/2) for 0 < σ < 1; for Dance-SDE |κ| = Δ·β with
    β = 1 + η²(1 - σ)/(2σ), so that the right weight is 1/(Δ·β), while the β/Δ of some code leaves β² instead of 1. As κ is
    ∂μ/∂prediction, "equal" is meant for what the network says, not for the picture.

    Args:
        noise: (B, ...) ε = (x' - μ_old)/ς.
        delta: (B, ...) prediction_θ - prediction_old; gradients reach only this.
        kappa: (B,) or () `visalign.paths.gain`.
    """
    delta = wide(delta)
    return kappa.to(delta) * (wide(noise).detach() * delta).flatten(1).mean(1)


def per_step_statistics(log_ratio: Tensor, clipped: Tensor, step: Tensor, count: int) -> Tensor:
    """Sums over the transitions of each denoising step: (4, count) float64, to be added up over micro-batches and ranks.

    Rows: how many, Σ(r - 1), Σ(r - 1)², how many clipped. Not r itself, whose squares would lose a spread of 1e-6 when added up.

    Args:
        log_ratio, clipped: (B,) of `Loss`.
        step: (B,) int64 in [0, count).
    """
    deviation = log_ratio.detach().double().expm1()
    rows = torch.stack([torch.ones_like(deviation), deviation, deviation.square(), clipped.double()])
    return torch.zeros(4, count, dtype=torch.float64, device=rows.device).index_add(1, step, rows)


def per_step_summary(sums: Tensor) -> dict[str, Tensor]:
    """Sums (4, T) of `per_step_statistics` as ratio/mean, ratio/std and clip/fraction, (T,) float64; NaN where there was no transition."""
    count, total, square, clipped = sums.unbind()
    mean = total / count
    return {
        "ratio/mean": 1 + mean,
        "ratio/std": (square / count - mean.square()).clamp(min=0).sqrt(),
        "clip/fraction": clipped / count,
    }


def reward_difference(
    log_ratio: Tensor,
    old: Tensor,
    credit: Tensor,
    weight: Tensor,
    groups: Tensor,
    answers: Tensor,
    *,
    beta: float,
    clip_low: Tensor,
    clip_high: Tensor,
) -> Loss:
    """PRDP (arXiv 2402.08714, Eqs. 14 and 18 to 21): in all pairs of a group, implicit rewards are to differ as rewards do.

    A sample's implicit reward is β·Σ of its steps' log-ratios. A pair's error is e = Δcredit - β·Δ(Σ log_ratio), and e' the same with every
    log-ratio cut to within the clip range about its old value; the loss is the mean of max(e², e'²) over a group's pairs, then over groups,
    divided by 4·β·S. In the paper's terms, whose β' = β·S belongs to means over steps, that is its loss times β'/4. The factor gives the
    gradient the size that policy gradients have: at log_ratio = old = 0 it is that of -mean of (reward - mean of the others')·log_ratio.

    Args:
        log_ratio: (N, S) log p_θ/p_ref of each transition, averaged over latent elements; gradients reach only this.
        old: (N, S) the same of the policy that the clip holds on to.
        credit: (N, C) in any unit: the reward (C = 1), or what the steps earned; only differences within a group count.
        weight: (N, C) ≥ 0: a pair counts as much as the product of its members' says; 0 where there is no valid credit.
        groups: (N,) int64.
        answers: (C, S) 0 or 1: the steps whose implicit rewards add up to a column of credit; all ones for the reward.
        beta: β > 0, weight of the KL per latent element, in the unit of credit.
        clip_low, clip_high: (S,) or broadcast to it, ≥ 0.

    Returns:
        The loss () float64 with metrics error (root of the mean e², in the unit of credit), explained (1 - Σe²/ΣΔcredit²: 1 at the optimum)
        and clip/pairs (the share of pairs in which e'² is the larger).
    """
    log_ratio, old = log_ratio.double(), old.double()
    cut = old + (log_ratio - old).clamp(-clip_low.double(), clip_high.double())
    same = groups[:, None] == groups
    a, b = same.triu(1).nonzero().unbind(1)
    members, count = same.double() @ (weight > 0).double(), (1 / same.sum(1, dtype=torch.float64)).sum()  # valid ones; groups
    pairs = (members * (members - 1) / 2).clamp(min=1)
    share = weight.double()[a] * weight.double()[b] / (pairs[a] * count)
    wanted = credit.double()[a] - credit.double()[b]
    free, held = (wanted - beta * (said[a] - said[b]) @ answers.to(said).T for said in (log_ratio, cut))
    value = (share * torch.maximum(free.square(), held.square())).sum() / (4 * beta * answers.sum())
    with torch.no_grad():
        error, total = (share * free.square()).sum(), (share * wanted.square()).sum()
        metrics = {
            "error": (error / share.sum().clamp(min=1e-12)).sqrt(),
            "explained": torch.where(total > 0, 1 - error / total.clamp(min=1e-300), 0.0),
            "clip/pairs": (share * (held.abs() > free.abs() * (1 + 1e-9))).sum() / share.sum().clamp(min=1e-12),
        }
    return Loss(value, metrics)


def bradley_terry(difference: Tensor, tied: Tensor | None = None, tie_odds: float = 1.0) -> Tensor:
    """-log P of what was preferred, (B,): -log σ(Δ), the model of Bradley & Terry (1952); with ties that of Rao & Kupper (1967).

    With k = `tie_odds`, P(better) = σ(Δ - log k) and P(tie) = (k² - 1)·σ(Δ - log k)·σ(-Δ - log k), as VideoAlign trains with k = 5
    (arXiv 2501.13918); k = 1 knows no ties.

    Args:
        difference: (B,) Δ, the score of the better picture less that of the other; of a tie, in either order.
        tied: (B,) bool; None: no row is. Needs k > 1.
    """
    least = math.log(tie_odds)
    won = F.softplus(least - difference)
    if tied is None or tie_odds == 1.0:
        return won
    return torch.where(tied, won + F.softplus(least + difference) - math.log(tie_odds**2 - 1), won)


def noise_weights(std: Tensor) -> Tensor:
    """TempFlow-GRPO's weight of a step (arXiv 2508.04324), its noise ς over the mean of the steps' (S,): (S,) float32 of mean 1."""
    return (std.double() / std.double().mean()).float()


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


def _log1p(value: Bound) -> Bound:
    """log(1 + value); -∞ for values of -1 and less."""
    if isinstance(value, Tensor):
        return value.clamp(min=-1).log1p()
    return math.log1p(value) if value > -1 else -math.inf
