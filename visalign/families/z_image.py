"""Z-Image and Z-Image-Turbo: whatever loads as `ZImagePipeline`.

The network's time runs from 0 at noise to 1 at data and its output is the negative of the velocity. Guidance w is the stock pipeline's
`guidance_scale` + 1, so that 1 is none here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from visalign.paths import Flow, expand
from visalign.pipeline_family import PipelineFamily, shifted_grid


class ZImage(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side, a multiple of 16; None takes 1024.
    negative_prompt: what guidance leads away from.
    max_sequence_length: tokens of a prompt in its chat template; what is beyond is cut.
    cfg_normalization: at most this many times the conditional half's norm may guidance make of it; 0 for no limit.
    cfg_truncation: guidance ends where this share of the time has passed; 1 for never.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).
    """

    pipeline_classes = ("ZImagePipeline",)
    lora_targets = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    output_layer = "all_final_layer.2-1.linear"
    patch = 2

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        negative_prompt: str = "",
        max_sequence_length: int = 512,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        step_distilled: bool | None = None,
    ):
        super().__init__(pipeline, resolution or 1024, negative_prompt, step_distilled)
        self.path, self.max_sequence_length = Flow(), max_sequence_length
        self.cfg_normalization, self.cfg_truncation = cfg_normalization, cfg_truncation

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        device = next(self.pipeline.text_encoder.parameters()).device
        # a copy of the list: the pipeline writes its template into what it is given
        rows, _ = self.pipeline.encode_prompt(
            list(texts), device=device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        # lengths stay on the CPU: every forward reads them
        return {"text": pad_sequence(rows, batch_first=True), "length": torch.tensor([len(row) for row in rows])}

    def grid(self, steps: int) -> Tensor:
        tokens = self.latent_shape[1] * self.latent_shape[2] // self.patch**2
        return shifted_grid(self.pipeline.scheduler, steps, tokens, get_default_z_image_sigmas(steps))

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        captions = [row[:length] for row, length in zip(condition["text"], condition["length"].tolist(), strict=True)]
        latents = list(x.to(self.denoiser.dtype)[:, :, None])
        return -torch.stack(network(latents, self._progress(sigma), captions, return_dict=False)[0])[:, :, 0]

    @staticmethod
    def _progress(sigma: Tensor) -> Tensor:
        """The network's time, rounded as the stock pipeline rounds it."""
        return (1000 - sigma * 1000) / 1000

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float, sigma: Tensor) -> Tensor:
        guided = super().guide(conditional, unconditional, guidance, sigma)
        if self.cfg_normalization:
            limit = conditional.flatten(1).norm(dim=1) * self.cfg_normalization
            guided = guided * expand((limit / guided.flatten(1).norm(dim=1)).clamp(max=1), guided)
        return torch.where(expand(self._progress(sigma) > self.cfg_truncation, guided), conditional, guided)

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rule = {"cfg_normalization": self.cfg_normalization, "cfg_truncation": self.cfg_truncation}
        return super().call(texts, guidance - 1, metadata) | rule | {"max_sequence_length": self.max_sequence_length}
