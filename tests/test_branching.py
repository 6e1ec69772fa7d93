"""Trees and single branches: equal to chains where they should be, cheaper by the formula, and pruned where the paper prunes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.branching import branch_cells, branch_noise, one_branch_rollout, pruned, pruned_depths, tree_rollout
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.noise import gaussian
from visalign.policy import Policy
from visalign.rollout import Prompts, Trajectory
from visalign.sampling import Dynamics, rollout
from visalign.schedules import StepPlan, all_steps, flash, mixed_tree, span, tree
from visalign.solvers import complete
from visalign.transitions import kernel

STEPS = 8
SDE = Dynamics("flow_sde", 0.7)
FIELDS = ("latents", "before", "steps", "sigmas", "log_probs", "node", "final", "predictions")


def toy() -> Policy:
    return Policy(Toy("mixture", STEPS))


def prompts(count: int, size: int, shared: bool = False) -> Prompts:
    """`count` pictures in groups of `size`, whose ids are no row numbers."""
    given = Prompts.of(["a"] * count, first_id=100)
    place = torch.arange(count) // size
    return replace(given, groups=place + 7, noise_ids=100 + place * size if shared else given.ids)


def grow(policy: Policy, given: Prompts, plan: StepPlan, steps: int = STEPS, batch: int = 5, spread: float = 4.0) -> Trajectory:
    options = {"steps": steps, "seed": 3, "batch": batch, "plan": plan, "dynamics": SDE, "spread": spread, "keep_predictions": True}
    return tree_rollout(policy, given, policy.family.encode(given.texts), **options)


def chains(policy: Policy, given: Prompts, plan: StepPlan) -> Trajectory:
    options = {"steps": STEPS, "seed": 3, "batch": 5, "plan": plan, "dynamics": SDE, "keep_predictions": True}
    return rollout(policy, given, policy.family.encode(given.texts), **options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("plan", [all_steps(STEPS), all_steps(STEPS, last=True), span(STEPS, 2, 3), flash(span(STEPS, 2, 3), 0.5)])
def test_a_tree_without_branches_is_a_chain_to_the_bit(plan: StepPlan, shared: bool) -> None:
    policy, given = toy(), prompts(12, 4, shared)
    tree_of_one, chain = grow(policy, given, replace(plan, widths=(1,) * STEPS)), chains(policy, given, plan)
    for name in FIELDS:
        assert torch.equal(getattr(tree_of_one, name), getattr(chain, name)), name
    assert tree_of_one.nfe == chain.nfe


def test_nodes_are_shared_until_their_branch() -> None:
    policy, plan = toy(), tree(STEPS, (0, 2))
    trajectory = grow(policy, prompts(8, 4), plan)
    assert trajectory.node.T.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 0, 1, 1, 2, 2, 3, 3],
        *[[0, 1, 2, 3, 4, 5, 6, 7]] * 5,
    ]
    for k in range(8):
        same = trajectory.node[:, k, None] == trajectory.node[:, k]
        assert torch.equal((trajectory.latents[:, k, None] == trajectory.latents[:, k]).all(-1), same)
    assert trajectory.distinct().sum(0).tolist() == [4, 4, 8, 8, 8, 8, 8]
    law = chains(policy, prompts(8, 4), all_steps(STEPS))
    assert torch.equal(trajectory.latents[::4, 0], law.latents[::4, 0]), "a tree's initial noise is its first leaf's"


def test_a_tree_does_not_depend_on_the_batch() -> None:
    policy, given, plan = toy(), prompts(16, 8), flash(tree(STEPS, (0, 2, 3)), 0.5)
    small, large = grow(policy, given, plan, batch=3), grow(policy, given, plan, batch=64)
    assert_close(small.latents, large.latents)
    assert_close(small.final, large.final)
    second = grow(policy, given.take(slice(8, 16)), plan)
    assert_close(second.latents, large.latents[8:])


@torch.no_grad()
def test_log_probs_are_those_of_the_edges() -> None:
    policy, given, plan = toy(), prompts(8, 4), mixed_tree(STEPS, (0, 3), size=2, interval=4)
    trajectory = grow(policy, given, plan)
    replay = chains(policy, given, plan=StepPlan(plan.stochastic, plan.recorded))
    assert trajectory.log_probs.shape == replay.log_probs.shape
    assert trajectory.predictions is not None
    for k, column in enumerate(trajectory.before.tolist()):
        t, t_next = trajectory.sigmas[plan.recorded[k]], trajectory.sigmas[plan.recorded[k] + 1]
        x, said = trajectory.latents[:, column], trajectory.predictions[:, column]
        assert torch.equal(said, policy.predict(x, t.expand(8), policy.family.encode(["a"] * 8)))
        law = kernel(policy.family.path, x, said, t, t_next, SDE(policy.family.path, t, t_next))
        assert_close(law.log_prob(trajectory.latents[:, column + 1]), trajectory.log_probs[:, k])


def test_forwards_of_trees() -> None:
    policy = toy()
    assert grow(policy, prompts(32, 16), tree(20, (0, 3, 6, 9)), steps=20).nfe == 203 / 16
    plan = tree(STEPS, (0, 2))
    assert grow(policy, prompts(8, 4), plan).nfe == (1 + 2 + 2 + 5 * 4) / 4
    plan = flash(StepPlan((True,) * 3 + (False,) * 5, (0, 1, 2), (2, 1, 2) + (1,) * 5), 0.4)
    assert grow(policy, prompts(8, 4), plan).nfe == (1 + 2 + 2 + 2 * 4) / 4


def test_completions_of_a_tree_share_its_nodes() -> None:
    policy, plan = toy(), tree(STEPS, (0, 2))
    trajectory = grow(policy, prompts(8, 4), plan)
    spent = policy.nfe
    done = complete(policy, trajectory, policy.family.encode(["a"] * 8), 1.0, batch=5)
    assert policy.nfe - spent == 2 * (1 * 7 + 2 * 6 + 2 * 5 + 4 * (4 + 3 + 2 + 1 + 0))
    assert_close(done[:, -1], trajectory.final)


@pytest.mark.parametrize("spread", [0.5, 1.0, 4.0, float("inf")])
def test_sibling_noise(spread: float) -> None:
    noise = branch_noise((8,), 0, torch.arange(6000), 2, 2, spread)
    assert_close(noise.var(0), torch.ones(8), rtol=0, atol=0.1)
    first, second = noise[::2], noise[1::2]
    assert float((first * second).mean()) == pytest.approx(1 / (1 + spread**2), abs=0.025)
    assert torch.equal(branch_noise((8,), 0, torch.arange(6), 2, 1, spread), gaussian((8,), 0, torch.arange(6), 3))
    assert torch.equal(branch_noise((8,), 0, torch.arange(4, 6), 2, 2, spread), noise[4:6])
    equal = branch_noise((8,), 0, torch.arange(6), 2, 3, 0.0)
    assert torch.equal(equal[:3], equal[:1].expand(3, -1))


def test_groups_must_be_whole_trees() -> None:
    for given in (prompts(12, 6), prompts(6, 6)):
        with pytest.raises(UserError, match=r"trainer\.group_size=6 .* 4 leaves"):
            grow(toy(), given, tree(STEPS, (0, 2)))
    assert len(grow(toy(), prompts(16, 8), tree(STEPS, (0, 2)))) == 16, "two trees to a group"


# --- one branch --------------------------------------------------------------------------------------------------------


def test_cells() -> None:
    given, branch = branch_cells(prompts(24, 12), (1, 4, 5), seeds=2)
    assert branch.tolist() == [1, 1, 4, 4, 5, 5] * 4
    assert given.noise_ids.tolist() == [100] * 6 + [106] * 6 + [112] * 6 + [118] * 6
    with pytest.raises(UserError, match=r"trainer\.group_size=12 .* 8 cells"):
        branch_cells(prompts(24, 12), (1, 4, 5, 6), seeds=2)


def test_one_branch_is_a_chain_with_a_window_of_one() -> None:
    policy = toy()
    given, branch = branch_cells(prompts(12, 12), (0, 2, 7), seeds=2)
    condition = policy.family.encode(given.texts)
    options = {"steps": STEPS, "seed": 3, "batch": 5, "dynamics": SDE, "keep_predictions": True}
    trajectory = one_branch_rollout(policy, given, condition, branch=branch, **options)
    assert trajectory.nfe == (2 * 8 + 2 * 2 * (7 + 5 + 0)) / 12
    assert trajectory.node.T.tolist() == [[0, 0, 2, 2, 7, 7, 8, 8, 10, 10, 15, 15], list(range(12))]
    for step in (0, 2, 7):
        rows = (branch == step).nonzero()[:, 0]
        chain = chains(policy, given.take(rows), span(STEPS, step, 1))
        for name in ("latents", "steps", "log_probs", "final", "predictions"):
            assert torch.equal(getattr(trajectory, name)[rows], getattr(chain, name)), (name, step)
    assert trajectory.at[:, 0].tolist() == branch.tolist()
    done = complete(policy, trajectory, condition, 1.0, batch=5)
    assert_close(done[:, 1], trajectory.final)


def test_a_stem_ends_with_its_last_branch() -> None:
    policy, given = toy(), prompts(4, 2, shared=True)
    branch = torch.tensor([1, 2, 0, 5])
    options = {"steps": STEPS, "seed": 3, "batch": 5, "dynamics": SDE}
    trajectory = one_branch_rollout(policy, given, policy.family.encode(given.texts), branch=branch, **options)
    assert trajectory.nfe == (3 + 6 + 6 + 5 + 7 + 2) / 4
    with pytest.raises(ValueError, match="branch steps"):
        one_branch_rollout(policy, given, policy.family.encode(given.texts), branch=branch + 3, **options)


# --- pruning -----------------------------------------------------------------------------------------------------------


def pruning(leaf: list[float], **options: object) -> Tensor:
    """The mask of one tree of four leaves that branches at steps 0 and 2 of 5, whose recorded steps are 0 to 3."""
    plan = tree(5, (0, 2))
    trajectory = grow(toy(), prompts(4, 4), plan, steps=5)
    advantages = torch.tensor(leaf)[:, None].repeat(1, 4)
    return pruned(advantages, trajectory, plan, **options)  # pyright: ignore[reportArgumentType]


def test_depth_pruning_drops_steps() -> None:
    assert pruning([1.0, 2.0, 3.0, 4.0]).all()
    assert pruning([1.0, 2.0, 3.0, 4.0], depth=frozenset({1, 3})).tolist() == [[True, False, True, False]] * 4


def test_the_best_of_each_branch_is_kept() -> None:
    kept = pruning([2.0, 1.0, -3.0, -2.0], width="branch")
    assert kept[:, :2].all(), "shared edges are not pruned by width"
    assert kept[:, 2].tolist() == kept[:, 3].tolist() == [True, False, False, True]


def test_the_extremes_of_a_tree_are_kept() -> None:
    kept = pruning([2.0, 1.0, -3.0, -2.0], width="extremes")
    assert kept[:, 2].tolist() == kept[:, 3].tolist() == [True, False, True, False]
    assert kept[:, :2].all()
    both = pruning([2.0, 1.0, -3.0, -2.0], width="extremes", depth=frozenset({2}))
    assert torch.equal(both, kept & torch.tensor([True, True, False, True]))


def test_ties_are_kept_whatever_their_order() -> None:
    assert pruning([1.0, 1.0, 0.0, 2.0], width="branch")[:, 3].tolist() == [True, True, False, True]
    assert pruning([0.0, 0.0, 0.0, 0.0], width="extremes").all()
    assert pruning([1.0, 0.0, 1.0, 0.0], width="extremes").all()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        values = [[3.0, 1.0, 1.0, -2.0][k] for k in order]
        assert pruning(values, width="extremes")[:, 3].tolist() == [value != 1.0 for value in values]


def test_trees_are_pruned_apart() -> None:
    plan = tree(5, (0, 2))
    trajectory = grow(toy(), prompts(8, 8), plan, steps=5)
    advantages = torch.tensor([2.0, 1.0, 0.0, 3.0, 12.0, 11.0, 10.0, 13.0])[:, None].repeat(1, 4)
    kept = pruned(advantages, trajectory, plan, width="extremes")[:, 3]
    assert kept.tolist() == [False, False, True, True] * 2
    with pytest.raises(ValueError, match="branches of a tree"):
        pruned(advantages, trajectory, all_steps(5), width="branch")


def test_pruned_depths_slide_towards_noise_and_stop() -> None:
    start = frozenset({15, 16, 17})
    assert pruned_depths(1, start, 9) == pruned_depths(30, start, 9) == start
    assert pruned_depths(31, start, 9) == frozenset({14, 15, 16})
    assert pruned_depths(10_000, start, 9) == frozenset({9, 10, 11})
    assert pruned_depths(61, frozenset(), 9) == frozenset()
    assert pruned_depths(61, frozenset({4}), 9) == frozenset({4})
