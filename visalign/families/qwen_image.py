"""Qwen-Image: whatever loads as `QwenImagePipeline`.

Prompts are of different lengths and encoded one by one, so that no picture depends on what else is in its batch. Guidance keeps the norm
that the conditional half has at each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from visalign.paths import Flow
from visalign.pipeline_family import PipelineFamily, shifted_grid
from visalign.preprocess import Preprocess


class QwenImage(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side, a multiple of 16; None takes the pipeline's own.
    negative_prompt: what guidance leads away from.
    max_sequence_length: tokens of a prompt after its template; what is beyond is cut.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).
    """

    pipeline_classes = ("QwenImagePipeline",)
    lora_targets = tuple(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    output_layer = "proj_out"
    patch = 2

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        negative_prompt: str = " ",
        max_sequence_length: int = 512,
        step_distilled: bool | None = None,
    ):
        super().__init__(pipeline, resolution, negative_prompt, step_distilled)
        self.path, self.max_sequence_length = Flow(), max_sequence_length

    def shape(self, side: int | None) -> tuple[int, ...]:
        channels, *sides = super().shape(side)
        return (channels // self.patch**2, *sides)

    # --- conditions ----------------------------------------------------------------------------------------------------

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Token embeddings `text` (U, L, D), padded, and their `length` (U,), on the CPU because every forward reads it."""
        rows = [self.tokens(text, picture) for text, picture in zip(texts, pictures, strict=True)]
        return {"text": pad_sequence(rows, batch_first=True), "length": torch.tensor([len(row) for row in rows])}

    def tokens(self, text: str, picture: Any) -> Tensor:
        """(L, D) of one prompt."""
        del picture
        return self.pipeline.encode_prompt(text, device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length)[0][
            0
        ]

    # --- sampling ------------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Tensor:
        return shifted_grid(self.pipeline.scheduler, steps, self.latent_shape[1] * self.latent_shape[2] // self.patch**2)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        dtype, images, length = self.denoiser.dtype, self.seen(x, condition), condition["length"]
        longest = int(length.max())
        mask = None if (length == longest).all() else (torch.arange(longest).to(length) < length[:, None]).to(x.device)
        shapes = [(1, image.shape[2] // self.patch, image.shape[3] // self.patch) for image in images]
        found = network(
            hidden_states=torch.cat([self.pack(image.to(dtype)) for image in images], 1),
            timestep=(sigma * 1000).to(dtype) / 1000,  # rounded as the stock pipeline rounds it
            encoder_hidden_states=condition["text"][:, :longest],
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return self.unpacked(found[:, : x[0, 0].numel() // self.patch**2])

    def seen(self, x: Tensor, condition: dict[str, Tensor]) -> list[Tensor]:
        """Latents (N, C, h, w) of all pictures before the network, first those that it denoises."""
        del condition
        return [x]

    def pack(self, latents: Tensor) -> Tensor:
        return pixel_unshuffle(latents, self.patch).flatten(2).mT  # (N, C, H, W) to (N, H/2·W/2, 4·C)

    def unpacked(self, tokens: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return pixel_shuffle(tokens.mT.unflatten(2, (self.latent_shape[1] // self.patch, -1)), self.patch)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float, sigma: Tensor) -> Tensor:
        guided = self.pack(super().guide(conditional, unconditional, guidance, sigma))
        wanted = self.pack(conditional).norm(dim=-1, keepdim=True)
        return self.unpacked(guided * (wanted / guided.norm(dim=-1, keepdim=True)))

    # --- latents: pictures are videos of one frame ---------------------------------------------------------------------

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (config.latents_mean, config.latents_std))
        return mean, std

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents * std + mean)[:, :, None]

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents[:, :, 0] - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, 0]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return self.encoded(Preprocess((self.size["height"], self.size["width"]), (0.5,) * 3, (0.5,) * 3)(images))

    def encoded(self, pixels: Tensor) -> Tensor:
        """Mean latents (N, C, h, w) of pictures (N, 3, H, W) in [-1, 1]."""
        vae = self.pipeline.vae
        return self.scaled(vae.encode(pixels[:, :, None].to(vae.dtype)).latent_dist.mode().float())

    # --- the stock pipeline --------------------------------------------------------------------------------------------

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        away = {"negative_prompt": [self.negative_prompt] * len(texts)} if guidance > 1 else {}
        return away | {"true_cfg_scale": guidance, "max_sequence_length": self.max_sequence_length}
