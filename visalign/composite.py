"""Rewards made of rewards: the base of everything in rewards/ that wraps one reward or joins several, so that they pass for one.

The members live in a `Panel`, which checks what they say and feeds them in pieces. What they promise (needs, scope, gradients, version)
adds up to what the whole promises; their own scores stay visible as components, before any shaping.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.scoring import Panel, Reward, RewardError, RewardInput, RewardOutput, RewardSpec, Scores

Members = dict[str, tuple[Reward, float]]  # alias -> (reward, weight); with weight 0 it is scored and shown, but no part of the sum
SCOPES: list[Any] = ["point", "group", "pair", "set"]
MODALITIES: list[Any] = ["image", "video", "latent"]


class Composite(Reward):
    """A reward made of others; a subclass implements `score` by `self.panel.score` and `self.result`.

    Args:
        of: one reward, or several with weights.
        own: fields of the spec in which the whole differs from what its members add up to; `name` at least.

    Raises:
        UserError: no member has a weight.
    """

    def __init__(self, of: Reward | Members, **own: Any):
        members = {of.spec.name: (of, 1.0)} if isinstance(of, Reward) else of
        if not any(weight for _, weight in members.values()):
            raise UserError(f"{own['name']}: no reward in `of` has a weight; give at least one, such as of: {{clip_score: 1.0}}")
        self.panel = Panel(members)
        self.own = own

    @property
    def spec(self) -> RewardSpec:  # pyright: ignore[reportIncompatibleVariableOverride]  # a member's version may change at any time
        specs = {alias: reward.spec for alias, reward in self.panel.rewards.items()}
        every = list(specs.values())
        joined = RewardSpec(
            name="",
            version=" ".join(f"{alias}={spec.version}" for alias, spec in specs.items()),
            scope=SCOPES[max(SCOPES.index(spec.scope) for spec in every)],
            modality=MODALITIES[max(MODALITIES.index(spec.modality) for spec in every)],
            differentiable=self.panel.differentiable,
            trainable=any(spec.trainable for spec in every),
            deterministic=all(spec.deterministic for spec in every),
            needs=frozenset[str]().union(*(spec.needs for spec in every)),
            licence=", ".join(sorted({spec.licence for spec in every} - {""})),
            model_id=", ".join(sorted({spec.model_id for spec in every} - {""})),
        )
        return replace(joined, **self.own)

    @property
    def inner(self) -> Reward:
        """The first member, which is the only one of a wrapper."""
        return next(iter(self.panel.rewards.values()))

    @property
    def held_out_only(self) -> bool:
        """Whether a member judges only and must not be trained on."""
        return any(getattr(reward, "held_out_only", False) for reward in self.panel.rewards.values())

    def result(self, scored: Scores, scores: Tensor, **more: Any) -> RewardOutput:
        """Scores (N,) made of what the members said, with all that they said: ALIAS and ALIAS/COMPONENT (N,) each, embeddings and info."""
        outputs = scored.outputs
        raw = {alias: output.scores for alias, output in outputs.items()}
        said = [output.info["errors"] for output in outputs.values() if "errors" in output.info]
        info = _prefixed({alias: output.info for alias, output in outputs.items()})
        return RewardOutput.of(
            scores,
            components=raw | _prefixed({alias: output.components for alias, output in outputs.items()}) | more.pop("components", {}),
            embeddings=_prefixed({alias: output.embeddings for alias, output in outputs.items()}),
            info=info | ({"errors": [next(filter(None, texts), None) for texts in zip(*said, strict=True)]} if said else {}),
            **({"weight": scored.weight} | more),
        )

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        for reward in self.panel.rewards.values():
            reward.prepare(prompts, metadata)

    def update(self, real: RewardInput, fake: RewardInput) -> dict[str, float]:
        learners = {alias: reward for alias, reward in self.panel.rewards.items() if reward.spec.trainable}
        if not learners:
            return super().update(real, fake)
        return _prefixed({alias: reward.update(real, fake) for alias, reward in learners.items()})

    @property
    def base_pictures(self) -> int:
        return max(reward.base_pictures for reward in self.panel.rewards.values())

    def calibrate(self, base: RewardInput) -> None:
        for reward in self.panel.rewards.values():
            if reward.base_pictures:
                reward.calibrate(base)

    def to(self, device: torch.device | str) -> Reward:
        for reward in self.panel.rewards.values():
            reward.to(device)
        return super().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return _prefixed({alias: reward.state_dict() for alias, reward in self.panel.rewards.items()})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if unknown := sorted(name for name in state if name.partition("/")[0] not in self.panel.rewards):
            raise RewardError(f"reward {self.spec.name} has no member that keeps {unknown}")
        for alias, reward in self.panel.rewards.items():
            reward.load_state_dict({name.partition("/")[2]: value for name, value in state.items() if name.partition("/")[0] == alias})


class Calibrated(Composite):
    """A composite that measures its members against pictures of the untrained model.

    The trainer shows it `pictures` of them before the first step (`visalign.base_pictures`); what it learns of them is part of its state
    and of its version, and never changes again. A subclass implements `learn`.

    Args:
        of: as in `Composite`.
        learns: names of the tensors that `learn` returns; none where an option makes calibration needless.
        pictures: of the untrained model.
        file: safetensors with what an earlier run learned (its base_rewards.safetensors, or the rewards.safetensors of a checkpoint).
        own: as in `Composite`.

    Raises:
        UserError: the file is missing or holds something else.
    """

    def __init__(self, of: Reward | Members, *, learns: Sequence[str], pictures: int, file: str | None = None, **own: Any):
        super().__init__(of, **own)
        if pictures < 2:
            raise UserError(f"{own['name']}: pictures must be 2 or more, got {pictures}")
        self.learns, self.pictures = tuple(learns), pictures
        self.learned: dict[str, Tensor] = _read(Path(file), self.learns, own["name"]) if file else {}

    @abstractmethod
    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        """What is to be known, by the names in `learns`, of pictures of the untrained model and the members' scores of them."""

    def known(self, name: str) -> Tensor:
        """What was learned under a name. Raises UserError before calibration."""
        if name not in self.learned:
            raise UserError(
                f"{self.own['name']} must see pictures of the untrained model first: train with it, which does so, call its calibrate(), "
                "or name the file of an earlier run among its options"
            )
        return self.learned[name]

    @property
    def spec(self) -> RewardSpec:  # pyright: ignore[reportIncompatibleVariableOverride]
        spec = super().spec
        if not self.learned:
            return spec
        content = b"".join(value.detach().cpu().contiguous().numpy().tobytes() for _, value in sorted(self.learned.items()))
        return replace(spec, version=f"{spec.version} {hashlib.blake2b(content, digest_size=4).hexdigest()}")

    @property
    def base_pictures(self) -> int:
        return max(super().base_pictures, self.pictures if set(self.learns) - set(self.learned) else 0)

    @torch.no_grad()
    def calibrate(self, base: RewardInput) -> None:
        super().calibrate(base)
        if set(self.learns) - set(self.learned):
            self.learned = self.learn(base, self.panel.score(base))

    def to(self, device: torch.device | str) -> Reward:
        self.learned = {name: value.to(device) for name, value in self.learned.items()}
        return super().to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.learned

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {name: state[name] for name in self.learns if name in state}
        super().load_state_dict({name: value for name, value in state.items() if name not in own})
        if own:
            device = next(iter(self.learned.values())).device if self.learned else None
            self.learned = {name: value.to(device) for name, value in own.items()}


def valid_scores(scored: Scores, alias: str, name: str) -> Tensor:
    """The valid scores (M,) of a member, float32, detached. Raises UserError if they don't differ: nothing can be measured by them."""
    scores = scored.outputs[alias].scores.detach()
    scores = scores[scores.isfinite()]
    if len(scores) < 2 or not scores.std(correction=0) > 1e-8:
        raise UserError(f"{name}: the {len(scores)} valid scores of {alias} for the untrained model's pictures are all the same")
    return scores


def _prefixed(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{alias: {name: value}} as {alias/name: value}."""
    return {f"{alias}/{name}": value for alias, part in parts.items() for name, value in part.items()}


def _read(file: Path, names: Sequence[str], reward: str) -> dict[str, Tensor]:
    """The tensors of these names, whatever reward's name stands before them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{reward}: {file} can't be read ({error}); expected safetensors of an earlier run") from None
    found = {name: [value for key, value in content.items() if key.rpartition("/")[2] == name] for name in names}
    for name, values in found.items():
        if len(values) != 1:
            raise UserError(f"{reward}: {file} holds {len(values)} tensors named {name!r}, expected one; it has {sorted(content)}")
    return {name: values[0] for name, values in found.items()}
