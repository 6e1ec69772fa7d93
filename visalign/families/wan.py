"""Wan 2.1 and 2.2, text or a first frame to video: whatever loads as `WanPipeline` or `WanImageToVideoPipeline`.

Their UniPC scheduler looks back at earlier steps, so it is replaced by itself at order 1 without its corrector: the same times, and steps
that are Euler's. The model is told whole times, as the scheduler cuts them. Wan 2.2's two experts, one for high noise and one for low,
learn as one network. Its 5B model sees a given first frame in the noise's place, at time 0; here that frame goes straight to what is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import Flow, expand
from visalign.pictures import to_image
from visalign.pipeline_family import flow_grid
from visalign.video_family import VideoFamily


class Wan(VideoFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied, its scheduler replaced (`save` puts it back).
    height, width, frames: multiples of 16, and one more than a multiple of 4; `resolution` is both sides.
    guidance_2: guidance of the expert for low noise; None: the same for both.
    others: as `VideoFamily` takes them; nothing masks the padding of prompts.

    Raises:
        UserError: a size that the model doesn't have.
    """

    pipeline_classes = ("WanPipeline", "WanImageToVideoPipeline")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    output_layer = "proj_out"

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        height: int = 480,
        width: int = 832,
        frames: int = 81,
        guidance_2: float | None = None,
        negative_prompt: str = "",
        max_sequence_length: int = 512,
        step_distilled: bool | None = None,
    ):
        self.needs_picture = "image_encoder" in pipeline.components
        super().__init__(pipeline, resolution, height, width, frames, negative_prompt, max_sequence_length, step_distilled)
        self.path, self.scheduler, self.guidance_2 = Flow(), pipeline.scheduler, guidance_2
        self.told = torch.full((2, 1), -1.0)  # (sigma, time) of every grid so far
        if isinstance(self.scheduler, UniPCMultistepScheduler):
            pipeline.register_modules(scheduler=first_order(self.scheduler))
        if pipeline.components.get("transformer_2") is not None:
            boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
            self.network = Experts(pipeline.transformer, pipeline.transformer_2, boundary)

    def modules(self) -> dict[str, nn.Module]:
        joint = {"experts": self.network} if isinstance(self.network, Experts) else {}
        return {name: part for name, part in super().modules().items() if not (joint and name.startswith("transformer"))} | joint

    def units(self) -> tuple[int, int, int]:
        vae = self.pipeline.vae.config
        return vae.scale_factor_temporal, vae.scale_factor_spatial, max(16, vae.scale_factor_spatial * self.denoiser.config.patch_size[1])

    def moments(self) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        return torch.tensor(config.latents_mean), torch.tensor(config.latents_std)

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        pipe, dtype = self.pipeline, self.denoiser.dtype
        device = next(pipe.text_encoder.parameters()).device
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length, "device": device}
        tensors = {"text": pipe.encode_prompt(texts, **options)[0].to(dtype)}
        if pictures[0] is not None:
            shown = [to_image(self.opened(picture)) for picture in pictures]  # the stock pipeline's own way of scaling wants no tensors
            tensors["first"] = torch.cat([self._first(image) for image in shown])
            if self.denoiser.config.image_dim is not None:
                tensors["seen"] = torch.cat([pipe.encode_image(image, device).to(dtype) for image in shown])
        return tensors

    def _first(self, image: Any) -> Tensor:
        """(1, 4 + C, f, h, w) which frames are given, and latents of a video whose first frame is a picture and whose others are grey; of
        the 5B model (1, C, 1, h, w), that frame's alone."""
        pipe, device = self.pipeline, next(self.pipeline.vae.parameters()).device
        pixels = pipe.video_processor.preprocess(image, self.height, self.width).to(device, torch.float32)
        settings = self.size | {"latents": torch.zeros(1, *self.latent_shape), "dtype": torch.float32, "device": device}
        return pipe.prepare_latents(pixels, 1, **settings)[1]

    def grid(self, steps: int) -> Tensor:
        sigmas, times = flow_grid(self.pipeline.scheduler, steps), self.pipeline.scheduler.timesteps.cpu()
        self.told = torch.cat([torch.stack([sigmas[:-1], times.to(sigmas)]), self.told], 1).unique(dim=1)
        return sigmas

    def time(self, sigma: Tensor) -> Tensor:
        """(N,) what the model is told of sigma (N,): UniPC's whole times, which on its own grids hang on float64's last bit."""
        time = sigma * self.scheduler.config.num_train_timesteps
        if not isinstance(self.scheduler, UniPCMultistepScheduler):
            return time
        known, told = self.told.to(sigma.device)
        same = sigma[:, None] == known
        return torch.where(same.any(1), told[same.int().argmax(1)], time.floor())

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        time, shown, first = self.time(sigma), x, condition.get("first")
        if several := self.pipeline.config.expand_timesteps:  # the 5B model has a time for every token
            patch = self.denoiser.config.patch_size
            time = expand(time, x[:, 0]).expand_as(x[:, 0])[:, :: patch[0], :: patch[1], :: patch[2]]
        if several and first is not None:
            shown, time = torch.cat([first, x[:, :, 1:]], 2), torch.cat([torch.zeros_like(time[:, :1]), time[:, 1:]], 1)
        elif first is not None:
            shown = torch.cat([x, first], 1)
        text = {"encoder_hidden_states": condition["text"], "encoder_hidden_states_image": condition.get("seen")}
        told = time.flatten(1) if several else time
        said = network(hidden_states=shown.to(self.denoiser.dtype), timestep=told, return_dict=False, **text)[0]
        if several and first is not None:
            said = torch.cat([(x[:, :, :1] - first) / expand(sigma, x), said[:, :, 1:]], 2)
        return said

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float, sigma: Tensor) -> Tensor:
        weight = torch.full_like(sigma, guidance)
        if self.guidance_2 is not None and isinstance(self.network, Experts):
            weight = torch.where(self.time(sigma) < self.network.boundary, self.guidance_2, weight)
        return unconditional + expand(weight, conditional) * (conditional - unconditional)

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shown = {"image": to_image(self.opened(metadata[0]["condition"]))} if self.needs_picture else {}
        second = {"guidance_scale_2": self.guidance_2} if isinstance(self.network, Experts) else {}
        return super().call(texts, guidance, metadata) | shown | second

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        if not self.needs_picture:
            return super().stock(texts, noise, steps, guidance, metadata)
        rows = range(len(texts))  # it takes one picture a call
        return torch.cat([super(Wan, self).stock(texts[n : n + 1], noise[n : n + 1], steps, guidance, metadata[n : n + 1]) for n in rows])

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        """The second expert's goes to `transformer_2/`, for `load_lora_weights(…, load_into_transformer_2=True)`."""
        two = isinstance(self.network, Experts)
        for prefix, where in {"transformer.": folder, "transformer_2.": folder / "transformer_2"}.items() if two else [("", folder)]:
            super().save_adapter(where, {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})

    def save(self, folder: FilePath) -> None:
        ours = self.pipeline.scheduler
        self.pipeline.register_modules(scheduler=self.scheduler)
        super().save(folder)
        self.pipeline.register_modules(scheduler=ours)


def first_order(scheduler: Any) -> Any:
    """UniPC as Euler's method on its own times: order 1, no corrector. Raises UserError if it doesn't predict a flow."""
    if not scheduler.config.use_flow_sigmas:
        raise UserError("the model's scheduler is UniPC without use_flow_sigmas; expected a flow, as all Wan models are")
    never = list(range(scheduler.config.num_train_timesteps))
    return UniPCMultistepScheduler.from_config(scheduler.config, solver_order=1, disable_corrector=never)


def both(name: str) -> Callable[..., None]:
    """A method that calls each expert's of this name."""

    def call(self: Experts, *arguments: Any) -> None:
        for expert in self.each:
            getattr(expert, name)(*arguments)

    return call


class Experts(nn.Module):
    """Two denoisers that pass for one: `transformer` for times from `boundary` on, `transformer_2` below."""

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float):
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        self.each: tuple[Any, Any] = transformer, transformer_2

    def forward(self, timestep: Tensor, return_dict: bool = False, **inputs: Tensor | None) -> tuple[Tensor]:
        """Each of N samples goes to the expert of its time (N,)."""
        high = timestep >= self.boundary
        rows = [chosen.nonzero()[:, 0] for chosen in (high, ~high)]
        said = [
            expert(timestep=timestep[own], return_dict=return_dict, **{name: v if v is None else v[own] for name, v in inputs.items()})[0]
            for expert, own in zip(self.each, rows, strict=True)
            if len(own)
        ]
        return (torch.cat(said)[torch.cat(rows).argsort()],)

    @property
    def peft_config(self) -> Any:
        return self.each[0].peft_config

    _repeated_blocks = ("WanTransformerBlock",)
    add_adapter, enable_adapters, disable_adapters = both("add_adapter"), both("enable_adapters"), both("disable_adapters")
    fuse_lora, unload_lora = both("fuse_lora"), both("unload_lora")
    enable_gradient_checkpointing, set_attention_backend = both("enable_gradient_checkpointing"), both("set_attention_backend")
