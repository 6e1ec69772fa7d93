"""Denoising chains that gradients flow through: to the weights, for direct reward gradients, or to the initial noise.

`visalign.sampling.rollout` is the chain without a graph; the two take the same deterministic steps, to the bit.
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
    depth: int | None = None,
    truncated: Tensor | None = None,
    checkpointing: bool = True,
) -> Tensor:
    """Clean latents (N, ...) at the end of the ODE's Euler steps from x (N, ...), which lies at the start of step `first`.

    Args:
        steps: T of the family's own grid.
        guidance: of classifier-free guidance; its unconditional half is part of the graph here, because it too depends on x.
        depth: K: gradients flow through the last K steps alone (DRaFT-K, arXiv 2309.17400); None is all of them, and back to x.
        truncated: (N,) int64: per sample, how many of the steps' predictions are taken as constants, from the first on, while the states
            keep their gradient (AlignProp's random truncation, arXiv 2310.03739).
        checkpointing: recompute each step in the backward pass: memory for one step instead of all, a forward more each.
    """
    sigmas = policy.family.grid(steps).to(x.device)
    start = first if depth is None else max(first, steps - depth)
    for j in range(first, steps):
        tracked = j >= start and torch.is_grad_enabled()
        with torch.set_grad_enabled(tracked):
            t, t_next = (sigmas[k].expand(len(x)) for k in (j, j + 1))
            if tracked and checkpointing:
                said = checkpoint(predict, policy, x, t, condition, guidance, use_reentrant=False)
            else:
                said = predict(policy, x, t, condition, guidance)
            if truncated is not None:
                constant = (j < truncated).reshape(-1, *(1 for _ in x.shape[1:])).to(x.device)
                said = torch.where(constant, said.detach(), said)
            x = kernel(policy.family.path, x, said, t, t_next, ode(policy.family.path, t, t_next, 0.0)).mean
    return x


def predict(policy: Policy, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
    """`Policy.predict` (N, ...) with both halves of the guidance in the graph."""
    return policy.predict(x, t, condition, guidance, through_guidance=True)
