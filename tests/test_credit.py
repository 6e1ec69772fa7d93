"""Credit: hand-made tables, invalid members, and everything that must not change an advantage."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visalign.credit import gdpo_advantages, group_advantages, per_step, spread

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
    total = torch.zeros(len(groups))
    for name, values in rewards.items():
        for group in groups.unique():
            rows = groups == group
            own = values[rows]
            total[rows] += weights[name] * (own - own.mean()) / max(own.std(correction=0).item(), 1e-6, floor.get(name, 0))
    return (total - total.mean()) / total.std(correction=0)


def test_gdpo_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(24) % 4
    rewards = {"clip": 0.01 * torch.randn(24, generator=generator), "count": torch.randn(24, generator=generator)}
    weights = {"clip": 2.0, "count": 0.5}
    for floor in ({}, {"clip": 0.1}):
        assert_close(gdpo_advantages(rewards, weights, groups, floor), gdpo_by_hand(rewards, weights, groups, floor))


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
