"""LAION's aesthetic predictor: how much people like a picture, whatever it shows; an affine function of its CLIP embedding.

The published head is five linear layers with dropout and no activation, that is one affine map, and is kept as such: one vector and a bias.
Being linear in an embedding it is the easiest score to over-optimise; good for a smoke test, weak as a judge.
"""

from __future__ import annotations

from torch import nn

from visalign.errors import UserError
from visalign.features import load_dual_encoder
from visalign.preprocess import Aspect, checked_aspect
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.weights import collapsed, fetch, load_weights, read_weights

HEAD_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors")


class Aesthetic(Reward):
    """w · f/‖f‖ + b of the CLIP image embedding f, differentiable; the prompt is not looked at.

    From Schuhmann's improved-aesthetic-predictor, trained on ratings from 1 to 10; typical 5 to 6.5. Used as a reward by Black et al. 2023
    (DDPO, arXiv 2305.13301, section 5).

    Args:
        checkpoint: the encoder that the head was trained on, see `visalign.features.load_dual_encoder`.
        head: a file, or a folder or hub id with `aesthetic-model.pth`, `sac+logos+ava1-l14-linearMSE.pth` (the author's name for it) or
            `model.safetensors`: `layers.N.weight` and `layers.N.bias` of linear layers, or one `weight` and `bias`.
        aspect: "crop", "letterbox" or "stretch" for pictures that are not square; None for the checkpoint's own.

    Raises:
        UserError: a bad option, a checkpoint that cannot be loaded, or a head of another encoder.
    """

    spec = RewardSpec(name="aesthetic", differentiable=True, licence="MIT", model_id="openai/clip-vit-large-patch14")
    head_id = "trl-lib/ddpo-aesthetic-predictor"

    def __init__(self, checkpoint: str = spec.model_id, head: str = head_id, aspect: Aspect | None = None):
        self.aspect: Aspect | None = checked_aspect(aspect)
        state = read_weights(fetch(head, *HEAD_FILES))
        try:
            weight, bias = collapsed(state)
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"aesthetic: head {head!r} is no chain of linear layers that ends in one number ({error})") from None
        self.encoder = load_dual_encoder(checkpoint)
        self.head = nn.Linear(self.encoder.encode_texts([""]).shape[-1], 1).requires_grad_(False)
        load_weights(self.head, {"weight": weight, "bias": bias}, f"aesthetic head {head} on {checkpoint}")

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32, about 1 to 10; embeddings "clip" (N, D)."""
        image = self.encoder.encode_images(batch.images, self.aspect)
        # Not self.head(image): the caller's autocast would round it.
        return RewardOutput.of((image * self.head.weight).sum(-1) + self.head.bias, embeddings={"clip": image})
