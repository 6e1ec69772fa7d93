"""The contract of a reward, and how several of them score one batch of media.

A reward turns media in [0, 1] and prompts into (N,) scores. The same object is a training signal, a differentiable loss, a guide at
sampling time, a metric and a monitor. A score that could not be computed is invalid (NaN), never 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.rollout import Sliceable


class RewardError(RuntimeError):
    """A reward broke its contract or cannot score what it was given."""


@dataclass(frozen=True)
class RewardInput(Sliceable):
    """N pictures or videos with what is known of them.

    Attributes:
        images: (N, 3, H, W) float in [0, 1]; or videos, (N, F, 3, H, W), which are then the `video`.
        prompts: N texts.
        metadata: N dicts; empty when nothing is known.
        video: (N, F, 3, H, W) float in [0, 1], for video rewards.
        references: N tensors (R, 3, H, W) in [0, 1], or None.
        groups: (N,) int64, for rewards that compare the members of a group.
        latents, sigma: (N, ...) and (N,), for rewards on noisy latents.
        views: (N, V, 3, H, W) in [0, 1], further generations of each sample, from another noise or time, to see whether scores agree.
    """

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]] = field(default_factory=list)
    video: Tensor | None = None
    references: list[Tensor] | None = None
    groups: Tensor | None = None
    latents: Tensor | None = None
    sigma: Tensor | None = None
    views: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.metadata:
            object.__setattr__(self, "metadata", [{} for _ in self.prompts])
        if self.images.ndim == 5:
            object.__setattr__(self, "video", self.images)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardOutput:
    """Scores of N inputs.

    Attributes:
        scores: (N,) float32, NaN where invalid.
        valid: (N,) bool.
        components: name -> (N,), the raw parts of the score.
        dense: (N, h, w) or (N, F, h, w) credit map, if the reward has one.
        uncertainty: (N,) in the unit of the scores.
        embeddings: name -> (N, D), for diversity and corrections.
        weight: (N,) in [0, 1], how much an advantage (or a loss) that the score earns counts, 0 where invalid; None: 1.
        info: anything worth keeping: lists of N (a judge's texts), or single values (a version). `errors`: why a score failed, N texts or
            None.
    """

    scores: Tensor
    valid: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None
    uncertainty: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Tensor, **more: Any) -> RewardOutput:
        """Scores of which the finite ones are valid."""
        scores = scores.float()
        valid = scores.isfinite()
        return cls(torch.where(valid, scores, scores.new_tensor(math.nan)) if not valid.all() else scores, valid, **more)


@dataclass(frozen=True)
class RewardSpec:
    """What a reward promises.

    Attributes:
        name, version: `version` changes whenever the same input could score otherwise (a trainable reward after an update; "0" is one
            that has learned nothing).
        scope: "point" scores each sample alone; "group" compares the members of a group; "pair", "set" likewise.
        differentiable: scores carry gradients to `images` (or `video`); of a class, whether those of any of its instances do.
        needs: of {"prompt", "metadata:KEY", "references", "groups", "latents", "video", "views"}.
        range: lowest and highest possible score.
        noise_std: spread of re-scoring the same picture, measured; differences below it are noise.
        licence, model_id: of the default weights.
    """

    name: str
    version: str = "1"
    scope: Literal["point", "group", "pair", "set"] = "point"
    modality: Literal["image", "video", "latent"] = "image"
    differentiable: bool = False
    trainable: bool = False
    deterministic: bool = True
    needs: frozenset[str] = frozenset()
    range: tuple[float, float] = (-math.inf, math.inf)
    higher_is_better: bool = True
    noise_std: float = 0.0
    licence: str = ""
    model_id: str = ""


class Reward(ABC):
    """Base of all rewards. A subclass sets `spec` and implements `score`; the other methods may stay as they are.

    A file `rewards/NAME.py` defines exactly one subclass; the keyword arguments of its `__init__` are its options in a config.
    """

    spec: RewardSpec

    @classmethod
    def gradient_with(cls, options: Mapping[str, Any]) -> bool | None:
        """Whether scores will carry gradients with these options, as far as that is known before anything is loaded; None: it isn't."""
        del options
        spec = getattr(cls, "spec", None)
        return spec.differentiable if isinstance(spec, RewardSpec) else None

    @abstractmethod
    def score(self, batch: RewardInput) -> RewardOutput:
        """Score N inputs: (N,) float32. Must not depend on how the inputs are batched (except within groups, for group scope)."""

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Fill caches (text features, references) for prompts that will come; scoring without it gives the same scores."""
        del prompts, metadata

    def real(self, batch: RewardInput) -> RewardInput:
        """What `update` holds against a batch of generated pictures; here its references, each prompt's as often as it has pictures."""
        if batch.references is None:
            raise RewardError(f"reward {self.spec.name} learns from references, and this batch has none")
        owner = torch.tensor([row for row, own in enumerate(batch.references) for _ in own])
        return replace(batch.take(owner), images=torch.cat(batch.references), references=None)

    def update(self, real: RewardInput, fake: RewardInput) -> dict[str, float]:
        """One training step of a trainable reward; returns metrics and changes `spec.version`."""
        raise RewardError(f"reward {self.spec.name} is not trainable")

    @property
    def base_pictures(self) -> int:
        """How many pictures of the untrained model `calibrate` must see before the first score; 0 where it has seen them or needs none."""
        return 0

    def calibrate(self, base: RewardInput) -> None:
        """Learn from pictures of the untrained model what scores are measured against; once, before training."""
        del base

    def to(self, device: torch.device | str) -> Reward:
        """Move to a device; modules among the attributes move, everything else stays."""
        for value in vars(self).values():
            if isinstance(value, torch.nn.Module):
                value.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """State that belongs into a checkpoint; empty for frozen rewards."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise RewardError(f"reward {self.spec.name} keeps no state, but the checkpoint has {sorted(state)}")


@dataclass(frozen=True)
class Scores:
    """What a panel of rewards says of N inputs.

    Attributes:
        total: (N,) float32 weighted sum; NaN where any member with a weight is invalid.
        outputs: alias -> the member's output.
        weights: alias -> weight.
    """

    total: Tensor
    outputs: dict[str, RewardOutput]
    weights: dict[str, float]

    @property
    def valid(self) -> Tensor:
        """(N,) bool: every member succeeded."""
        return self.total.isfinite()

    @property
    def weight(self) -> Tensor | None:
        """(N,) how much an advantage that the total earns counts: the product over members with a weight; None: 1."""
        given = [o.weight.to(self.total.device) for a, o in self.outputs.items() if self.weights[a] and o.weight is not None]
        return torch.stack(given).prod(0) if given else None

    @property
    def errors(self) -> dict[str, list[str]]:
        """alias -> what the member said of inputs that it could not score, each once."""
        return {alias: list(dict.fromkeys(filter(None, o.info.get("errors", [])))) for alias, o in self.outputs.items()}

    def by_name(self) -> dict[str, Tensor]:
        """alias -> (N,) scores, with "total"."""
        return {alias: output.scores.to(self.total.device) for alias, output in self.outputs.items()} | {"total": self.total}


class Panel:
    """Several rewards with weights, scoring one batch together.

    Args:
        members: alias -> (reward, weight).
        batch_size: most inputs that one call of a point-scope reward sees; group-scope rewards see the whole batch.
    """

    def __init__(self, members: Mapping[str, tuple[Reward, float]], batch_size: int = 64):
        if not members:
            raise RewardError("no reward given")
        self.rewards = {alias: reward for alias, (reward, _) in members.items()}
        self.weights = {alias: weight for alias, (_, weight) in members.items()}
        self.batch_size = batch_size
        self.calls = 0  # pictures scored so far, summed over members

    @property
    def differentiable(self) -> bool:
        return all(reward.spec.differentiable for alias, reward in self.rewards.items() if self.weights[alias])

    def expects(self, videos: bool) -> None:
        """Refuse members that score the other kind of media. Raises UserError, which says what to do."""
        for alias, reward in self.rewards.items():
            name, modality = reward.spec.name, reward.spec.modality
            if videos and modality == "image":
                wrapped = f"{alias}: {{use: segmental, of: {{use: {name}}}}}"
                raise UserError(f"reward {alias}: {name} scores single pictures, and these are videos; wrap it, as in {wrapped}")
            if modality == "video" and not videos:
                raise UserError(f"reward {alias}: {name} scores videos, and these are pictures; use a reward of pictures")

    def score(self, batch: RewardInput) -> Scores:
        if batch.images.ndim == 5:
            self.expects(videos=True)
        outputs = {alias: self._member(reward, batch) for alias, reward in self.rewards.items()}
        self.calls += len(batch) * len(outputs)
        total = torch.zeros(len(batch), device=batch.images.device)
        for alias, weight in self.weights.items():
            if weight:
                total = total + weight * outputs[alias].scores.to(total.device)
        return Scores(total, outputs, dict(self.weights))

    def _member(self, reward: Reward, batch: RewardInput) -> RewardOutput:
        missing = reward.spec.needs & {"references", "groups", "latents", "video", "views"}
        for need in sorted(missing):
            if getattr(batch, need) is None:
                raise RewardError(f"reward {reward.spec.name} needs {need}, and this batch has none")
        whole = reward.spec.scope != "point" or len(batch) <= self.batch_size
        pieces = [batch] if whole else [batch.take(slice(n, n + self.batch_size)) for n in range(0, len(batch), self.batch_size)]
        outputs = [_checked(reward, reward.score(piece), len(piece)) for piece in pieces]
        return outputs[0] if len(outputs) == 1 else concatenate(outputs)


def _checked(reward: Reward, output: RewardOutput, count: int) -> RewardOutput:
    """The output, if it keeps the contract."""
    name, scores, valid = reward.spec.name, output.scores, output.valid
    if tuple(scores.shape) != (count,) or scores.dtype != torch.float32:
        raise RewardError(f"{name} returned {tuple(scores.shape)} {scores.dtype}, want ({count},) float32; a squeeze(-1) forgotten?")
    if tuple(valid.shape) != (count,) or valid.dtype != torch.bool:
        raise RewardError(f"{name} returned valid {tuple(valid.shape)} {valid.dtype}, want ({count},) bool")
    if not torch.equal(scores.detach().isfinite(), valid):
        raise RewardError(f"{name}: a score must be finite exactly where it is valid")
    return output


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Outputs of consecutive pieces of one batch as one output."""
    first = outputs[0]
    lists = {key: [item for o in outputs for item in o.info[key]] for key, value in first.info.items() if isinstance(value, list)}

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat([v for v in values if v is not None])

    return replace(
        first,
        scores=torch.cat([o.scores for o in outputs]),
        valid=torch.cat([o.valid for o in outputs]),
        components={key: torch.cat([o.components[key] for o in outputs]) for key in first.components},
        dense=join([o.dense for o in outputs]),
        uncertainty=join([o.uncertainty for o in outputs]),
        embeddings={key: torch.cat([o.embeddings[key] for o in outputs]) for key in first.embeddings},
        weight=join([o.weight for o in outputs]),
        info=first.info | lists,
    )
