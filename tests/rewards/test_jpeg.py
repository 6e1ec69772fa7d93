"""JPEG size: bytes as PIL writes them, signs, units and bad options."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from visalign.errors import UserError
from visalign.rewards.jpeg import Jpeg
from visalign.scoring import RewardInput

FLAT, NOISE = torch.full((3, 32, 48), 0.4), torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
BATCH = RewardInput(torch.stack([FLAT, NOISE]), ["", ""])


def test_size_is_pils() -> None:
    buffer = io.BytesIO()
    Image.fromarray((NOISE * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    assert Jpeg().score(BATCH).scores[1].item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_directions_and_units() -> None:
    size = Jpeg().score(BATCH)
    assert size.scores[1] > size.scores[0] > 0
    shrunk = Jpeg(direction="compressible").score(BATCH)
    assert torch.equal(shrunk.scores, -size.scores)
    assert torch.equal(shrunk.components["kilobytes"], size.scores)
    torch.testing.assert_close(Jpeg(per_megapixel=True).score(BATCH).scores, size.scores / (32 * 48 / 1e6))
    assert (Jpeg(quality=50).score(BATCH).scores < size.scores).all()


def test_pixels_are_rounded_not_truncated() -> None:
    almost = RewardInput((BATCH.images * 255).round() / 255 - 1e-4, BATCH.prompts)
    assert torch.equal(Jpeg().score(almost).scores, Jpeg().score(BATCH).scores)


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 100}, {"direction": "smaller"}])
def test_bad_options_are_user_errors(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="jpeg"):
        Jpeg(**options)  # type: ignore[arg-type]
