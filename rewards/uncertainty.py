"""Uncertainty-aware reward: how far a score can be trusted, and less credit where it can't.

Ctrl-U (Zhang et al. 2024, arXiv 2410.11236) compares what a reward model says of two generations of one sample and damps the pixels on
which it disagrees with itself. Differs from it: besides a second generation the disagreement may be the member's own report, its spread
under changes that no judge should mind, or that of an ensemble; and the scalar forms are shift-invariant. r·exp(-U) isn't: whether doubt
raises or lowers it depends on where the reward's zero lies, so here doubt is subtracted from the score or scales the advantage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.composite import Calibrated, Members, valid_scores
from visalign.errors import UserError
from visalign.perturb import perturbed
from visalign.scoring import Reward, RewardInput, RewardOutput, Scores

MEDIA = {"image": "images", "video": "video"}


class Uncertainty(Calibrated):
    """A reward with its uncertainty U, in the unit of the scores, in `uncertainty` (N,). Keeps gradients.

    Args:
        of: one reward, or for `ensemble` several.
        source: where U comes from: "inner" the member's own `uncertainty` (HPSv3's σ, a judge's order swaps); "augment" the std over the
            picture and `changes` changed copies (`visalign.perturb`); "ensemble" the std over the members, each first centred and scaled by
            median and 1.4826·MAD over pictures of the untrained model, and the weighted mean of these is the score; "two_views"
            mean |member(picture) - member(view)| over further generations of the sample in `RewardInput.views`, of dense maps where the
            member has one.
        form: "lower_bound" is r - kappa·U; "weight" is r with `weight` exp(-(U/tolerance)²) on the advantage; "attenuate" is Ctrl-U's loss
            for a dense map d with best value 0, mean(d·exp(-U)) - kappa·mean(U), with U per pixel and a gradient through it, which the
            second term keeps from growing U.
        kappa: price of a unit of U.
        tolerance: U at which an advantage counts by 1/e.
        changes: changed copies that are scored besides the picture itself.
        pictures: of the untrained model that an ensemble is scaled by.
        statistics: file with these scales, from an earlier run.

    Raises:
        UserError: options that don't go together; a member without what the source needs.
    """

    def __init__(
        self,
        of: Reward | Members,
        source: Literal["inner", "augment", "ensemble", "two_views"] = "augment",
        form: Literal["lower_bound", "weight", "attenuate"] = "lower_bound",
        kappa: float = 1.0,
        tolerance: float = 1.0,
        changes: int = 3,
        pictures: int = 256,
        statistics: str | None = None,
    ):
        used = [alias for alias, (_, weight) in of.items() if weight] if isinstance(of, dict) else []
        learns = [f"robust.{alias}" for alias in used] if source == "ensemble" else []
        super().__init__(of, learns=learns, pictures=pictures, file=statistics, name="uncertainty")
        self.source, self.form, self.kappa, self.tolerance, self.changes = source, form, kappa, tolerance, changes
        if (len(self.panel.rewards) > 1) != (source == "ensemble") or (learns and len(learns) < 2):
            raise UserError(f"uncertainty: source={source} wants {'two or more rewards' if learns else 'one reward'} in `of`")
        low, high = self.inner.spec.range
        if form == "attenuate" and (source != "two_views" or high > 0):
            raise UserError(
                f"uncertainty: form=attenuate scales a dense map that is 0 at best, so it needs source=two_views and a reward of range "
                f"(…, 0]; {self.inner.spec.name} has [{low:g}, {high:g}]: use lower_bound or weight"
            )
        if kappa < 0 or not tolerance > 0 or changes < 1:
            raise UserError(f"uncertainty: want kappa >= 0, tolerance > 0, changes >= 1; got {kappa:g}, {tolerance:g}, {changes}")
        if source == "augment" and self.inner.spec.modality not in MEDIA:
            raise UserError("uncertainty: source=augment changes pictures, and this reward looks at latents; use another source")
        if source != "ensemble":
            self.own["range"] = (low, high) if form == "weight" else (-torch.inf, high)
        if source == "two_views":
            self.own["needs"] = self.spec.needs | {"views"}

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32, invalid where the score or its uncertainty is."""
        scored = self.panel.score(batch)
        score, doubt, dense = self._doubt(batch, scored)
        shown = {"uncertainty": doubt.flatten(1).mean(1) if doubt.ndim > 1 else doubt, "dense": dense}
        if self.form == "attenuate":
            if dense is None:
                raise UserError(f"uncertainty: form=attenuate needs a dense map, and {self.inner.spec.name} has none; use lower_bound")
            damped = dense * torch.exp(-doubt)
            return self.result(scored, (damped - self.kappa * doubt).flatten(1).mean(1), **(shown | {"dense": damped}))
        if self.form == "lower_bound":
            return self.result(scored, score - self.kappa * shown["uncertainty"], **shown)
        weight = torch.exp(-(shown["uncertainty"].detach() / self.tolerance).square()).nan_to_num(0.0)
        weight = weight if scored.weight is None else weight * scored.weight
        return self.result(scored, torch.where(shown["uncertainty"].isfinite(), score, torch.nan), **shown, weight=weight)

    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        return {name: _robust(valid_scores(scored, name.removeprefix("robust."), "uncertainty")) for name in self.learns}

    def _doubt(self, batch: RewardInput, scored: Scores) -> tuple[Tensor, Tensor, Tensor | None]:
        """(score (N,), U (N,) or (N, h, w), dense map)."""
        alias, output = next(iter(scored.outputs.items()))
        score, dense = output.scores, output.dense
        if self.source == "ensemble":
            used = {a: weight for a, weight in scored.weights.items() if weight}
            standard = torch.stack([self._standard(a, scored.outputs[a].scores) for a in used])
            weights = standard.new_tensor(list(used.values()))[:, None]
            return (weights * standard).sum(0) / weights.abs().sum(), _std(weights.sign() * standard), None
        if self.source == "augment":
            changed = [self._score(self._changed(batch, number), alias).scores for number in range(self.changes)]
            return score, _std(torch.stack([score, *changed])), dense
        if self.source == "two_views":
            assert batch.views is not None
            others = [self._score(replace(batch, images=view), alias) for view in batch.views.unbind(1)]
            apart = [score - o.scores if dense is None or o.dense is None else dense - o.dense for o in others]
            return score, torch.stack(apart).abs().mean(0), dense
        if output.uncertainty is None:
            raise UserError(f"uncertainty: {self.inner.spec.name} reports none of its own; use source=augment, or ensemble")
        return score, output.uncertainty, dense

    def _standard(self, alias: str, scores: Tensor) -> Tensor:
        """(N,) in units of the member's spread over the untrained model's pictures, from their median on."""
        median, spread = self.known(f"robust.{alias}").to(scores).unbind()
        return (scores - median) / spread

    def _score(self, batch: RewardInput, alias: str) -> RewardOutput:
        return self.panel.score(batch).outputs[alias]

    def _changed(self, batch: RewardInput, number: int) -> RewardInput:
        media = MEDIA[self.inner.spec.modality]
        frames: Tensor = getattr(batch, media)
        changed = perturbed(frames.flatten(0, -4), number)
        return replace(batch, **{media: changed.unflatten(0, frames.shape[:-3])})


def _std(values: Tensor) -> Tensor:
    """Population std over the first axis, whose gradient where all are equal is 0 and not NaN."""
    return (values - values.mean(0)).square().mean(0).clamp_min(1e-20).sqrt()


def _robust(scores: Tensor) -> Tensor:
    """(2,): median, and 1.4826 times the median distance to it; the plain std where half of the scores are equal."""
    median = scores.quantile(0.5)
    spread = 1.4826 * (scores - median).abs().quantile(0.5)
    return torch.stack([median, torch.where(spread > 1e-8, spread, scores.std(correction=0))])
