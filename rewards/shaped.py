"""Reward shaping: PAR and its relatives, which keep a reward's order but not its pull to the extremes.

PAR (Fu et al. 2025, arXiv 2502.18770) passes a score, less that of a reference answer to the same prompt, through a sigmoid: bounded,
growing fast and then slowly, centred on the reference. It leaves the ranks within a group alone; with `credit.std: group` much of it is
divided out again, so use `global` or `none`. Differs from the paper: k is in units of the references' spread where it isn't given, since
scores of pictures have spreads from 0.01 to 1; all statistics are of the references and frozen, where the paper's min-max runs with
training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visalign.composite import Calibrated, valid_scores
from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, Scores

Form = Literal["par", "centred", "tanh", "clip", "min_max", "mean_std", "ceiling", "lsc", "rank"]
RANGES = {"par": (0.0, 1.0), "tanh": (-1.0, 1.0), "lsc": (-torch.inf, 0.0), "rank": (0.0, 1.0)}
Q85 = 1.0364334  # the standard normal's 85 % quantile


class Shaped(Calibrated):
    """A monotone function of a reward r, measured against reference scores r_1 … r_M (arXiv 2502.18770); keeps gradients, but for `rank`.

    References are those of a sample's own prompt where there are any, else all. m is their mean; s, least and greatest are of all
    references.

        par       mean over references of σ(k (r - r_m))
        centred   r - m
        tanh      tanh(k (r - m))
        clip      r, cut to m ± s
        min_max   (r - least) / (greatest - least), not cut
        mean_std  (r - m) / s
        ceiling   min(r, greatest)
        lsc       log σ(k (r - q)), with q = m + 1.036 s, the 85 % quantile of a normal
        rank      (rank - ½) / G among the G valid members of the group, ties sharing their mean rank: blind to any monotone change of r,
            and to how sure it is, so give `credit.noise_floor` where scores are close

    Args:
        of: the reward.
        form: one of these.
        k: steepness in units of 1/r; None: 1/s.
        references: file of reference scores: .json, {prompt: score or [scores]}; .jsonl, {"prompt": …, "scores": [scores]} a line; or
            .safetensors of an earlier run. None: those of pictures of the untrained model.
        pictures: of the untrained model, over as many prompts; those of one prompt are its references.
    """

    def __init__(self, of: Reward, form: Form = "par", k: float | None = None, references: str | None = None, pictures: int = 256):
        plain = references is not None and Path(references).suffix in (".json", ".jsonl")
        learns = () if form == "rank" else ("keys", "scores")
        super().__init__(of, learns=learns, pictures=pictures, file=None if plain else references, name="shaped")
        if k is not None and not k > 0:
            raise UserError(f"shaped: k must be above 0, got {k:g}")
        self.form, self.k = form, k
        if references is not None and plain and learns:
            self.learned = _read(Path(references))
        self.own["range"] = RANGES.get(form, (-torch.inf, torch.inf))
        if form == "rank":
            self.own |= {"differentiable": False, "scope": "group", "needs": self.spec.needs | {"groups"}}

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; the raw score is the component named after the member."""
        scored = self.panel.score(batch)
        raw = scored.total
        if self.form == "rank":
            assert batch.groups is not None
            return self.result(scored, ranks(raw.detach(), batch.groups))
        references, keys = self.known("scores").to(raw.device), self.known("keys").to(raw.device)
        own = torch.tensor([key(prompt) for prompt in batch.prompts], device=raw.device)[:, None] == keys
        used = own | ~own.any(1, keepdim=True)
        return self.result(scored, self._shape(raw, references, used))

    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        scores = valid_scores(scored, next(iter(scored.outputs)), "shaped")
        keys = torch.tensor([key(prompt) for prompt in base.prompts])
        return {"keys": keys[scored.valid.cpu()].to(scores.device), "scores": scores}

    def _shape(self, raw: Tensor, references: Tensor, used: Tensor) -> Tensor:
        """(N,) from (N,) scores, (R,) references and (N, R) which of them count for which sample."""

        def mean(values: Tensor) -> Tensor:
            return (values * used).sum(1) / used.sum(1)

        centre, spread = mean(references), references.std(correction=0)
        k = 1 / spread if self.k is None else self.k
        match self.form:
            case "par":
                return mean(torch.sigmoid(k * (raw[:, None] - references)))
            case "centred":
                return raw - centre
            case "tanh":
                return torch.tanh(k * (raw - centre))
            case "clip":
                return raw.clamp(centre - spread, centre + spread)
            case "min_max":
                return (raw - references.min()) / (references.max() - references.min())
            case "mean_std":
                return (raw - centre) / spread
            case "ceiling":
                return raw.clamp(max=references.max())
            case _:
                return F.logsigmoid(k * (raw - centre - Q85 * spread))


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """(rank - ½) / G of each score among the G finite ones of its group, ties sharing their mean rank: (N,) in (0, 1), NaN where NaN."""
    together = (groups[:, None] == groups.to(scores.device)) & scores.isfinite()
    below, level = ((together & relation).sum(1) for relation in (scores < scores[:, None], scores == scores[:, None]))
    return torch.where(scores.isfinite(), (below + level / 2) / together.sum(1), torch.nan)


def key(prompt: str) -> int:
    """A prompt as a number that a tensor can hold."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "little")


def _read(file: Path) -> dict[str, Tensor]:
    """Reference scores of a JSON or JSONL file, as `Shaped.learn` returns them."""
    try:
        text = file.read_text(encoding="utf-8")
        lines: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else []
        table = [(line["prompt"], line["scores"]) for line in lines] or list(json.loads(text).items())
        rows = [(key(prompt), float(score)) for prompt, found in table for score in _listed(found)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"shaped: {file} holds no reference scores ({type(error).__name__}: {error}); expected {{prompt: [scores]}}"
        ) from None
    scores = torch.tensor([score for _, score in rows])
    if len(rows) < 2 or not scores.std(correction=0) > 1e-8:
        raise UserError(f"shaped: {file} has {len(rows)} reference scores; expected two or more that differ and are finite")
    return {"keys": torch.tensor([number for number, _ in rows]), "scores": scores}


def _listed(found: float | Sequence[float]) -> Sequence[float]:
    return found if isinstance(found, list) else [found]  # pyright: ignore[reportReturnType]
