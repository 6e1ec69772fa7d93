"""Losses on the forward process: clean samples are mixed with noise, and what the network says of the mixture is held against the truth.

No sampler is replayed, so pictures may come from any solver, or from a file. All of these weigh the same matching error
e = mean(prediction - target)² over latent axes, each by its own coefficient; they hold for whatever the network predicts along a
`visalign.paths.Path`, except where a docstring says otherwise.

N samples, `...` latent axes; everything is worked out in at least float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visalign.losses import velocity_kl
from visalign.paths import Path, endpoints, wide

Space = Literal["clean", "prediction"]
Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
TINY = 1e-10  # of AWM's Huber forms, where the error is 0


def error(prediction: Tensor, target: Tensor) -> Tensor:
    """mean(prediction - target)² per sample, (N,), from (N, ...) each; gradients reach only the first."""
    return velocity_kl(prediction, target)


def optimality(advantage: Tensor, most: float, mode: Literal["all", "positive", "negative", "one", "binary"] = "all") -> Tensor:
    """DiffusionNFT's probability that a sample is a good one (arXiv 2509.16117, Eq. 10), r = ½ + A/(2·most) cut to [0, 1]: (N,) float32.

    Args:
        advantage: (N,) A.
        most: the |A| at which r is 0 or 1.
        mode: of the authors' code: "all"; "positive" and "negative" take the others' A for 0; "one" is A = 1 for the positive, else 0;
            "binary" is the sign of A.
    """
    used = {
        "all": advantage,
        "positive": advantage.clamp(min=0),
        "negative": advantage.clamp(max=0),
        "one": (advantage > 0).to(advantage),
        "binary": advantage.sign(),
    }[mode]
    return (0.5 + used / (2 * most)).clamp(0, 1)


def negative_aware(
    path: Path,
    x: Tensor,
    clean: Tensor,
    target: Tensor,
    t: Tensor,
    prediction: Tensor,
    old: Tensor,
    share: Tensor,
    beta: float,
    space: Space,
) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117, Eq. 5), [r·L(v⁺) + (1 - r)·L(v⁻)]/β per sample: (N,).

    v⁺ = β·v + (1 - β)·v_old and v⁻ = (1 + β)·v_old - β·v are the implicit positive and negative policy. With δ = v - v_old and plain L it
    is, up to a constant, 2·(2r - 1)·mean(δ⊙(v_old - target)) + β·mean(δ²): matching weighted by 2r - 1 and linearised at the old policy,
    plus a proximal term. Its minimiser is v_old + (2/β)·Cov(r, target | x), if v_old is the mean of the target.

    Args:
        x, clean, target, t: as in `visalign.rollout.Noised`.
        prediction, old: (N, ...) of the policy, with gradient, and of the old one.
        share: (N,) r of `optimality`.
        beta: β > 0.
        space: "prediction": L is the matching error, as in the paper. "clean", the authors' code: the error of the clean sample that a
            prediction implies, over its own mean absolute value (without gradient), which keeps all times at one scale.
    """
    old = wide(old).detach()
    positive, negative = beta * wide(prediction) + (1 - beta) * old, (1 + beta) * old - beta * wide(prediction)

    def loss(said: Tensor) -> Tensor:
        if space == "prediction":
            return error(said, target)
        difference = (endpoints(path, x, said, t)[0] - clean).flatten(1)
        return difference.square().mean(1) / difference.detach().abs().mean(1).clamp(min=1e-5)

    return (share * loss(positive) + (1 - share) * loss(negative)) / beta


def likelihood(errors: Tensor, sigma: Tensor, weighting: Weighting, power: float = 0.25) -> Tensor:
    """AWM's stand-in for a log-likelihood (arXiv 2509.25050), -w·φ(e): (N,).

    Args:
        errors: (N,) e.
        sigma: (N,) the noise's coefficient in the mixture, which is t for a flow.
        weighting: "uniform" -e, "t" -t·e, "t2" -t²·e, "huber" -t·√e, "ghuber" -(t/p)·e^p, the last two smoothed at 0.
        power: p of "ghuber".
    """
    if weighting == "ghuber":
        return -sigma / power * ((errors + TINY) ** power - TINY**power)
    if weighting == "huber":
        return -sigma * ((errors + TINY).sqrt() - TINY**0.5)
    return -errors * {"uniform": torch.ones_like(sigma), "t": sigma, "t2": sigma.square()}[weighting]


def preference_margin(errors: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's margin (arXiv 2311.12908, Eq. 14), -½β·[(e - e_ref) of the first - (e - e_ref) of the second]: (U,).

    Its sigmoid is the probability that the first is preferred, under the policy's implicit reward.

    Args:
        errors, reference: (2·U,) matching errors of policy and reference, with all firsts before all seconds.
        beta: per mean over latent elements, hence large.
    """
    first, second = (reference.detach() - errors).chunk(2)
    return beta / 2 * (first - second)
