"""The replay buffer holds a uniform sample of everything it was given."""

from __future__ import annotations

import torch

from visalign.replay import Features, Replay


def test_replay_is_a_uniform_sample_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(40)
    for _ in range(300):
        replay = Replay(8, 1, 2)
        for first in range(0, 40, 10):
            numbers = torch.arange(first, first + 10)
            replay.add(Features(torch.zeros(10, 2), torch.zeros(10, 1, 2), numbers), generator)
        kept[replay.prompt] += 1
    assert (kept / 300 - 0.2).abs().max() < 0.09  # standard error 0.023
    assert len(replay.sample(5, generator).prompt) == 5
    assert replay.sample(50, generator).prompt.unique().numel() == 8
    assert len(Replay(0, 1, 2).sample(5, generator).prompt) == 0
