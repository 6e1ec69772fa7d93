"""HPSv2 and HPSv2.1: the cosine of a CLIP that was fine-tuned on which of two pictures people prefer.

Differs from the published code: tensors instead of files, gradients, and a row-wise product instead of the diagonal of an N × N matrix. The
letterbox is the published one (long side to 224, padded with black), not the centre crop of most ports; squares come out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from visalign.features import load_dual_encoder
from visalign.preprocess import Aspect, checked_aspect
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.weights import fetch

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HumanPreferenceScore(Reward):
    """cos(image, prompt), differentiable (Wu et al. 2023, arXiv 2306.09341, section 4).

    Scores of one prompt compare; those of different prompts or versions don't. Typical for 2.1: 0.25 to 0.35.

    Args:
        checkpoint: the default hub id, a folder with its files, or one such file (weights alone, for `architecture`); else whatever
            `visalign.features.load_dual_encoder` takes.
        version: which of the two published weights; names the file.
        aspect: "letterbox", "crop" or "stretch" for pictures that are not square; None for the checkpoint's own.
        architecture: open_clip's name of the model that a file of weights belongs to.

    Raises:
        UserError: a bad option, or a checkpoint that cannot be loaded.
    """

    spec = RewardSpec(
        name="hps",
        differentiable=True,
        needs=frozenset({"prompt"}),
        range=(-1.0, 1.0),
        licence="Apache-2.0",
        model_id="xswu/HPSv2",
    )

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        version: Literal["2.0", "2.1"] = "2.1",
        aspect: Aspect | None = "letterbox",
        architecture: str = "ViT-H-14",
    ):
        path, file = Path(checkpoint).expanduser(), FILES[version]
        if checkpoint == self.spec.model_id or path.is_file() or (path / file).is_file():
            self.encoder = load_dual_encoder(str(fetch(checkpoint, file)), architecture=architecture)
        else:
            self.encoder = load_dual_encoder(checkpoint)
        self.aspect: Aspect | None = checked_aspect(aspect)
        self.spec = replace(self.spec, version=version)

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32 in [-1, 1]; embeddings "hps" (N, D)."""
        image, text = self.encoder.encode_images(batch.images, self.aspect), self.encoder.encode_texts(batch.prompts)
        return RewardOutput.of((image * text).sum(-1), embeddings={"hps": image})

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        self.encoder.encode_texts(prompts)
