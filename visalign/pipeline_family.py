"""What the families of diffusers pipelines do alike, so that a family's file holds only what is its own model's.

That is how prompts become tensors, one forward of the denoiser, the scheduler's grid, and whatever differs from the methods here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import Prediction
from visalign.pictures import load as load_picture
from visalign.policy import Family, named_as_distilled, quiet_loading
from visalign.preprocess import Preprocess
from visalign.rollout import Condition

SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}  # where a scheduler names none
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


class PipelineFamily(Family):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side; None takes the model's own.
    negative_prompt: what guidance leads away from.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`).

    Attributes:
        component: the pipeline's denoiser, by name.
        loading: what else the pipeline is loaded with.
        patch: latents a side that the denoiser takes together; pictures have whole patches.
        needs_picture: whether each prompt comes with a picture, `metadata["condition"]`, a file or (3, H, W) in [0, 1].
    """

    component: ClassVar[str] = "transformer"
    loading: ClassVar[Mapping[str, Any]] = {}
    patch: ClassVar[int] = 1
    needs_picture: bool = False

    def __init__(self, pipeline: Any, resolution: int | None = None, negative_prompt: str = "", step_distilled: bool | None = None):
        self.step_distilled = named_as_distilled(pipeline.name_or_path) if step_distilled is None else step_distilled
        self.pipeline, self.negative_prompt = pipeline, negative_prompt
        self.network: nn.Module = self.denoiser
        self.latent_shape = self.shape(resolution)
        pipeline.set_progress_bar_config(disable=True)
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        self._negative: dict[str, Tensor] | None = None

    @classmethod
    def load(cls, source: str, dtype: torch.dtype = torch.float32, **options: Any) -> Self:
        """From a folder or a hub id."""
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        with quiet_loading():
            pipeline: Any = DiffusionPipeline.from_pretrained(source, dtype=dtype, **cls.loading)
        return cls(pipeline, **options)

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.component)

    @property
    def stride(self) -> int:
        """Pixels a side of one latent."""
        return self.pipeline.vae_scale_factor

    def shape(self, side: int | None) -> tuple[int, ...]:
        """Of one sample's latents, for pictures of `side` pixels or of the model's own size.

        Raises:
            UserError: pictures of that size have no whole patches.
        """
        config, unit = self.denoiser.config, self.stride * self.patch
        if side and side % unit:
            raise UserError(f"policy.resolution={side}: this model draws multiples of {unit} pixels; use {max(unit, side // unit * unit)}")
        own = side // self.stride if side else config.get("sample_size") or self.pipeline.default_sample_size
        return (config.in_channels, *((own, own) if isinstance(own, int) else own))

    @property
    def size(self) -> dict[str, int]:
        """Height and width of the pictures."""
        return {name: n * self.stride for name, n in zip(("height", "width"), self.latent_shape[-2:], strict=True)}

    def modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    # --- conditions ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        """name -> (U, ...), what `forward` is conditioned on: of U texts and their pictures as given, each None unless `needs_picture`."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        pictures = self._pictures(texts, metadata)
        keys = [(text, id(picture) if isinstance(picture, Tensor) else picture) for text, picture in zip(texts, pictures, strict=True)]
        row = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        first = [keys.index(key) for key in row]
        shown = [pictures[n] for n in first]
        tensors = self.embed([texts[n] for n in first], shown)
        return Condition(torch.tensor([row[key] for key in keys]), tensors, self.unconditional(shown))

    def unconditional(self, pictures: Sequence[Any]) -> dict[str, Tensor] | None:
        """name -> (1, ...), or (U, ...) where it depends on the U pictures: the other half of guidance; None for models without one."""
        del pictures
        if self._negative is None:
            self._negative = self.embed([self.negative_prompt], [None])
        return self._negative

    def _pictures(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The condition picture of each text, as given; None for models without."""
        found = [record.get("condition") if self.needs_picture else None for record in metadata or [{}] * len(texts)]
        for text, picture in zip(texts, found, strict=True):
            if picture is None and self.needs_picture:
                raise UserError(f"prompt {text!r} has no picture: this model needs `condition`, a file, with each prompt")
        return found

    @staticmethod
    def opened(picture: Any) -> Tensor:
        """(3, H, W) in [0, 1] of a file or of a tensor (1 or 3, H, W)."""
        return (picture if isinstance(picture, Tensor) else load_picture(picture)).expand(3, -1, -1)

    # --- latents -------------------------------------------------------------------------------------------------------

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents (N, ...) of the path as the VAE takes them."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def scaled(self, latents: Tensor) -> Tensor:
        """The inverse of `unscaled`."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return (vae.decode(self.unscaled(latents).to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pixels = Preprocess((self.size["height"], self.size["width"]), (0.5,) * 3, (0.5,) * 3)(images)  # to [-1, 1]
        # the mean of the latents: no noise that a resumed run would have to repeat
        return self.scaled(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float())

    # --- the stock pipeline --------------------------------------------------------------------------------------------

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (N, ...) in the layout of the stock pipeline's argument `latents`."""
        return latents

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What else the stock pipeline is called with."""
        del metadata
        return {"guidance_scale": guidance, "negative_prompt": [self.negative_prompt] * len(texts)}

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        latents = self.pack(noise.to(self.denoiser.dtype))
        further = self.size | self.call(texts, guidance, metadata)
        return self.pipeline(prompt=list(texts), num_inference_steps=steps, latents=latents, output_type="pt", **further)[0]

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        metadata = self.denoiser.peft_config["default"].to_dict()  # without it, stock diffusers takes alpha = rank
        weights = {f"{self.component}_lora_layers": dict(state), f"{self.component}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, **weights, safe_serialization=True)

    def save(self, folder: FilePath) -> None:
        self.pipeline.save_pretrained(folder, safe_serialization=True)


# --- schedulers --------------------------------------------------------------------------------------------------------


def flow_grid(scheduler: Any, steps: int, **arguments: Any) -> Tensor:
    """(steps + 1,) sigmas of a scheduler of flows, set as its pipeline sets it.

    Raises:
        UserError: one step, of a grid that the scheduler stretches between two times.
    """
    if scheduler.config.get("shift_terminal", None) and steps == 1:
        raise UserError("policy.steps=1: this scheduler's shift_terminal stretches a grid between two times; use 2 steps or more")
    scheduler.set_timesteps(**({} if "sigmas" in arguments else {"num_inference_steps": steps}), **arguments)
    return scheduler.sigmas.float().cpu()


def shifted_grid(scheduler: Any, steps: int, tokens: int, sigmas: Any = None) -> Tensor:
    """`flow_grid` of even steps with FLUX's shift by the number of the denoiser's tokens, as the pipelines since then make it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in SHIFT.items()))
    return flow_grid(scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas, mu=mu)


def as_ddim(scheduler: Any, **changes: Any) -> Any:
    """The DDIM scheduler of a checkpoint's training schedule, with some settings changed.

    Raises:
        UserError: it has no such schedule, cuts its clean estimates, so that no step is Gaussian, or predicts neither noise nor v.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"the model's scheduler, {type(scheduler).__name__}, has no table of alphas: it is no variance-preserving model")
    config = dict(scheduler.config)
    if not isinstance(scheduler, DDIMScheduler):  # which may lack what these default to, for pictures instead of latents
        config = {"clip_sample": False, "set_alpha_to_one": False} | config
        if config.get("timestep_spacing") == "linspace":  # of sigma schedulers; DDIM would step past the times it visits
            config["timestep_spacing"] = "leading"
    ddim: Any = DDIMScheduler.from_config(config | changes)
    for option in ("clip_sample", "thresholding"):
        if ddim.config[option]:
            raise UserError(f"the model's scheduler has {option}, so that its steps are not Gaussian; set it to false in its config")
    if ddim.config["prediction_type"] not in PREDICTIONS:
        raise UserError(f"the model predicts {ddim.config['prediction_type']!r}; known: {', '.join(PREDICTIONS)}")
    return ddim


def ddim_grid(scheduler: Any, steps: int) -> Tensor:
    """(steps + 1,) indices into the training schedule that a DDIM scheduler visits; the last is -1 where it ends at clean data.

    Raises:
        UserError: it would step to other times than it visits.
    """
    scheduler.set_timesteps(steps)
    times: Tensor = scheduler.timesteps.cpu()
    if (times.diff() != -(scheduler.config.num_train_timesteps // steps)).any():
        raise UserError(
            f"policy.steps={steps}: DDIM with timestep_spacing={scheduler.config.timestep_spacing} would step to other times than it "
            f"visits; use a number of steps that divides {scheduler.config.num_train_timesteps}, or timestep_spacing leading"
        )
    last = -1 if scheduler.config.set_alpha_to_one else 0  # clean data, or the least noise of the training schedule
    return torch.nn.functional.pad(times, (0, 1), value=last).float()
