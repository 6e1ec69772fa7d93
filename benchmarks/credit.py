"""`python -m benchmarks.credit`: how much of the truth about a denoising step each credit tells, and what it costs.

Every credit of the library is drawn by its own exploration and held against V(state after) - V(state before) of `benchmarks.credit_truth`,
and so is the policy gradient that it makes. Writes benchmarks/results/credit.json, and benchmarks/credit.md from it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.credit_report import report
from benchmarks.credit_truth import CONTINUATIONS, DYNAMICS, REWARDS, STEPS, World
from benchmarks.machine import describe
from visalign.axes import Credit, Exploration
from visalign.config import CreditSection, ExplorationSection
from visalign.credit import step_advantages
from visalign.paths import gain
from visalign.rollout import Minibatch, Prompts, Rollout
from visalign.sampling import decode
from visalign.scoring import Panel, RewardInput
from visalign.transitions import kernel

BATCH = 4096
GROUPS, BLOCKS = 160, 8  # groups for correlations, and into how many blocks they fall for standard errors
BUDGET, REPEATS = 2000, 100  # NFE of one estimate of the gradient, and how many estimates
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Estimator:
    """A credit with the exploration that it is made for.

    Attributes:
        name: in the table.
        credit, exploration: of a recipe.
        size: pictures per group.
        shared: whether they start from the same noise.
        extra: further continuations of every state, over which a terminal reward is averaged.
        unit: turns the credit into units of the reward; None where it has no unit.
    """

    name: str
    credit: CreditSection
    exploration: ExplorationSection = field(default_factory=ExplorationSection)
    size: int = 16
    shared: bool = True
    extra: int = 0
    unit: float | None = 1.0


def plain(kind: str, **more: Any) -> CreditSection:
    """Without division by the group's spread."""
    return CreditSection.model_validate({"kind": kind, "std": "none", "clip": 1e9} | more)


def tree(name: str, branches: list[int]) -> Estimator:
    """Its division can't be turned off, but outweighed by a large epsilon."""
    exploration = ExplorationSection(kind="tree", branches=branches)
    return Estimator(name, plain("tree", epsilon=1e6), exploration, size=2 ** len(branches), unit=1e6)


LISTED = (
    Estimator("terminal, own noise", plain("terminal"), shared=False),
    Estimator("terminal", plain("terminal")),
    Estimator("terminal, mean of 2", plain("terminal"), extra=1),
    Estimator("terminal, mean of 3", plain("terminal"), extra=2),
    Estimator("gain, n = 1", plain("gain", completion=1)),
    Estimator("gain, n = 2", plain("gain", completion=2)),
    Estimator("gain, n = 3, dpm2m", plain("gain", completion=3, solver="dpm2m")),
    Estimator("gain, n = t, dpm2m", plain("gain", solver="dpm2m")),
    Estimator("gain, n = t", plain("gain")),
    Estimator("gain, n = t, over std", plain("gain", std="group", floor=0.01), unit=None),  # as DenseGRPO trains it
    Estimator("residual, n = 1", plain("residual", completion=1)),
    Estimator("residual, n = t", plain("residual")),
    Estimator("value", CreditSection(kind="value", std="group"), unit=None),
    tree("tree", [0, 2, 3, 5]),  # BranchGRPO's 0, 3, 6, 9 of 20
    tree("tree, 32 leaves", [0, 1, 2, 3, 5]),
    Estimator("own_branch", plain("own_branch"), ExplorationSection(kind="one_branch", range=(0, STEPS - 1)), size=4 * (STEPS - 1)),
)
ESTIMATORS = {estimator.name: estimator for estimator in LISTED}


@torch.no_grad()
def collect(world: World, estimator: Estimator, groups: int, seed: int) -> Rollout:
    """Groups of pictures with the credit of their steps in `advantages`, as a trainer collects them; `metrics` counts NFE and scored."""
    policy, panel, count = world.policy, Panel({"bump": (world.reward, 1.0)}, BATCH), groups * estimator.size
    exploration, crediting, spent = Exploration(estimator.exploration, STEPS, seed), Credit(estimator.credit, panel), policy.nfe
    crediting.check()
    ids = torch.arange(count)
    prompts = Prompts([""] * count, [{}] * count, ids // estimator.size, ids, ids - ids % estimator.size if estimator.shared else ids)
    condition, common = policy.family.encode(prompts.texts), {"guidance": 1.0, "batch": BATCH}
    trajectory = exploration.rollout(policy, prompts, condition, step=1, dynamics=DYNAMICS, keep_predictions=True, **common)
    images = decode(policy, trajectory.final, BATCH)
    drawn = Rollout(prompts, condition, trajectory, images, panel.score(RewardInput(images, prompts.texts)).by_name())
    if crediting.dense:
        drawn = replace(drawn, values=crediting.values(policy, drawn, plan=exploration.plan(1), **common)[0])
    found = crediting.advantages(drawn, lambda sums: sums)
    if estimator.extra:
        found = step_advantages(averaged(world, drawn, estimator.extra, seed), prompts.groups, std="none", clip=math.inf)
        panel.calls += count * (STEPS - 2) * estimator.extra
    metrics = {"nfe": (policy.nfe - spent) / count, "scored": panel.calls / count}
    return replace(drawn, advantages=found * (estimator.unit or 1.0), metrics=metrics)


def averaged(world: World, drawn: Rollout, extra: int, seed: int) -> Tensor:
    """(N, T - 1) the mean reward of each step's successor over its chain and `extra` new ones, which reuse the known prediction there."""
    trajectory, total, path = drawn.trajectory, drawn.rewards["total"], world.family.path
    assert trajectory.predictions is not None
    generator, found = torch.Generator().manual_seed(1000 + seed), total[:, None].repeat(1, STEPS - 1)
    for k in range(1, STEPS - 1):  # what follows the last state is deterministic
        x, prediction = (some[:, k].repeat_interleave(extra, 0) for some in (trajectory.latents, trajectory.predictions))
        t, t_next = trajectory.sigmas[k], trajectory.sigmas[k + 1]
        x = kernel(path, x, prediction, t, t_next, DYNAMICS(path, t, t_next)).draw(torch.randn(x.shape, generator=generator))
        ends = world.reward.mean(world.onward(x, k + 1, generator)).view(-1, extra)
        found[:, k - 1] = (total + ends.sum(1)) / (1 + extra)
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def transitions(drawn: Rollout) -> tuple[Minibatch, Tensor, Tensor]:
    """Every transition once, its group (B,), and its row and column (2, B)."""
    columns, rows = drawn.trajectory.distinct().T.nonzero().unbind(1)  # siblings are neighbours, so a batch keeps this order
    (batch,) = drawn.minibatches(rows, columns, len(rows), stacked=len(drawn.trajectory.before))
    return batch, drawn.prompts.groups[rows], torch.stack([rows, columns])


def sums(values: Tensor, cells: Tensor, count: int) -> Tensor:
    """(count, C) of values (B, C) by their cell (B,)."""
    return torch.zeros(count, values.shape[1], dtype=torch.float64).index_add(0, cells, values.double())


def second_moments(credit: Tensor, truth: Tensor, group: Tensor, step: Tensor) -> Tensor:
    """(T - 1, 3) within groups: covariance of credit (B,) and truth, variance of credit, variance of truth (2, B).

    The last is the covariance of two values with independent errors, so that nested Monte Carlo's noise leaves no trace in it.
    """
    values = torch.stack([credit.double(), *truth], 1)
    _, cells, count = (group * STEPS + step).unique(return_inverse=True, return_counts=True)
    ours, one, two = (values - (sums(values, cells, len(count)) / count[:, None])[cells]).unbind(1)
    freedom = 1 - 1 / count[cells]
    found = sums(torch.stack([ours * (one + two) / 2, ours.square(), one * two, freedom], 1), step, STEPS - 1)
    return found[:, :3] / found[:, 3:]


def figures(parts: Tensor, unit: float | None) -> dict[str, Any]:
    """Correlations and errors of a credit from the second moments (BLOCKS, T - 1, 3) of independent blocks.

    The mean square error over the truth's, summed over steps, is bias² + variance: the part that is linear in the truth, and the rest.
    """

    def correlations(moments: Tensor) -> Tensor:
        return moments[..., 0] / (moments[..., 1] * moments[..., 2]).sqrt()

    moments, count = parts.mean(0), len(parts)
    each, without = correlations(moments), correlations((parts.sum(0) - parts) / (count - 1)).mean(1)
    covariance, ours, truth = moments.sum(0)
    scale = 1.0 if unit else covariance / truth  # what has no unit gets the best one
    off = parts[..., 0] / scale - parts[..., 2]
    square = (off.sum(0).square() - off.square().sum(0)) / (count * (count - 1))  # of independent blocks: noise is no bias
    bias = (square / moments[:, 2]).sum() / truth
    return {
        "correlation": each.mean().item(),
        "error": (without.std(correction=0) * (count - 1) ** 0.5).item(),  # jackknife
        "overall": (covariance / (ours * truth).sqrt()).item(),
        "bias": bias.clamp(min=0).sqrt().item(),
        "variance": ((ours / scale**2 - 2 * covariance / scale) / truth + 1 - bias).item(),
        "by_step": each.tolist(),
    }


def judged(world: World, estimator: Estimator, groups: int) -> dict[str, Any]:
    """What a credit has to do with the truth, and what it costs."""
    drawn = collect(world, estimator, groups, seed=0)
    batch, group, (rows, columns) = transitions(drawn)
    values, before = world.values(drawn.trajectory), drawn.trajectory.before[columns]
    truth = values[:, rows, before + 1] - values[:, rows, before]
    blocks = [(group % BLOCKS == n).nonzero()[:, 0] for n in range(BLOCKS)]
    parts = torch.stack([second_moments(batch.advantage[b], truth[:, b], group[b], batch.step[b]) for b in blocks])
    cost = {"nfe_per_step": drawn.metrics["nfe"] * len(drawn.prompts) / len(batch)} | drawn.metrics
    return {"name": estimator.name, "size": estimator.size} | cost | figures(parts, estimator.unit)


def gradients(world: World, drawn: Rollout) -> Tensor:
    """(G, T - 1, 2) each group's estimate of `World.gradient`: the mean over a step's transitions of credit × ∇ log density."""
    batch, group, _ = transitions(drawn)
    assert batch.prediction is not None
    path = world.family.path
    step = DYNAMICS(path, batch.sigma, batch.sigma_next)
    law = kernel(path, batch.x, batch.prediction, batch.sigma, batch.sigma_next, step)
    kappa = gain(path, step.a, step.c, batch.sigma)
    score = (kappa / step.std)[:, None] * (batch.x_next - law.mean) / law.std
    terms = torch.cat([batch.advantage[:, None] * score, torch.ones_like(score[:, :1])], 1)
    found = sums(terms, group * (STEPS - 1) + batch.step, (int(group.max()) + 1) * (STEPS - 1))
    return (found[:, :2] / found[:, 2:]).view(-1, STEPS - 1, 2)


def steered(world: World, estimator: Estimator, nfe: float, exact: Tensor) -> dict[str, float]:
    """How well estimates of the gradient point, each from as many groups as BUDGET buys at `nfe` per picture."""
    edges = (torch.arange(REPEATS + 1) * BUDGET / (nfe * estimator.size)).long()  # fractions of a group even out over the repeats
    total = gradients(world, collect(world, estimator, int(edges[-1]), seed=1)).flatten(1).cumsum(0)
    total = torch.cat([torch.zeros_like(total[:1]), total])[edges].diff(dim=0)
    cosines = torch.cosine_similarity(total, exact.flatten()[None])
    whole = torch.cosine_similarity(total.sum(0), exact.flatten(), 0).item()
    return {"cosine": cosines.mean().item(), "cosine_error": (cosines.std() / REPEATS**0.5).item(), "cosine_of_mean": whole}


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else [rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    started, worlds = time.process_time(), dict[str, list[dict[str, Any]]]()
    for name in REWARDS:
        world = World.of(name)
        exact, worlds[name] = world.gradient(), []
        for estimator in LISTED:
            row = judged(world, estimator, GROUPS)
            row |= steered(world, estimator, row["nfe"], exact)
            worlds[name].append({key: rounded(value) for key, value in row.items()})
            print(name, worlds[name][-1], flush=True)
    settings = {"steps": STEPS, "groups": GROUPS, "budget": BUDGET, "repeats": REPEATS, "continuations": CONTINUATIONS}
    found = settings | {"worlds": worlds, "seconds": round(time.process_time() - started)} | describe()
    (HERE / "results" / "credit.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "credit.md").write_text(report(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
