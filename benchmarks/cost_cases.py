"""What `benchmarks.cost` compares: algorithms at the number of steps their papers use, and the forwards that each should cost.

The formulas are written from the papers, not from the code. T denoising steps, K pictures a group, all of one group from one initial noise
unless it says otherwise; the last step is never stochastic. A completion's first step is the rollout's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """Denoiser forwards per picture: of the rollout, of completions for credit, of the replay (each with a backward), and why."""

    rollout: float
    credit: float
    replay: float
    why: str = ""
    tolerance: float = 1e-4  # larger where forwards are counted on average

    def total(self, credit: float = 1.0, replay: float = 1.0) -> float:
        """Summed with the weight of each."""
        return self.rollout + credit * self.credit + replay * self.replay


@dataclass(frozen=True)
class Case:
    """An algorithm with its settings.

    Attributes:
        trainer: its name.
        steps: T.
        cost: by formula.
        against: the case it is compared with; None for one that others are compared with.
        limit: of the ratio.
        paper: the ratio of seconds that the paper's table has.
        group: K.
        options: of the section `trainer`.
        sections: other sections of the recipe.
    """

    trainer: str
    steps: int
    cost: Cost
    against: str | None = None
    limit: float | None = None
    paper: float | None = None
    group: int = 16
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sections: Sections = field(default_factory=dict[str, dict[str, Any]])


class Shade(Reward):
    """Mean brightness: parts pictures of equal score, because pruning keeps all that tie."""

    spec = RewardSpec("shade", range=(0.0, 1.0))

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.mean((1, 2, 3)))


# --- formulas ----------------------------------------------------------------------------------------------------------


def chain(steps: int, trained: int | None = None, group: int = 1) -> Cost:
    """Every step of every picture; all but the last are trained, or so many after the first. A group of K has one first state."""
    replay = steps - 2 + 1 / group if trained is None else trained
    rule = "T - 2 + 1/K" if trained is None else str(trained)
    return Cost(steps - 1 + 1 / group, 0, replay, f"T - 1 + 1/K; {rule}; T = {steps}, K = {group}")


def window(steps: int, start: int, size: int, group: int, share: float | None = None) -> Cost:
    """What precedes the window and its first forward are the group's; `share` of what follows it, where a faster solver finishes."""
    left = steps - start - size
    if share is None:
        why = f"(l + 1)/K + T - l - 1; w - 1 + 1/K; T = {steps}, l = {start}, w = {size}, K = {group}"
    else:
        left = max(1, round(share * left))
        why = f"(l + 1)/K + w - 1 + r(T - l - w); w - 1 + 1/K; T = {steps}, l = {start}, w = {size}, r = {share:g}, K = {group}"
    return Cost((start + 1) / group + size - 1 + left, 0, size - 1 + 1 / group, why)


def nodes(steps: int, splits: Sequence[int], width: int = 2) -> list[int]:
    """Nodes of a tree before each step, and its leaves."""
    return [prod(width for split in splits if split < step) for step in range(steps + 1)]


def tree(steps: int, splits: Sequence[int], group: int, stochastic: Sequence[int] | None = None, pruned: int = 0) -> Cost:
    """A forward per node; one more for each that a stochastic step leaves, less the `pruned` of a tree, all of whose edges are pruned."""
    count = nodes(steps, splits)
    left = sum(count[step] for step in (range(steps - 1) if stochastic is None else stochastic)) - pruned
    why = f"Σ nodes(t)/K; of them stochastic; {sum(count[:-1])} nodes, {left} of them replayed, K = {group}"
    return Cost(sum(count[:-1]) / group, 0, left / group, why)


def one_branch(steps: int, branches: Sequence[int], seeds: int) -> Cost:
    """Each initial noise goes on by the ODE to its last branch, each picture from its branch to the end."""
    group = seeds * len(branches)
    spent = seeds * (max(branches) + 1) + seeds * sum(steps - 1 - branch for branch in branches)
    return Cost(spent / group, 0, 1, f"(S(b' + 1) + Σ(T - 1 - b))/K; 1; T = {steps}, S = {seeds}, b = {branches[0]} to {branches[-1]} = b'")


def completed(exploration: Cost, states: Sequence[int], steps: int, group: int, most: int | None = None, last_known: bool = False) -> Cost:
    """The first state is the group's own, others each picture's; n = t solver steps, or at most `most`, the first of them free.

    Args:
        states: points of the grid at which latents are completed.
        last_known: the last of them ends in the sample, which is scored already.
    """
    needed = [min(steps - state, most or steps) - 1 for state in states]
    if last_known:
        needed[-1] = 0
    count = "t" if most is None else str(most)
    why = f"{exploration.why}; credit (n₀ - 1)/K + Σ(n - 1), n = {count}, {len(states)} states" + (", the last known" if last_known else "")
    return Cost(exploration.rollout, needed[0] / group + sum(needed[1:]), exploration.replay, why)


# --- cases -------------------------------------------------------------------------------------------------------------

SPLITS, GRID = [0, 3, 6, 9], 20
ALL: dict[str, Any] = {"kind": "all"}
LATE = {"kind": "window", "rule": "fixed", "size": 4, "range": [7, 11]}  # Mix's window at its mean place in a run of 300 steps
THREE = {"kind": "window", "rule": "fixed", "size": 3, "range": [2, 5], "shared_noise": True}
EVERY: dict[str, Any] = {"fraction": 1.0}
TREE = {"branches": SPLITS, "kind": "tree", "shared_noise": True}
ONE = {"kind": "one_branch", "seeds": 4, "range": [0, 6]}
MIX = {"shared_noise": True} | LATE


def _dance(steps: int) -> Case:
    return Case("dance_grpo", steps, chain(steps, group=16), options=EVERY)


def _branch(cost: Cost, limit: float, paper: float, **exploration: Any) -> Case:
    return Case("branch_grpo", GRID, cost, "DanceGRPO, T = 20", limit, paper, sections={"exploration": TREE | exploration})


def _mix(cost: Cost, limit: float | None, paper: float, **exploration: Any) -> Case:
    return Case("mix_grpo", 25, cost, "DanceGRPO, T = 25", limit, paper, sections={"exploration": MIX | exploration})


def _ten(trainer: str, cost: Cost, limit: float | None = None, group: int = 16, **sections: Any) -> Case:
    return Case(trainer, 10, cost, "DanceGRPO, T = 10", limit, group=group, sections=sections)


WINDOWED = window(10, 2, 3, 16)
SUBSET = Cost(GRID - 1 + 1 / 16, 0, 11 * 18 / 19 + 1 / 16, "T - 1 + 1/K; 11(T - 2)/(T - 1) + 1/K on average; T = 20, K = 16", 0.5)
CASES: dict[str, Case] = {
    "DanceGRPO, T = 10": _dance(10),
    "DanceGRPO, T = 20": _dance(20),
    "DanceGRPO, T = 25": _dance(25),
    "terminal credit, window of 3": Case(
        "dense_grpo", 10, WINDOWED, sections={"exploration": THREE, "credit": {"kind": "terminal", "std": "group"}}
    ),
    "DanceGRPO, 0.6 of the steps": Case("dance_grpo", GRID, SUBSET, "DanceGRPO, T = 20", paper=0.67),
    "BranchGRPO": _branch(tree(GRID, SPLITS, 16), 0.75, 0.71),
    "BranchGRPO, half of the leaves": _branch(
        tree(GRID, SPLITS, 16, pruned=72), 0.5, 0.45, prune={"width": "branch", "share": 0.5}
    ),  # of each pair of leaves one, with its 10 last edges; the first of them leaves a node that the other leaf keeps
    "BranchGRPO, 5 depths pruned": _branch(tree(GRID, SPLITS, 16, pruned=80), 0.5, 0.45, prune={"depth": [14, 15, 16, 17, 18]}),
    "BranchGRPO-Mix": _branch(tree(GRID, SPLITS, 16, stochastic=[0, 1, 2, 3, 6, 9]), 0.3, 0.21, interval=20, size=4),
    "MixGRPO": _mix(window(25, 7, 4, 16), None, 0.51),
    "MixGRPO-Flash": _mix(window(25, 7, 4, 16, 0.4), 0.4, 0.39, finish=0.4),
    "MixGRPO-Flash, frozen window": _mix(window(25, 0, 4, 16, 0.2), 0.3, 0.29, finish=0.2, range=[0, 4]),
    "Flow-GRPO": _ten("flow_grpo", chain(10), exploration=ALL),
    "Flow-GRPO-Fast": _ten("flow_grpo_fast", chain(10, 3)),
    "GRPO-Guard": _ten("grpo_guard", chain(10)),
    "TempFlow-GRPO": _ten("tempflow_grpo", one_branch(10, range(6), 4), group=24, exploration=ONE),
    "VGPO (n = 1)": _ten("vgpo", completed(chain(10), range(10), 10, 1, 1)),
    "gain, n = 1": _ten(
        "dense_grpo", completed(chain(10, group=16), range(10), 10, 16, 1), credit={"kind": "gain", "std": "group", "completion": 1}
    ),
    "gain, n = t": _ten("dense_grpo", completed(chain(10, group=16), range(10), 10, 16, last_known=True), 2.5),
}
SECOND_ORDER = {"kind": "gain", "std": "group", "completion": 3, "solver": "dpm2m"}
FINISHED = _ten("dense_grpo", completed(WINDOWED, range(2, 6), 10, 16, 3), 1.5, exploration=THREE, credit=SECOND_ORDER)
CASES |= {
    "gain, window of 3, n = 3 of second order": replace(FINISHED, against="terminal credit, window of 3"),
    "the same, beside terminal credit on all steps": FINISHED,
}
