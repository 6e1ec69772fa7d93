"""Stable Diffusion 3 and 3.5, and the toybox: whatever loads as `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline, calculate_shift
from torch import Tensor, nn

from visalign.paths import Flow
from visalign.pipeline_family import PipelineFamily, flow_grid


class SD3(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side; None takes the transformer's own.
    negative_prompt: what guidance leads away from.
    max_sequence_length: T5 tokens; text beyond it is cut, with a warning by diffusers.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    lora_targets = tuple(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    output_layer = "proj_out"

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        resolution: int | None = None,
        negative_prompt: str = "",
        max_sequence_length: int = 256,
        step_distilled: bool | None = None,
    ):
        super().__init__(pipeline, resolution, negative_prompt, step_distilled)
        self.path, self.max_sequence_length = Flow(), max_sequence_length

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        sequence, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=next(self.pipeline.text_encoder.parameters()).device,
        )
        return {"sequence": sequence, "pooled": pooled}

    def grid(self, steps: int) -> Tensor:
        scheduler, extra = self.pipeline.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting", None):
            patch = self.denoiser.config.patch_size
            tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            extra["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        return flow_grid(scheduler, steps, **extra)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x.to(self.denoiser.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=condition["sequence"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().call(texts, guidance, metadata) | {"max_sequence_length": self.max_sequence_length}
