"""D²-Align: a CLIP-like reward whose text target is moved towards what the model already draws, so that it can't be had by style alone.

Preference scores reward a favourite look whatever the prompt, and a policy that is trained on them collapses to it. D²-Align
(arXiv 2512.24146) learns one direction b in the encoder's space on pictures of the untrained model, and scores against texts guided along
it. Differs from the paper: ‖b‖ is bounded. Where pictures are nearer to each other than to their texts, as in CLIP's space, the objective
of stage 1 has no optimum: as ‖b‖ grows every text becomes b/‖b‖, the score forgets the prompt, and the objective still rises. `radius` ends
that where texts still count (b is added to unit vectors). And b is fitted on all pictures at once, from 0: a function of them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.composite import Calibrated
from visalign.errors import UserError
from visalign.features import DualEncoder
from visalign.scoring import Reward, RewardInput, RewardOutput, Scores


class Directional(Calibrated):
    """scale · cos(image, ẽ), differentiable; scale is the member's own, so that b = 0 gives its score (arXiv 2512.24146).

    Args:
        of: a reward with an `encoder` for pictures and texts that returns the pictures' embeddings: clip_score, pickscore, hps.
        omega: ω ≥ 1 of `guided`; the paper's 1.5.
        radius: largest ‖b‖.
        steps, lr: of Adam in stage 1.
        pictures: of the untrained model in stage 1.
        direction: file with b, from an earlier run.

    Raises:
        UserError: a member without an encoder, a bad option.
    """

    def __init__(
        self,
        of: Reward,
        omega: float = 1.5,
        radius: float = 0.3,
        steps: int = 500,
        lr: float = 0.01,
        pictures: int = 256,
        direction: str | None = None,
    ):
        super().__init__(of, learns=["direction"], pictures=pictures, file=direction, name="directional", range=of.spec.range)
        if omega < 1 or not radius > 0 or steps < 1 or not lr > 0:
            raise UserError(f"directional: want omega >= 1, radius > 0, steps >= 1, lr > 0; got {omega:g}, {radius:g}, {steps}, {lr:g}")
        encoder: Any = getattr(of, "encoder", None)
        if not isinstance(encoder, DualEncoder):
            raise UserError(f"directional: {of.spec.name} has no picture and text encoder; use clip_score, pickscore or hps")
        if getattr(of, "baseline", None) is not None:
            raise UserError(f"directional: {of.spec.name} measures from a baseline, and a direction takes its place; leave baseline out")
        self.encoder: DualEncoder = encoder
        self.scale = float(getattr(of, "scale", 1.0))
        self.omega, self.radius, self.steps, self.lr = omega, radius, steps, lr

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in the member's range; component "cosine" (N,), of picture and guided text."""
        scored = self.panel.score(batch)
        image, text = self._embedded(scored), self.encoder.encode_texts(batch.prompts)
        cosine = (image * guided(text, self.known("direction").to(text), self.omega)).sum(-1)
        return self.result(scored, self.scale * cosine, components={"cosine": cosine})

    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        image, text = self._embedded(scored), self.encoder.encode_texts(base.prompts)
        sound = scored.valid
        if not sound.any():
            raise UserError(f"directional: {self.inner.spec.name} could score none of the untrained model's pictures")
        found = fit_direction(image[sound], text[sound], self.omega, steps=self.steps, lr=self.lr, radius=self.radius)
        return {"direction": found}

    def _embedded(self, scored: Scores) -> Tensor:
        """(N, D) of unit length: what the member's encoder made of the pictures, on its way to the score."""
        embeddings = next(iter(scored.outputs.values())).embeddings
        if not embeddings:
            raise UserError(f"directional: {self.inner.spec.name} returns no embeddings of its pictures")
        return F.normalize(next(iter(embeddings.values())), dim=-1)


def guided(text: Tensor, direction: Tensor, omega: float) -> Tensor:
    """ẽ = e⁻ + ω(e⁺ - e⁻) of unit length, with e± = normalize(text ± direction) (arXiv 2512.24146): (N, D) from (N, D) and (D,).

    To first order in b, the part of b across the text, P b: ẽ ∝ text + (2ω - 1) P b.
    """
    ahead, behind = F.normalize(text + direction, dim=-1), F.normalize(text - direction, dim=-1)
    return F.normalize(behind + omega * (ahead - behind), dim=-1)


@torch.enable_grad()
def fit_direction(image: Tensor, text: Tensor, omega: float, *, steps: int, lr: float, radius: float) -> Tensor:
    """b of stage 1, the maximum of mean cos(image, ẽ) with ‖b‖ ≤ radius, by Adam from 0: (D,) from (N, D) and (N, D)."""
    direction = torch.zeros_like(text[0], requires_grad=True)
    adam = torch.optim.Adam([direction], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        (-(image * guided(text, direction, omega)).sum(-1).mean()).backward()
        adam.step()
        with torch.no_grad():
            direction *= (radius / direction.norm().clamp_min(1e-12)).clamp(max=1.0)
    return direction.detach()
