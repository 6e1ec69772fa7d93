"""Credit: hand-made tables, invalid members, what must not change an advantage, and what the dense forms reduce to."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.credit import (
    branch_cells,
    discounted,
    extremes,
    gains,
    gdpo_advantages,
    group_advantages,
    per_step,
    residuals,
    spread,
    step_advantages,
    temporal_weights,
    tree_advantages,
    value_advantages,
)

NAN = math.nan
GROUPS = torch.tensor([7, 7, 7, 2, 2, 2])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, 5.0])
Std = Literal["group", "global", "none"]
STDS: tuple[Std, ...] = ("group", "global", "none")


def test_group_std_by_hand() -> None:
    first, second = math.sqrt(2 / 3) + 1e-4, math.sqrt(2) + 1e-4
    want = torch.tensor([-1 / first, 0.0, 1 / first, -1 / second, -1 / second, 2 / second])
    assert_close(group_advantages(REWARDS, GROUPS, std="group"), want)


def test_global_std_is_about_the_overall_mean() -> None:
    scale = math.sqrt(sum((value - 2.5) ** 2 for value in REWARDS.tolist()) / 6) + 1e-4
    assert_close(group_advantages(REWARDS, GROUPS, std="global"), torch.tensor([-1.0, 0, 1, -1, -1, 2]) / scale)


def test_no_std_and_clip() -> None:
    assert_close(group_advantages(REWARDS, GROUPS, std="none"), torch.tensor([-1.0, 0, 1, -1, -1, 2]))
    assert_close(group_advantages(REWARDS, GROUPS, std="none", clip=1.5), torch.tensor([-1.0, 0, 1, -1, -1, 1.5]))


@pytest.mark.parametrize("std", STDS)
def test_shift_per_group_and_order_do_not_matter(std: Std) -> None:
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(40) % 7
    base = group_advantages(rewards, groups, std=std)
    assert_close(group_advantages(rewards + 1000, groups, std=std), base)
    if std != "global":  # the overall spread contains the differences between groups
        assert_close(group_advantages(rewards + 10 * groups, groups, std=std), base)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert_close(group_advantages(rewards[order], groups[order], std=std), base[order])
    assert_close(group_advantages(rewards, 100 - groups, std=std), base)


@pytest.mark.parametrize("std", STDS)
def test_invalid_members_are_as_if_absent(std: Std) -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, 2.0, 2.0, 5.0])
    got = group_advantages(rewards, GROUPS, std=std)
    kept = torch.tensor([0, 2, 3, 4, 5])
    assert got[1] == 0
    assert_close(got[kept], group_advantages(rewards[kept], GROUPS[kept], std=std))


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("first", [[0.3, 0.3, 0.3], [0.3, NAN, NAN], [NAN, NAN, NAN], [0.3, 0.3, math.inf]])
def test_groups_without_signal_get_zero(std: Std, first: list[float]) -> None:
    got = group_advantages(torch.tensor([*first, 1.0, 2.0, 3.0]), GROUPS, std=std)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[5] > 0


def test_global_std_over_ranks_equals_one_rank() -> None:
    sums: list[Tensor] = []

    ranks = slice(0, 3), slice(3, 6)
    for rows in ranks:
        group_advantages(REWARDS[rows], GROUPS[rows], std="global", moments=lambda value: sums.append(value) or value)
    total = sums[0] + sums[1]
    assert total.tolist() == [6.0, 15.0, 47.0]
    parts = [group_advantages(REWARDS[rows], GROUPS[rows], std="global", moments=lambda _: total) for rows in ranks]
    assert_close(torch.cat(parts), group_advantages(REWARDS, GROUPS, std="global"))


def gdpo_by_hand(rewards: dict[str, Tensor], weights: dict[str, float], groups: Tensor, floor: dict[str, float]) -> Tensor:
    total, bare = torch.zeros(len(groups)), torch.zeros(len(groups))
    for name, values in rewards.items():
        for group in groups.unique():
            rows = groups == group
            centred, std = values[rows] - values[rows].mean(), max(values[rows].std(correction=0).item(), 1e-6)
            bare[rows] += weights[name] * centred / std
            total[rows] += weights[name] * centred / max(std, floor.get(name, 0))
    return (total - total.mean()) / bare.std(correction=0)


def test_gdpo_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(24) % 4
    rewards = {"clip": 0.01 * torch.randn(24, generator=generator), "count": torch.randn(24, generator=generator)}
    weights = {"clip": 2.0, "count": 0.5}
    for floor in ({}, {"clip": 0.1}):
        assert_close(gdpo_advantages(rewards, weights, groups, floor), gdpo_by_hand(rewards, weights, groups, floor))


def test_gdpo_leaves_noise_small_when_there_is_nothing_else() -> None:
    noise = {"clip": 1e-3 * torch.randn(24, generator=torch.Generator().manual_seed(0))}
    groups = torch.arange(24) % 4
    assert gdpo_advantages(noise, {"clip": 1.0}, groups).square().mean().item() == pytest.approx(1.0)
    assert gdpo_advantages(noise, {"clip": 1.0}, groups, {"clip": 1e-2}).abs().max() < 0.3


def test_gdpo_tells_one_reward_won_from_two() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    rewards = {"a": torch.tensor([0.0, 1.0, 0.0, 1.0]), "b": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    plain = group_advantages(rewards["a"] + rewards["b"], groups, std="group")
    assert plain[3].item() == pytest.approx(plain[1].item(), rel=1e-3)
    got = gdpo_advantages(rewards, {"a": 1.0, "b": 1.0}, groups)
    assert got[3].item() == pytest.approx(2 * got[1].item())
    assert got.square().mean().item() == pytest.approx(1.0)


def test_gdpo_invariances_and_invalid_members() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(12) % 3
    rewards = {"a": torch.randn(12, generator=generator), "b": torch.randn(12, generator=generator), "unused": torch.full((12,), NAN)}
    weights = {"a": 1.0, "b": 1.0, "unused": 0.0}
    base = gdpo_advantages(rewards, weights, groups)
    assert_close(gdpo_advantages(rewards | {"a": 100 * rewards["a"] + 7}, weights, groups), base, rtol=1e-4, atol=1e-5)
    broken = rewards["b"].clone()
    broken[4] = NAN
    got = gdpo_advantages(rewards | {"b": broken}, weights, groups)
    kept = torch.arange(12) != 4
    assert got[4] == 0
    assert_close(got[kept], gdpo_advantages({key: value[kept] for key, value in rewards.items()}, weights, groups[kept]))


def test_gdpo_without_signal_or_rewards() -> None:
    same = {"a": torch.ones(6)}
    assert gdpo_advantages(same, {"a": 1.0}, GROUPS).tolist() == [0.0] * 6
    for weights in ({"a": 0.0}, {"b": 1.0}, {}):
        with pytest.raises(ValueError, match="at least one reward"):
            gdpo_advantages(same, weights, GROUPS)


def test_spread() -> None:
    found = spread(torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 9.0, NAN]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    assert found["std"].item() == pytest.approx(math.sqrt(2 / 3) / 2)  # the third group has one valid member: nothing to compare
    assert found["zero_fraction"].item() == pytest.approx(2 / 3)


def test_terminal_credit_repeats() -> None:
    assert per_step(torch.tensor([1.0, -2.0]), 3).tolist() == [[1.0] * 3, [-2.0] * 3]


# --- dense ------------------------------------------------------------------------------------------------------------

PAIR = torch.tensor([0, 0])
SIGNAL = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 1.0]])  # 2 samples × 3 steps
CHAIN = torch.arange(3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gains_by_hand_and_where_states_are_missing() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0, 4.0], [2.0, NAN, 3.0, 1.0]])
    assert_close(gains(values, CHAIN), torch.tensor([[1.0, 0.0, 3.0], [NAN, NAN, -2.0]]), equal_nan=True)
    assert_close(gains(values, torch.tensor([0, 2])), torch.tensor([[1.0, 3.0], [NAN, -2.0]]), equal_nan=True)


def test_residuals_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [0.0, NAN, 3.0]])
    found = residuals(torch.tensor([5.0, 3.0]), values, torch.tensor([0, 1]))
    assert_close(found, torch.tensor([[4.0, 3.0], [3.0, NAN]]), equal_nan=True)


def test_gains_of_consecutive_steps_telescope() -> None:
    values = random(8, 11)
    assert_close(gains(values, torch.arange(10)).sum(1), (values[:, -1] - values[:, 0]).float())
    assert_close(gains(values + 7, torch.arange(10)), gains(values, torch.arange(10)))


def test_step_advantages_by_hand() -> None:
    unit = 1 / (1 + 1e-4)
    want = torch.tensor([[-unit, 0.0, 2 / (2 + 1e-4)], [unit, 0.0, -2 / (2 + 1e-4)]])
    assert_close(step_advantages(SIGNAL, PAIR, std="group"), want)
    assert_close(step_advantages(SIGNAL, PAIR, std="none"), torch.tensor([[-1.0, 0.0, 2.0], [1.0, 0.0, -2.0]]))
    floored = step_advantages(SIGNAL, PAIR, std="group", floor=2.0, epsilon=0.0)
    assert_close(floored, torch.tensor([[-0.5, 0.0, 1.0], [0.5, 0.0, -1.0]]))


@pytest.mark.parametrize("std", STDS)
def test_step_advantages_are_group_advantages_column_by_column(std: Std) -> None:
    signal = random(12, 4)
    signal[3, 1] = signal[4, 2] = NAN
    groups = torch.arange(12) % 3
    columns = [group_advantages(signal[:, s], groups, std=std) for s in range(4)]
    assert_close(step_advantages(signal, groups, std=std), torch.stack(columns, 1))
    terminal = signal[:, 0]
    assert_close(step_advantages(per_step(terminal, 4), groups, std=std), per_step(group_advantages(terminal, groups, std=std), 4))
    assert_close(step_advantages(signal + 100 * torch.arange(4), groups, std=std), step_advantages(signal, groups, std=std))


def test_step_advantages_over_ranks_equal_one_rank() -> None:
    signal, groups = random(12, 2), torch.arange(12) // 3
    ranks = slice(0, 6), slice(6, 12)
    sums: list[Tensor] = []
    for rows in ranks:
        step_advantages(signal[rows], groups[rows], std="global", moments=lambda value: sums.append(value) or value)
    total = sums[0] + sums[1]
    assert total.shape == (3, 2)
    parts = [step_advantages(signal[rows], groups[rows], std="global", moments=lambda _: total) for rows in ranks]
    assert_close(torch.cat(parts), step_advantages(signal, groups, std="global"))


def test_discounted_sums_the_present_and_the_future() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, NAN, 8.0]])
    assert_close(discounted(rewards, 0.5), torch.tensor([[3.0, 4.0, 4.0], [NAN, NAN, 8.0]]), equal_nan=True)
    assert_close(discounted(rewards[:1], 0.0), rewards[:1])
    assert_close(discounted(rewards[:1], 1.0), torch.tensor([[7.0, 6.0, 4.0]]))


def test_temporal_weights_have_mean_one_and_no_unit() -> None:
    values = random(5, 6).abs()
    assert_close(temporal_weights(values).mean(1), torch.ones(5))
    assert_close(temporal_weights(1000 * values), temporal_weights(values))
    odd = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [NAN, 2.0, 6.0]])
    assert_close(temporal_weights(odd), torch.tensor([[1.5, 1.0, 0.5], [1.0, 1.0, 1.0], [NAN, 0.5, 1.5]]), equal_nan=True)


def test_value_advantages_by_hand() -> None:
    # gamma 0: the values are the rewards, so weights are (0.5, 0, 2.5) and (2.25, 0, 0.75)
    got = value_advantages(SIGNAL, PAIR, gamma=0.0, anchor=0.1, anchor_steps=1, epsilon=0.0)
    want = torch.tensor([[0.5 * (-1 + 0.1), 0.0, 2.5], [2.25 * (1 + 0.3), 0.0, -0.75]])
    assert_close(got, want)
    moved = value_advantages(SIGNAL, PAIR, gamma=0.0, anchor=0.1, anchor_steps=1, epsilon=0.0, steps=torch.tensor([2, 1, 0]))
    assert_close(moved, torch.tensor([[-0.5, 0.0, 2.5 * 1.5], [2.25, 0.0, 0.75 * -0.9]]))


def test_value_keeps_a_signal_without_spread() -> None:
    rewards, groups = torch.full((4, 3), 0.5), torch.tensor([0, 0, 0, 1])
    got = value_advantages(rewards, groups, gamma=0.5, anchor=0.2, anchor_steps=2)
    values = torch.tensor([0.875, 0.75, 0.5])
    want = 0.2 * values.square() / values.mean() * torch.tensor([1.0, 1.0, 0.0])
    assert_close(got, want.expand(4, 3))
    assert value_advantages(rewards, groups, gamma=0.5, anchor=0.0, anchor_steps=2).eq(0).all()
    nearly = value_advantages(rewards + 1e-6 * random(4, 3).float(), groups, gamma=0.5, anchor=0.2, anchor_steps=2)
    assert_close(nearly, got, atol=0.05, rtol=0)  # the anchor doesn't fade before the spread is gone


def test_value_without_its_weight_and_anchor_is_invariant_to_a_shift() -> None:
    rewards, groups = random(8, 3).abs(), torch.arange(8) % 2

    def relative(rewards: Tensor) -> Tensor:
        return value_advantages(rewards, groups, gamma=0.9, anchor=0.0, anchor_steps=0) / temporal_weights(discounted(rewards, 0.9))

    assert_close(relative(rewards + 3), relative(rewards), rtol=1e-4, atol=1e-5)


def test_value_of_invalid_rewards() -> None:
    rewards, groups = random(6, 3).abs(), torch.zeros(6, dtype=torch.int64)
    broken = rewards.clone()
    broken[2] = NAN
    options = {"gamma": 0.9, "anchor": 0.1, "anchor_steps": 5}
    got, kept = value_advantages(broken, groups, **options), torch.arange(6) != 2
    assert got[2].eq(0).all()
    assert_close(got[kept], value_advantages(rewards[kept], groups[kept], **options))
    broken = rewards.clone()
    broken[2, 1] = NAN  # what comes later is still valued
    got = value_advantages(broken, groups, **options)
    assert got.isfinite().all()
    assert (got[2] != 0).tolist() == [False, False, True]


# a tree of four leaves: root; two children; the second splits once more, then a chain
NODES = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 1, 3]])
LEAVES = torch.tensor([2.0, 1.0, 3.0, 8.0])


def test_tree_by_hand() -> None:
    got = tree_advantages(LEAVES, NODES, torch.tensor([0, 1]), torch.zeros(4, dtype=torch.int64), epsilon=0.0)
    # depth 1: nodes worth 2 and (1 + 3 + 8)/3 = 4, each counted once; depth 2: the leaves, mean 3.5
    last = (LEAVES - 3.5) / LEAVES.std(correction=0)
    assert_close(got, torch.stack([torch.tensor([-1.0, 1.0, 1.0, 1.0]), last], 1))


def test_tree_of_chains_is_terminal_credit() -> None:
    node = torch.arange(6)[:, None].expand(6, 5).clone()
    node[:, 0] = torch.tensor([0, 0, 0, 3, 3, 3])
    rewards = torch.tensor([1.0, 2.0, 4.0, NAN, 1.0, 5.0])
    got = tree_advantages(rewards, node, torch.arange(4), GROUPS)
    assert_close(got, per_step(group_advantages(rewards, GROUPS, std="group"), 4))


def test_trees_are_apart_and_shifts_do_not_matter() -> None:
    node = torch.cat([NODES, NODES + 4])
    trees = torch.tensor([9] * 4 + [2] * 4)
    before = torch.tensor([0, 1])
    both = tree_advantages(torch.cat([LEAVES, 3 * LEAVES + 5]), node, before, trees, epsilon=0.0)
    assert_close(both[:4], both[4:])
    order = torch.tensor([5, 0, 7, 3, 2, 6, 1, 4])
    rewards = random(8)
    base = tree_advantages(rewards, node, before, trees)
    assert_close(tree_advantages(rewards[order], node[order], before, trees[order]), base[order])
    assert_close(tree_advantages(rewards + 100 * trees, node, before, trees), base)


def test_tree_with_invalid_leaves() -> None:
    rewards, before, tree = torch.tensor([2.0, NAN, 3.0, 5.0]), torch.tensor([0, 1]), torch.zeros(4, dtype=torch.int64)
    got = tree_advantages(rewards, NODES, before, tree, epsilon=0.0)
    assert_close(got[:, 0], torch.tensor([-1.0, 1.0, 1.0, 1.0]))  # the shared edge is worth its other leaves' 4
    assert got[1, 1] == 0
    assert got[[0, 2, 3], 1].sum().item() == pytest.approx(0, abs=1e-6)
    for same in (torch.full((4,), 0.1), torch.full((4,), NAN), torch.tensor([NAN, 1.0, 1.0, NAN])):
        assert tree_advantages(same, NODES, before, tree).eq(0).all()


def test_branch_cells_compare_one_step_of_one_path() -> None:
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 5, 5])
    steps = torch.tensor([1, 1, 2, 2, 1, 1, 1, 1])
    nodes = torch.tensor([0, 0, 0, 0, 4, 4, 6, 6])
    cells = branch_cells(groups, steps, nodes)
    assert (cells[:, None] == cells).tolist() == torch.block_diag(*[torch.ones(2, 2)] * 4).bool().tolist()
    rewards = torch.tensor([0.0, 1.0, 5.0, 6.0, 9.0, 9.0, NAN, 1.0])
    got = group_advantages(rewards, cells, std="group", epsilon=0.0)
    assert_close(got, torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))


def test_extremes_keep_the_best_and_the_worst_of_each_group() -> None:
    groups = torch.tensor([7, 2, 7, 2, 7, 2, 7, 2])
    advantages = torch.tensor([0.5, 1.0, -2.0, 3.0, 0.1, -1.0, 4.0, 0.0])
    assert extremes(advantages, groups, 1, 1).tolist() == [False, False, True, True, False, True, True, False]
    assert extremes(advantages, groups, 2, 0).tolist() == [True, True, False, True, False, False, True, False]
    assert extremes(advantages, groups, 3, 3).all()
    assert extremes(torch.zeros(8), groups, 1, 2).tolist() == [True, True, True, True, False, False, True, True]
