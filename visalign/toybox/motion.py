"""Does a moving shape go where its prompt says? Rewards of single frames can't see it: a video may be right in each and stand still."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch

from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.toybox import moving_scenes, scenes
from visalign.toybox.perception import View, look
from visalign.toybox.scenes import DIRECTIONS, Object


class Motion(Reward):
    """Score of a video's motion, in [0, 1], whatever it is that moves.

    The largest object of each frame is followed. A step from one frame to the next earns its length along the wanted direction over that
    of the world's own, cut to [0, 1], and nothing where it goes further across than along or a frame has no object.

        dense  = mean over the steps
        strict = 1 if every step earns a half and every frame has one object, else 0

    Args:
        form: which of the two is the score; both are `components`.

    The direction is the metadata's `motion`, else read from the prompt; a video with neither, or one that isn't finite, is invalid.
    """

    spec = RewardSpec("motion", modality="video", needs=frozenset({"prompt", "video"}), range=(0.0, 1.0), licence="Apache-2.0")

    def __init__(self, form: Literal["dense", "strict"] = "dense"):
        self.form = form

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32."""
        assert batch.video is not None
        sound = batch.video.flatten(1).isfinite().all(1).tolist()
        views = look(torch.nan_to_num(batch.video).flatten(0, 1))
        count = batch.video.shape[1]
        pairs: list[tuple[float, float]] = []
        for n, (prompt, metadata, ok) in enumerate(zip(batch.prompts, batch.metadata, sound, strict=True)):
            wanted = metadata.get("motion") or (scenes.parse(prompt) or {}).get("motion")
            found = judge(views[n * count : (n + 1) * count], wanted) if ok and wanted in DIRECTIONS else (torch.nan, torch.nan)
            pairs.append(found)
        strict, dense = torch.tensor(pairs, dtype=torch.float32, device=batch.video.device).reshape(-1, 2).unbind(1)
        return RewardOutput.of(strict if self.form == "strict" else dense, components={"strict": strict, "dense": dense})


def judge(views: Sequence[View], direction: str) -> tuple[float, float]:
    """(strict, dense) of the frames of one video."""
    dx, dy = DIRECTIONS[direction]
    largest = [max(view.objects, key=lambda item: item.radius, default=None) for view in views]
    earned = [_step(a, b, dx, dy) for a, b in pairwise(largest)]
    strict = all(part >= 0.5 for part in earned) and all(len(view.objects) == 1 for view in views)
    return float(strict), sum(earned) / max(1, len(earned))


def _step(a: Object | None, b: Object | None, dx: int, dy: int) -> float:
    if a is None or b is None:
        return 0.0
    along, across = (b.x - a.x) * dx + (b.y - a.y) * dy, (b.x - a.x) * dy + (b.y - a.y) * dx
    return min(1.0, max(0.0, along / moving_scenes.STEP)) if abs(across) <= abs(along) else 0.0
