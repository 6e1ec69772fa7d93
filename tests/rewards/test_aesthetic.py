"""Aesthetic predictor: five linear layers without activations are one affine map of the unit embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.tiny_models import aesthetic_head
from visalign.errors import UserError
from visalign.rewards.aesthetic import Aesthetic
from visalign.scoring import RewardInput

BATCH = RewardInput(torch.rand(3, 3, 40, 64, generator=torch.Generator().manual_seed(0)), ["", "a ring", "whatever"])


def test_the_collapsed_head_is_the_published_network(tmp_path: Path) -> None:
    file = aesthetic_head(tmp_path / "head.pth", 96)
    network = nn.Sequential(
        nn.Linear(96, 32),
        nn.Dropout(0.2),
        nn.Linear(32, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    )
    network.load_state_dict({name.removeprefix("layers."): value for name, value in torch.load(file, weights_only=True).items()})
    reward = Aesthetic("toybox", file)
    output = reward.score(BATCH)
    with torch.no_grad():
        expected = network.eval()(reward.encoder.encode_images(BATCH.images)).squeeze(-1)
    torch.testing.assert_close(output.scores, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.score(BATCH).scores, output.scores)


def test_a_single_vector_is_a_head_too(tmp_path: Path) -> None:
    reward = Aesthetic("toybox", aesthetic_head(tmp_path / "head.pth", 96))
    save_file({name: value.data for name, value in reward.head.named_parameters()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(Aesthetic("toybox", str(tmp_path)).score(BATCH).scores, reward.score(BATCH).scores)


def test_a_head_of_another_encoder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weight is \(1, 64\), expected \(1, 96\)"):
        Aesthetic("toybox", aesthetic_head(tmp_path / "head.pth", 64))
    save_file({"something": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no chain of linear layers"):
        Aesthetic("toybox", str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="none of the files"):
        Aesthetic("toybox", str(tmp_path))
