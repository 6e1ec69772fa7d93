"""Denoising chains that gradients flow through: to the weights, for direct reward gradients, or to the initial noise.

`visalign.sampling.rollout` is the chain without a graph; the two take the same deterministic steps, to the bit. Gradients are truncated by
taking the steps before the trained ones under `torch.no_grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visalign.policy import Policy
from visalign.rollout import Condition
from visalign.transitions import kernel, ode


def denoise(
    policy: Policy,
    x: Tensor,
    condition: Condition,
    *,
    steps: int,
    guidance: float = 1.0,
    first: int = 0,
    last: int | None = None,
    prediction: Tensor | None = None,
    checkpointing: bool = True,
) -> Tensor:
    """Latents (N, ...) at the start of step `last`, or clean if that is None, by the ODE's Euler steps from x (N, ...) at that of `first`.

    Args:
        steps: T of the family's own grid.
        guidance: of classifier-free guidance; its unconditional half is part of the graph here, because it too depends on x.
        prediction: (N, ...) the network's at x, where it is known: saves one forward.
        checkpointing: recompute each step in the backward pass: memory for one step instead of all, a forward more each. A single step
            is never computed twice.
    """
    sigmas = policy.family.grid(steps).to(x.device)
    end = steps if last is None else last
    for j in range(first, end):
        t, t_next = (sigmas[k].expand(len(x)) for k in (j, j + 1))
        if prediction is None:
            prediction = predict(policy, x, t, condition, guidance, checkpointing=checkpointing and end - first > 1)
        x = kernel(policy.family.path, x, prediction, t, t_next, ode(policy.family.path, t, t_next, 0.0)).mean
        prediction = None
    return x


def predict(policy: Policy, x: Tensor, t: Tensor, condition: Condition, guidance: float, *, checkpointing: bool = False) -> Tensor:
    """`Policy.predict` (N, ...) with both halves of the guidance in the graph; `checkpointing` keeps no activations for it."""

    def said(x: Tensor) -> Tensor:
        return policy.predict(x, t, condition, guidance, through_guidance=True)

    tracked = checkpointing and torch.is_grad_enabled()
    return checkpoint(said, x, use_reentrant=False) if tracked else said(x)  # pyright: ignore[reportReturnType]
