"""What a rollout must keep for the gradient of a reward to flow through its last steps, and that gradient by the latents.

Decoder and rewards are differentiated here, apart from the denoiser: theirs is the largest part of the graph, and it is gone before the
denoiser's is built. By the chain rule nothing else is needed of it but the gradient by the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.paths import expand
from visalign.policy import Policy
from visalign.rollout import Prompts, Rollout, Trajectory
from visalign.scoring import Panel, RewardInput, Scores


@dataclass(frozen=True)
class Walk:
    """How a micro-batch of B was drawn.

    Attributes:
        starts, ends: S of (B, ...), states from which gradients flow, and the clean latents to which they lead.
        steps: S of (B,) int64, on the CPU: where on the grid the states are.
        pictures: B of (1, 3, H, W), the given pictures with which the chains began, if they did.
    """

    starts: list[Tensor]
    ends: list[Tensor]
    steps: list[Tensor]
    pictures: list[Tensor] | None


@dataclass(frozen=True)
class Verdict:
    """What rewards say of a walk.

    Attributes:
        images: (B, 3, H, W) of the first ends.
        rewards: alias -> (B,), of these.
        values: (B, S) the totals of all ends.
        slopes: (B, S, ...) their gradients by the ends, times the weight that the rewards give themselves; 0 where one of these failed.
        errors: alias -> what a reward said of pictures that it could not score.
    """

    images: Tensor
    rewards: dict[str, Tensor]
    values: Tensor
    slopes: Tensor
    errors: dict[str, list[str]]


@dataclass(frozen=True)
class Judged(Rollout):
    """A rollout whose S recorded steps lead from the kept states straight to the S latents that were judged; `values` are their rewards.

    Attributes:
        slopes: (N, S, ...) as in `Verdict`.
    """

    slopes: Tensor | None = None


@torch.enable_grad()
def judge(policy: Policy, rewards: Panel, prompts: Prompts, walk: Walk, together: bool) -> Verdict:
    """Decode and score the ends of a walk: each by itself, or `together`, the first with the others as its views."""
    images: list[Tensor] = []
    found: list[Scores] = []
    slopes: list[Tensor] = []
    for ends in [walk.ends] if together else [[end] for end in walk.ends]:
        leaves = [end.detach().requires_grad_() for end in ends]
        shown = [policy.family.decode(leaf) for leaf in leaves]
        views = torch.stack(shown[1:], 1) if together else None
        known = {"references": walk.pictures, "groups": prompts.groups, "views": views}
        said = rewards.score(RewardInput(shown[0], prompts.texts, prompts.metadata, **known))
        gradients = torch.autograd.grad(torch.where(said.valid, said.total, 0.0).sum(), leaves, materialize_grads=True)
        trust = said.valid.float() if said.weight is None else said.valid * said.weight.detach().nan_to_num(0.0)
        slopes += [_sound(expand(trust.to(gradient), gradient) * gradient) for gradient in gradients]
        images.append(shown[0].detach())
        found.append(said)
    values = torch.stack([said.total.detach() for said in found], 1).expand(-1, len(slopes))
    first = {name: scores.detach() for name, scores in found[0].by_name().items()}
    return Verdict(images[0], first, values, torch.stack(slopes, 1), found[0].errors)


def _sound(gradient: Tensor) -> Tensor:
    """(B, ...) with 0 for rows that aren't finite: what fails for one picture may send it NaN where it was asked for nothing."""
    return torch.where(expand(gradient.flatten(1).isfinite().all(1), gradient), gradient, 0.0)


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Verdicts of one micro-batch after another as one."""
    first = verdicts[0]
    return Verdict(
        torch.cat([v.images for v in verdicts]),
        {name: torch.cat([v.rewards[name] for v in verdicts]) for name in first.rewards},
        torch.cat([v.values for v in verdicts]),
        torch.cat([v.slopes for v in verdicts]),
        {alias: list(dict.fromkeys(text for v in verdicts for text in v.errors[alias])) for alias in first.errors},
    )


def trajectory(walks: Sequence[Walk], sigmas: Tensor, nfe: float) -> Trajectory:
    """Walks as recorded steps from start to end; being deterministic they have no density."""
    pairs = [torch.stack([x for pair in zip(w.starts, w.ends, strict=True) for x in pair], 1) for w in walks]
    steps = torch.cat([torch.stack(w.steps, 1) for w in walks]).to(sigmas.device)
    latents, (count, columns) = torch.cat(pairs), steps.shape
    return Trajectory(
        latents=latents,
        before=2 * torch.arange(columns, device=sigmas.device),
        steps=steps,
        sigmas=sigmas,
        log_probs=torch.full((count, columns), torch.nan, device=sigmas.device),
        node=torch.arange(count, device=sigmas.device)[:, None].repeat(1, 2 * columns),
        final=latents[:, 1],
        nfe=nfe,
    )
