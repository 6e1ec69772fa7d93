"""Stable Diffusion 1.x and 2.x, alone or with a ControlNet: whatever loads as `StableDiffusionPipeline`.

Variance-preserving, so times are indices into the training schedule (`visalign.paths.VariancePreserving`). Whatever scheduler a checkpoint
brings, it is sampled by DDIM (arXiv 2010.02502), as DDPO does (arXiv 2305.13301): a step of PNDM or DPM-Solver++ depends on the steps
before, and has no density of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import VariancePreserving
from visalign.pipeline_family import PREDICTIONS, PipelineFamily, as_ddim, ddim_grid
from visalign.policy import named_as_distilled, quiet_loading


class SD15(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied, its scheduler replaced by DDIM's and its safety checker taken out.
    resolution: pixels per side; None takes the U-Net's own.
    negative_prompt: what guidance leads away from.
    controlnet: folder or hub id of one, for a pipeline without; each prompt's `metadata["condition"]` is its picture, a file or (3, H, W).
    learn: what learns, beside what stays frozen; "controlnet" as in ControlNet++ (arXiv 2404.07987).
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).

    Raises:
        UserError: a scheduler that `as_ddim` refuses, a U-Net that takes its guidance as an input, or no ControlNet to learn.
    """

    pipeline_classes = ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    component = "unet"
    loading: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(
        self,
        pipeline: StableDiffusionPipeline | StableDiffusionControlNetPipeline,
        resolution: int | None = None,
        negative_prompt: str = "",
        controlnet: str | None = None,
        learn: Literal["unet", "controlnet"] = "unet",
        step_distilled: bool | None = None,
    ):
        pipe: Any = pipeline
        if step_distilled is None:
            step_distilled = named_as_distilled(pipe.name_or_path)
        if controlnet:
            with quiet_loading():
                control = ControlNetModel.from_pretrained(controlnet, dtype=pipe.unet.dtype)
            parts = pipe.components | {"controlnet": control, "safety_checker": None}
            pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        pipe.register_modules(scheduler=as_ddim(pipe.scheduler), safety_checker=None)
        pipe.register_to_config(requires_safety_checker=False)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise UserError("the model's U-Net takes guidance as an input (time_cond_proj_dim); such students can't be guided here")
        self.needs_picture, self.learn = hasattr(pipe, "controlnet"), learn
        if learn == "controlnet" and not self.needs_picture:
            raise UserError("policy.options.learn=controlnet: this pipeline has none; name one in policy.options.controlnet")
        super().__init__(pipe, resolution, negative_prompt, step_distilled)
        self.network = pipe.controlnet if learn == "controlnet" else pipe.unet
        self.path = VariancePreserving(pipe.scheduler.alphas_cumprod, PREDICTIONS[pipe.scheduler.config.prediction_type])

    # --- conditions ----------------------------------------------------------------------------------------------------

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        tokens = self.pipeline.encode_prompt(texts, self.pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)[0]
        shown = [self._control(picture) for picture in pictures if picture is not None]  # guidance keeps the sample's own
        return {"text": tokens} | ({"control": torch.cat(shown)} if shown else {})

    def _control(self, picture: Any) -> Tensor:
        """(1, 3, H, W) as the ControlNet wants it."""
        found = self.pipeline.control_image_processor.preprocess(self.opened(picture)[None], **self.size)
        return found.to(self.pipeline.controlnet.device, self.pipeline.controlnet.dtype)

    # --- latents: the stock pipeline heeds no shift_factor -----------------------------------------------------------------

    def unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.pipeline.vae.config.scaling_factor

    def scaled(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    # --- sampling ------------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Tensor:
        return ddim_grid(self.pipeline.scheduler, steps)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        pipe, text = self.pipeline, condition["text"]
        x = x.to(pipe.unet.dtype)
        if not self.needs_picture:
            return network(x, sigma, encoder_hidden_states=text, return_dict=False)[0]
        unet, control = (pipe.unet, network) if self.learn == "controlnet" else (network, pipe.controlnet)
        down, middle = control(x, sigma, encoder_hidden_states=text, controlnet_cond=condition["control"], return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(x, sigma, encoder_hidden_states=text, return_dict=False, **residuals)[0]

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        control = {"image": self.encode(texts, metadata).positive()["control"]} if self.needs_picture else {}
        return super().call(texts, guidance, metadata) | control

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        if self.learn == "controlnet":
            raise NotImplementedError("stock pipelines read no adapter of a ControlNet; use --merge")
        super().save_adapter(folder, state)
