"""What travels through a training step: prompts, conditions, trajectories, rollouts, minibatches. Slicing and nothing else.

Legend: N samples, U unique prompts, T steps, S ≤ T recorded steps, K stored states, `...` latent axes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Rows = slice | Tensor
Record = TypeVar("Record", bound="Sliceable")


@dataclass(frozen=True)
class Sliceable:
    """A record whose fields all have N rows; `record.take(rows)` slices them together."""

    def take(self: Record, rows: Rows) -> Record:
        return replace(self, **{f.name: take(getattr(self, f.name), rows) for f in fields(self)})


def take(value: Any, rows: Rows) -> Any:
    """The rows of a tensor, a list or a record; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if isinstance(rows, Tensor) else value[rows]
    if isinstance(value, Sliceable):
        return value.take(rows)
    if isinstance(rows, slice):
        return value[rows]
    return [value[int(n)] for n in rows]


@dataclass(frozen=True)
class Prompts(Sliceable):
    """N prompts, one per picture.

    Attributes:
        texts: the prompts.
        metadata: one dict each (GenEval's `include`, a text to write, …).
        groups: (N,) int64; pictures of one prompt that are compared with one another share a number.
        ids: (N,) int64; a picture's number in the whole run. All of its noise is a function of (seed, id).
        noise_ids: (N,) int64; like `ids`, for the initial noise alone: equal numbers share it.
    """

    texts: list[str]
    metadata: list[dict[str, Any]]
    groups: Tensor
    ids: Tensor
    noise_ids: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, texts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None, first_id: int = 0) -> Prompts:
        """Independent prompts, each a group of its own."""
        ids = torch.arange(first_id, first_id + len(texts))
        return cls(list(texts), list(metadata or [{} for _ in texts]), ids, ids, ids)


@dataclass(frozen=True)
class Condition(Sliceable):
    """Encoded prompts, once per unique prompt: row n of the batch reads row `index[n]` of every tensor.

    Attributes:
        index: (N,) int64.
        tensors: name -> (U, ...).
        negative: name -> (1, ...), what the unconditional half of classifier-free guidance has instead, or (U, ...) where that depends on
            the sample's condition too; None for models without it.
    """

    index: Tensor
    tensors: dict[str, Tensor]
    negative: dict[str, Tensor] | None = None

    def take(self, rows: Rows) -> Condition:
        return replace(self, index=take(self.index, rows))

    def __len__(self) -> int:
        return len(self.index)

    def positive(self) -> dict[str, Tensor]:
        """name -> (N, ...)."""
        return {name: value[self.index.to(value.device)] for name, value in self.tensors.items()}

    def unconditional(self) -> dict[str, Tensor]:
        """name -> (N, ...), the negative prompt repeated; what it doesn't name, such as a control picture, is the sample's own."""
        assert self.negative is not None, "this model has no unconditional half"
        own = {name: value for name, value in self.tensors.items() if name not in self.negative}
        shared = {name: value.expand(len(self), *value.shape[1:]) for name, value in self.negative.items() if len(value) == 1}
        return shared | {name: value[self.index.to(value.device)] for name, value in (self.negative | own).items() if name not in shared}


@dataclass(frozen=True)
class Trajectory:
    """The recorded steps of N denoising chains; a tree is the chains from its root to its N leaves.

    Attributes:
        latents: (N, K, ...) states around the recorded steps, in the dtype that is replayed; K = S + 1 if these are consecutive.
        before: (S,) int64, the column of `latents` at which each recorded step begins; it ends one column further.
        steps: (N, S) int64, which steps of the sigma grid they are.
        sigmas: (T + 1,) the grid: times of the family's path.
        log_probs: (N, S) float32, of each recorded transition, averaged over latent axes.
        node: (N, K) int64; in one column equal numbers are one state, shared by branches or by equal initial noise.
        final: (N, ...) the clean latents.
        nfe: denoiser forwards per picture.
        predictions: (N, K, ...) what the network said at each state, where the rollout was asked to keep it; 0 at a state that is final.
    """

    latents: Tensor
    before: Tensor
    steps: Tensor
    sigmas: Tensor
    log_probs: Tensor
    node: Tensor
    final: Tensor
    nfe: float
    predictions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.final)

    @property
    def at(self) -> Tensor:
        """(N, K) int64: the point of the sigma grid at which each stored state lies."""
        found = torch.zeros_like(self.node)
        found[:, self.before] = self.steps
        found[:, self.before + 1] = self.steps + 1
        return found

    def owner(self) -> Tensor:
        """(N, K) int64: the first row that holds each stored state; a row's own number where no earlier row shares it."""
        count, columns = self.node.shape
        rows = torch.arange(count, device=self.node.device)[:, None].expand_as(self.node)
        keys: Any = self.node * columns + torch.arange(columns, device=self.node.device)  # Any: the stub of `unique` has no types
        name: Tensor = keys.unique(return_inverse=True)[1]
        first = torch.full((name.numel(),), count, device=self.node.device).scatter_reduce(0, name.flatten(), rows.flatten(), "amin")
        return first[name]

    def distinct(self) -> Tensor:
        """(N, S) bool: False for the edges of a tree that an earlier row has too; all True for chains."""
        rows = torch.arange(len(self), device=self.node.device)
        return self.owner()[:, self.before + 1] == rows[:, None]


@dataclass(frozen=True)
class Rollout:
    """One collection: what was drawn, how it scored, and the credit of every recorded step.

    Attributes:
        prompts, condition, trajectory: N rows each.
        images: (N, 3, H, W) float in [0, 1], or videos (N, F, 3, H, W).
        rewards: alias -> (N,) float32, NaN where a reward failed.
        weights: (N,) in [0, 1], how much each sample's advantage counts; None: 1.
        errors: alias -> what a reward said of the samples that it could not score.
        advantages: (N, S) float32, or (N, S, ...) with a number for every latent element; 0 where a sample carries no signal.
        values: (N, K) float32, the reward of every stored state's completion, where credit asks for it.
        metrics: what the collection has to say about itself.
    """

    prompts: Prompts
    condition: Condition
    trajectory: Trajectory
    images: Tensor
    rewards: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    weights: Tensor | None = None
    errors: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    advantages: Tensor | None = None
    values: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    def minibatches(self, rows: Tensor, columns: Tensor, size: int, stacked: int = 1, whole: bool = False) -> Iterator[Minibatch]:
        """The transitions (rows[b], columns[b]) by column and by the state they leave, in batches that leave `size` states of a column.

        Transitions that leave one state stay together: it is replayed once. `stacked` columns share batches of `size`·`stacked` states.
        `whole` fills a batch up with repeats to what the rollout had there where not all of a column's states are left: in half precision
        the rounding of another batch shape would be as large as a clip range.
        """
        count, owner = len(self.prompts), self.trajectory.owner()[:, self.trajectory.before]
        # Any: the stubs of `unique` and `tolist` have no types
        keys: Any = columns * count + owner[rows, columns]
        start: Tensor = keys.unique(return_inverse=True)[1]
        order = start.argsort(stable=True)
        first = start.bincount().cumsum(0).roll(1)
        first[0] = 0
        bounds: Any = torch.stack([first, columns[order[first]].div(stacked, rounding_mode="floor")])
        edges, place = bounds.tolist()
        edges.append(len(rows))
        drawn: Any = (owner == torch.arange(count, device=owner.device)[:, None]).sum(0)
        shape = {c: min(size, n) for c, n in enumerate(drawn.tolist()) if n != place.count(c)} if whole and stacked == 1 else {}
        low = 0
        while low < len(place):
            high = min(low + size * stacked, bisect_right(place, place[low]))
            piece = order[edges[low] : edges[high]]
            leaving = torch.arange(max(high - low, shape.get(place[low], 0)), device=first.device) % (high - low)
            yield self._minibatch(rows[piece], columns[piece], first[low:high][leaving] - edges[low], start[piece] - low)
            low = high

    def _minibatch(self, rows: Tensor, columns: Tensor, first: Tensor, start: Tensor) -> Minibatch:
        trajectory = self.trajectory
        assert self.advantages is not None, "credit comes before minibatches"
        step, before = trajectory.steps[rows, columns], trajectory.before[columns]
        return Minibatch(
            x=trajectory.latents[rows, before],
            x_next=trajectory.latents[rows, before + 1],
            sigma=trajectory.sigmas[step],
            sigma_next=trajectory.sigmas[step + 1],
            step=step,
            log_prob=trajectory.log_probs[rows, columns],
            advantage=self.advantages[rows, columns],
            condition=self.condition.take(rows),
            first=first,
            start=start,
            row=rows,
            column=columns,
            prediction=None if trajectory.predictions is None else trajectory.predictions[rows, before],
        )


@dataclass(frozen=True)
class Minibatch:
    """B transitions that leave V ≤ B states, ready to be replayed with V forwards.

    Attributes:
        x, x_next: (B, ...) latents before and after the step.
        sigma, sigma_next: (B,) float, times of the family's path.
        step: (B,) int64 index into the sigma grid.
        log_prob: (B,) float32, the rollout's.
        advantage: (B,) or (B, ...) float32.
        condition: B rows.
        first: (V,) int64, a transition that leaves each state; repeats at the end only make up the rollout's batch shape.
        start: (B,) int64 in [0, V), the state that each transition leaves.
        row, column: (B,) int64, the sample and the recorded step that each transition is.
        prediction: (B, ...) of the policy that drew them, where the rollout kept it.
    """

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    step: Tensor
    log_prob: Tensor
    advantage: Tensor
    condition: Condition
    first: Tensor
    start: Tensor
    row: Tensor
    column: Tensor
    prediction: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def forwards(self) -> int:
        """Forwards with a backward that its loss takes."""
        return len(self.first)


@dataclass(frozen=True)
class Noised:
    """Clean latents mixed with noise, for losses on the forward process: of U samples, or of U pairs that share time and noise.

    Attributes:
        x: (B, ...) float32 mixtures; B = U, or 2·U with the first members of all pairs before the second ones.
        clean, target: (B, ...) float32 the latents, and what the network should say of the mixtures.
        time: (B,) of the model's path.
        condition: B rows.
        credit: (U,) float32 what credit says of each sample or pair.
        weight: (U,) float32 of each in the mean; 0 for one that is there to keep processes in step.
    """

    x: Tensor
    clean: Tensor
    target: Tensor
    time: Tensor
    condition: Condition
    credit: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def forwards(self) -> int:
        """Forwards with a backward that its loss takes."""
        return len(self.x)

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean () of the samples' or pairs' values (U,)."""
        return (self.weight * values).mean()
