"""The toybox's verifier: does a picture show exactly what its prompt says?

It is to the toybox what GenEval's detector is to photographs (Ghosh et al. 2023, arXiv:2310.11513): it finds the objects and checks the
prompt's clauses. Unlike GenEval it also looks at what no clause names: additional objects, colours off the palette, haze and half-formed
shapes all cost, because a policy trained on clauses alone learns to melt the rest.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox import scenes
from visalign.toybox.perception import CLEAN, View, look

DIRTY = 0.30  # blemish (share of unexplained ink) from which on a picture is worth nothing
FORMLESS, FORMED = 0.70, 0.95  # overlap with the wanted shape that earns nothing, and all


class Toybox(Reward):
    """Score of toybox pictures, in [0, 1].

    With the objects that `perception.look` finds, `n` of them where the prompt asks for `total`, and `scenes.meets` = (exact, clauses):

        strict = exact, if blemish <= 0.05, else 0
        dense  = clean · few · (0.8 · clauses + 0.2 · form)
        clean  = (0.30 - blemish) / 0.25, cut to [0, 1]
        few    = 1 - (n - total) / (3 · total), cut to [0, 1]: 0 from four times the objects on, as in a picture tiled 2 × 2
        form   = sum over objects of (overlap - 0.70) / 0.25, cut to [0, 1], divided by max(n, total), where `overlap` is an object's best
                 intersection over union with a shape that the prompt names: shapes earn on beyond the point where they are recognised

    A blemish is ink (everything but plain ground) that isn't an object of 12 to 1000 pixels within 44/255 of a palette colour, or ground
    that is off by over 24/255 on average over 3 × 3 pixels; the pixels along an outline may be any mixture of ground and colour. Ink over
    half of the picture is all blemish. Gaussian noise of 0.03 and blur of 0.7 pixels blemish nothing. A shape is recognised from an
    overlap of 0.90 with a template on, 0.06 above any other shape's.

    Args:
        form: which of the two is the score; both are `components`.

    Records come from the metadata's `include` (GenEval's form), else from the prompt; a prompt that is neither, or
    a picture with a value that isn't finite, is invalid.
    """

    spec = RewardSpec("toybox", needs=frozenset({"prompt"}), range=(0.0, 1.0), licence="Apache-2.0")

    def __init__(self, form: Literal["dense", "strict"] = "dense"):
        if form not in ("dense", "strict"):
            raise UserError(f"toybox: form is {form!r}, must be 'dense' or 'strict'")
        self.form = form

    def score(self, batch: RewardInput) -> RewardOutput:
        """Scores of (N, 3, H, W) pictures of any size (64 is the world's own)."""
        sound = batch.images.flatten(1).isfinite().all(1).tolist()
        records = [scenes.wanted(m, p) if ok else None for m, p, ok in zip(batch.metadata, batch.prompts, sound, strict=True)]
        views = look(torch.nan_to_num(batch.images))
        pairs = [(np.nan, np.nan) if r is None else judge(view, r) for view, r in zip(views, records, strict=True)]
        strict, dense = torch.tensor(pairs, dtype=torch.float32, device=batch.images.device).reshape(-1, 2).unbind(1)
        return RewardOutput.of(strict if self.form == "strict" else dense, components={"strict": strict, "dense": dense})


def judge(view: View, record: scenes.Metadata) -> tuple[float, float]:
    """(strict, dense) of one perceived picture; the formula is `Toybox`'s."""
    exact, clauses = scenes.meets(view.objects, record)
    count, total = len(view.objects), sum(clause["count"] for clause in record["include"])
    named = [scenes.SHAPES.index(clause["class"]) for clause in record["include"]]
    overlap = view.likeness[:, named].max(1, initial=0.0)
    form = _ramp(overlap, FORMLESS, FORMED).sum() / max(count, total)
    few = 1 - _ramp(count, total, 4 * total)
    clean = 1 - _ramp(view.blemish, CLEAN, DIRTY)
    return exact * (view.blemish <= CLEAN), float(clean * few * (0.8 * clauses + 0.2 * form))


def _ramp(value: float | np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high` on, linear between."""
    return np.clip((np.asarray(value, np.float64) - low) / (high - low), 0, 1)
