"""What the tests of all families of videos have alike."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.families.conformance import Conformance
from visalign.rollout import Prompts


class OfVideos(Conformance):
    """Attributes:
    frames: of a video.
    """

    frames: ClassVar[int] = 5
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 8, "frames": 5}  # the same number
    rewards = "{segmental: {of: {use: jpeg}, segments: 2}}"

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "num_frames": self.frames, "max_sequence_length": 8}

    def media(self, count: int, side: int) -> tuple[int, ...]:
        return (count, self.frames, 3, side, side)
