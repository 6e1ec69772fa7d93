"""Stable Diffusion 1.x and 2.x, alone or with a ControlNet: whatever loads as `StableDiffusionPipeline`.

Variance-preserving, so times are indices into the training schedule (`visalign.paths.VariancePreserving`). Whatever scheduler a checkpoint
brings, it is sampled by DDIM (arXiv 2010.02502), as DDPO does (arXiv 2305.13301): a step of PNDM or DPM-Solver++ depends on the steps
before, and has no density of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import Prediction, VariancePreserving
from visalign.pictures import load as load_picture
from visalign.policy import Family, named_as_distilled, quiet_loading
from visalign.rollout import Condition

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """The DDIM scheduler of a checkpoint's training schedule.

    Raises:
        UserError: it cuts its clean estimates, so that no step is Gaussian, or predicts neither noise nor v.
    """
    config = dict(scheduler.config)
    if not isinstance(scheduler, DDIMScheduler):  # which may lack what these default to, for pictures instead of latents
        config = {"clip_sample": False, "set_alpha_to_one": False} | config
        if config.get("timestep_spacing") == "linspace":  # of sigma schedulers; DDIM would step past the times it visits
            config["timestep_spacing"] = "leading"
    ddim: Any = DDIMScheduler.from_config(config)
    for option in ("clip_sample", "thresholding"):
        if ddim.config[option]:
            raise UserError(f"the model's scheduler has {option}, so that its steps are not Gaussian; set it to false in its config")
    if ddim.config["prediction_type"] not in PREDICTIONS:
        raise UserError(f"the model predicts {ddim.config['prediction_type']!r}; known: {', '.join(PREDICTIONS)}")
    return ddim


class SD15(Family):
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
        self.step_distilled = named_as_distilled(pipe.name_or_path) if step_distilled is None else step_distilled
        if controlnet:
            with quiet_loading():
                control = ControlNetModel.from_pretrained(controlnet, dtype=pipe.unet.dtype)
            parts = pipe.components | {"controlnet": control, "safety_checker": None}
            pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        pipe.register_modules(scheduler=as_ddim(pipe.scheduler), safety_checker=None)
        pipe.register_to_config(requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise UserError("the model's U-Net takes guidance as an input (time_cond_proj_dim); such students can't be guided here")
        self.controlled, self.learn = hasattr(pipe, "controlnet"), learn
        if learn == "controlnet" and not self.controlled:
            raise UserError("policy.options.learn=controlnet: this pipeline has none; name one in policy.options.controlnet")
        self.pipeline, self.negative_prompt = pipe, negative_prompt
        self.network: nn.Module = pipe.controlnet if learn == "controlnet" else pipe.unet
        self.path = VariancePreserving(pipe.scheduler.alphas_cumprod, PREDICTIONS[pipe.scheduler.config.prediction_type])
        side = resolution // pipe.vae_scale_factor if resolution else pipe.unet.config.sample_size
        self.latent_shape = (pipe.unet.config.in_channels, *((side, side) if isinstance(side, int) else side))
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        self._negative: dict[str, Tensor] | None = None

    @classmethod
    def load(cls, source: str, dtype: torch.dtype = torch.float32, **options: Any) -> SD15:
        """From a folder or a hub id."""
        with quiet_loading():
            pipeline: Any = DiffusionPipeline.from_pretrained(source, dtype=dtype, safety_checker=None, requires_safety_checker=False)
        return cls(pipeline, **options)

    @property
    def size(self) -> dict[str, int]:
        """Height and width of the pictures."""
        return {name: n * self.pipeline.vae_scale_factor for name, n in zip(("height", "width"), self.latent_shape[1:], strict=True)}

    def modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    # --- conditions ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        sources = self._sources(texts, metadata)
        keys = [(text, id(source) if isinstance(source, Tensor) else source) for text, source in zip(texts, sources, strict=True)]
        row = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        first = [keys.index(key) for key in row]
        tensors = {"text": self._embed([texts[n] for n in first])}
        if self.controlled:
            tensors["control"] = torch.cat([self._control(sources[n]) for n in first])
        if self._negative is None:
            self._negative = {"text": self._embed([self.negative_prompt])}
        return Condition(torch.tensor([row[key] for key in keys]), tensors, self._negative)

    def _sources(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The control picture of each text, as given; None without a ControlNet."""
        found = [record.get("condition") if self.controlled else None for record in metadata or [{}] * len(texts)]
        for text, source in zip(texts, found, strict=True):
            if source is None and self.controlled:
                raise UserError(f"prompt {text!r} has no control picture: a ControlNet needs `condition`, a file, with each prompt")
        return found

    def _control(self, source: Any) -> Tensor:
        """(1, 3, H, W) as the ControlNet wants it."""
        picture = source if isinstance(source, Tensor) else load_picture(source)
        found = self.pipeline.control_image_processor.preprocess(picture.expand(3, -1, -1)[None], **self.size)
        return found.to(self.pipeline.controlnet.device, self.pipeline.controlnet.dtype)

    def _embed(self, texts: list[str]) -> Tensor:
        return self.pipeline.encode_prompt(texts, self.pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)[0]

    # --- sampling ------------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Tensor:
        scheduler: Any = self.pipeline.scheduler
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.timesteps.cpu()
        if (times.diff() != -(scheduler.config.num_train_timesteps // steps)).any():
            raise UserError(
                f"policy.steps={steps}: DDIM with timestep_spacing={scheduler.config.timestep_spacing} would step to other times than it "
                f"visits; use a number of steps that divides {scheduler.config.num_train_timesteps}, or timestep_spacing leading"
            )
        last = -1 if scheduler.config.set_alpha_to_one else 0  # clean data, or the least noise of the training schedule
        return torch.nn.functional.pad(times, (0, 1), value=last).float()

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        pipe, text = self.pipeline, condition["text"]
        x = x.to(pipe.unet.dtype)
        if not self.controlled:
            return network(x, sigma, encoder_hidden_states=text, return_dict=False)[0]
        unet, control = (pipe.unet, network) if self.learn == "controlnet" else (network, pipe.controlnet)
        down, middle = control(x, sigma, encoder_hidden_states=text, controlnet_cond=condition["control"], return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(x, sigma, encoder_hidden_states=text, return_dict=False, **residuals)[0]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        control = {"image": self.encode(texts, metadata).positive()["control"]} if self.controlled else {}
        return self.pipeline(
            prompt=list(texts),
            negative_prompt=[self.negative_prompt] * len(texts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(self.pipeline.unet.dtype),
            output_type="pt",
            **self.size,
            **control,
        ).images

    # --- saving --------------------------------------------------------------------------------------------------------

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        if self.learn == "controlnet":
            raise NotImplementedError("stock pipelines read no adapter of a ControlNet; use --merge")
        # Without the metadata, stock diffusers takes alpha = rank.
        metadata = self.pipeline.unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, dict(state), unet_lora_adapter_metadata=metadata, safe_serialization=True)

    def save(self, folder: FilePath) -> None:
        self.pipeline.save_pretrained(folder, safe_serialization=True)
