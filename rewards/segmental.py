"""Segmental video reward: an image reward on one frame of each segment of a video, weighted towards the middle; or on all frames alike.

Frames that are all rewarded equally are driven towards one and the same picture, which ends motion; sparse frames and weights that fall off
leave the rest free. Differs from the paper: the videos of one call share their frames, so that the members of a group are compared at the
same moments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from visalign.composite import Composite
from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput


def frame_weights(frames: Tensor, count: int, attenuation: float) -> Tensor:
    """f = exp(-λ |i - ⌊T/2⌋|) of frames i out of T = `count` (arXiv 2312.12490, section 3.3), float32."""
    return torch.exp(-attenuation * (frames - count // 2).abs().float())


def stills(batch: RewardInput, frames: Tensor) -> RewardInput:
    """The S `frames` of N videos as N·S pictures, those of one video behind one another."""
    assert batch.video is not None
    size = len(frames)
    return RewardInput(
        images=batch.video[:, frames.to(batch.video.device)].flatten(0, 1),
        prompts=[prompt for prompt in batch.prompts for _ in range(size)],
        metadata=[metadata for metadata in batch.metadata for _ in range(size)],
        references=None if batch.references is None else [item for item in batch.references for _ in range(size)],
    )


class Segmental(Composite):
    """(1/S) Σ f_s · r(frame i_s), differentiable if r is (Yuan et al. 2024, InstructVideo, arXiv 2312.12490, section 3.3).

    The weights f are not normalised: with λ = 1 the segments around the middle alone matter, and the score is smaller than r.

    Args:
        of: a reward of single pictures.
        segments: S equal parts of the video with a frame each; None takes every frame, which with `attenuation: 0` is the plain mean.
        attenuation: λ, per frame.
        random: a new random frame of each segment in every call; False takes the middle one.
        seed: of the random frames; how far they have got belongs to the checkpoint.

    A video with an invalid frame is invalid. Components are those of r, each the mean over the frames; `info["frames"]` has the i_s.

    Raises:
        UserError: a reward that doesn't score single pictures, or a video with fewer frames than segments.
    """

    def __init__(
        self,
        of: Reward,
        segments: Annotated[int, Field(ge=1)] | None = 4,
        attenuation: Annotated[float, Field(ge=0)] = 1.0,
        random: bool = True,
        seed: int = 0,
    ):
        inner = of.spec
        if inner.modality != "image" or inner.scope != "point":
            raise UserError(f"segmental: {inner.name} scores {inner.modality}s, {inner.scope} scope; expected a reward of single pictures")
        self.segments, self.attenuation = segments, attenuation
        self.random = random and segments is not None
        self.generator = torch.Generator().manual_seed(seed)
        low, high = inner.range
        limits = (min(low, 0.0), max(high, 0.0)) if attenuation else inner.range
        steady, needs = inner.deterministic and not self.random, inner.needs | {"video"}
        super().__init__(of, name="segmental", modality="video", deterministic=steady, needs=needs, range=limits)

    def frames(self, count: int) -> Tensor:
        """(S,) int64, a frame of each segment of `count` frames."""
        if self.segments is None:
            return torch.arange(count)
        if count < self.segments:
            raise UserError(f"segmental: a video of {count} frames has no {self.segments} segments; lower the option segments")
        share = torch.rand(self.segments, generator=self.generator) if self.random else torch.full((self.segments,), 0.5)
        starts = torch.arange(self.segments + 1) * count // self.segments
        return starts[:-1] + (share * starts.diff()).long()

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32."""
        assert batch.video is not None
        frames = self.frames(batch.video.shape[1])
        count, size = len(batch), len(frames)
        output = next(iter(self.panel.score(stills(batch, frames)).outputs.values()))
        scores = output.scores.view(count, size)
        weights = frame_weights(frames, batch.video.shape[1], self.attenuation).to(scores.device)
        return RewardOutput.of(
            (scores * weights).mean(1),
            components={name: value.view(count, size).float().mean(1) for name, value in output.components.items()},
            info={"frames": tuple(frames.tolist())},
        )

    def real(self, batch: RewardInput) -> RewardInput:
        return self.inner.real(self._seen(batch))

    def update(self, real: RewardInput, fake: RewardInput) -> dict[str, float]:
        return super().update(real, self._seen(fake))

    def _seen(self, batch: RewardInput) -> RewardInput:
        """Frames of its videos for a reward that learns from pictures."""
        assert batch.video is not None
        return stills(batch, self.frames(batch.video.shape[1]))

    def state_dict(self) -> dict[str, Tensor]:
        """The inner reward's, and the state of the random frames."""
        return super().state_dict() | ({"generator": self.generator.get_state()} if self.random else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "generator" in state:
            self.generator.set_state(state["generator"])
        super().load_state_dict({name: value for name, value in state.items() if name != "generator"})
