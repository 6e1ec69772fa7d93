"""The LTX family against its stock pipeline."""

from __future__ import annotations

from torch import Tensor

from tests.families.of_videos import OfVideos
from tests.tiny.ltx import ltx


class TestLTX(OfVideos):
    build = staticmethod(ltx)
    part = "attn2"
    sides = (32, 64)

    def packed(self, noise: Tensor) -> Tensor:
        return noise.flatten(2).transpose(1, 2)
