"""Sana and SANA-Sprint: whatever loads as `SanaPipeline` or `SanaSprintPipeline`.

Sana is a flow, and is sampled by the first order of its own scheduler (DPM-Solver++): a step of the second depends on the step before, and
has no density of its own. SANA-Sprint is a student on the trigonometric path that takes its guidance as an input. The stock pipeline draws
fresh noise after each step but the last (transition `cps` at level 1); without noise, what the student predicts of it stands in for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.sana.pipeline_sana_sprint import SanaSprintPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_scm import SCMScheduler
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.paths import Flow, Trigonometric, expand
from visalign.pipeline_family import PipelineFamily, flow_grid
from visalign.preprocess import Preprocess


class NoiseFreeSCM(SCMScheduler):
    """SANA-Sprint's scheduler with the predicted noise in place of fresh noise."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
        _, clean = super().step(model_output, timestep, sample, generator, return_dict=False)
        now, after = self.timesteps[self.step_index - 1], self.timesteps[self.step_index]
        return after.cos() * clean + after.sin() * (now.sin() * sample + now.cos() * model_output), clean


def first_order(scheduler: Any) -> Any:
    """The scheduler, or its equivalent whose steps depend on nothing but the latents.

    Raises:
        UserError: it is not one of flows.
    """
    if isinstance(scheduler, SCMScheduler):
        return NoiseFreeSCM.from_config(scheduler.config)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if not scheduler.config["use_flow_sigmas"] or scheduler.config["prediction_type"] != "flow_prediction":
            raise UserError("the model's scheduler needs use_flow_sigmas and prediction_type flow_prediction, as Sana's has")
        return DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1, algorithm_type="dpmsolver++")
    return scheduler


class Sana(PipelineFamily):
    """Args:
    pipeline: a loaded pipeline; it is wrapped, not copied.
    resolution: pixels per side; None takes the transformer's own.
    negative_prompt: what guidance leads away from; SANA-Sprint has no such guidance.
    max_sequence_length: tokens of a prompt; what is beyond is cut.
    instruct: put the stock pipeline's instruction, to imagine details, before each prompt.
    distilled_guidance: what SANA-Sprint is told.
    step_distilled: whether it draws in few steps; None goes by its name (`policy.DISTILLED`), and is true of SANA-Sprint.
    """

    pipeline_classes = ("SanaPipeline", "SanaSprintPipeline")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    output_layer = "proj_out"

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        negative_prompt: str = "",
        max_sequence_length: int = 300,
        instruct: bool = True,
        distilled_guidance: float = 4.5,
        step_distilled: bool | None = None,
    ):
        self.sprint = isinstance(pipeline, SanaSprintPipeline)
        super().__init__(pipeline, resolution, negative_prompt, True if self.sprint and step_distilled is None else step_distilled)
        self.path = Trigonometric() if self.sprint else Flow()
        self.scheduler, self.distilled_guidance = first_order(pipeline.scheduler), distilled_guidance
        self.whole = isinstance(self.scheduler, DPMSolverMultistepScheduler)  # it tells the network whole thousandths
        published = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        self.prompting = {"max_sequence_length": max_sequence_length, "complex_human_instruction": published if instruct else None}

    # --- conditions ----------------------------------------------------------------------------------------------------

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        return self._text(texts, self.prompting)

    def unconditional(self, pictures: Sequence[Any]) -> dict[str, Tensor] | None:
        if self._negative is None and not self.sprint:
            self._negative = self._text([self.negative_prompt], self.prompting | {"complex_human_instruction": None})
        return self._negative

    def _text(self, texts: list[str], prompting: dict[str, Any]) -> dict[str, Tensor]:
        guided = {} if self.sprint else {"do_classifier_free_guidance": False}
        found = self.pipeline.encode_prompt(texts, device=self.pipeline.text_encoder.device, **guided, **prompting)
        return {"text": found[0], "mask": found[1]}

    # --- sampling ------------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Tensor:
        if self.sprint:
            self.scheduler.set_timesteps(steps, **self._between(steps))
            return self.scheduler.timesteps.cpu()
        sigmas = flow_grid(self.scheduler, steps)
        if self.whole:  # rounding may have moved σ over a thousandth, and its time not
            missed = self.scheduler.timesteps.cpu() - (sigmas[:-1].double() * 1000).long()
            sigmas[:-1] = torch.nextafter(sigmas[:-1], sigmas[:-1] + missed)
        return sigmas

    @staticmethod
    def _between(steps: int) -> dict[str, None]:
        """SANA-Sprint knows where to go between two steps, and only there."""
        return {} if steps == 2 else {"intermediate_timesteps": None}

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        dtype = self.denoiser.dtype
        text = {"encoder_hidden_states": condition["text"].to(dtype), "encoder_attention_mask": condition["mask"]}
        if self.sprint:
            return self._student(network, x, sigma, text)
        time = ((sigma.double() * 1000).long() if self.whole else sigma * 1000) * self.denoiser.config.timestep_scale
        return network(x.to(dtype), timestep=time, return_dict=False, **text)[0][:, : x.shape[1]]  # less a learned variance

    def _student(self, network: nn.Module, x: Tensor, angle: Tensor, text: dict[str, Tensor]) -> Tensor:
        """SANA-Sprint's network is a flow's: at σ = sin t/(cos t + sin t) it sees x·√(σ² + (1 - σ)²), and v is linear in what it says."""
        config, dtype = self.denoiser.config, self.denoiser.dtype
        sigma = angle.sin() / (angle.cos() + angle.sin())
        s = expand(sigma, x)
        scale = (s**2 + (1 - s) ** 2).sqrt()
        guidance = torch.full_like(sigma, self.distilled_guidance).to(text["encoder_hidden_states"].dtype) * config.guidance_embeds_scale
        said = network((x * scale).to(dtype), timestep=sigma, guidance=guidance, return_dict=False, **text)[0]
        return ((1 - 2 * s) * (x * scale) + (1 - 2 * s + 2 * s**2) * said) / scale

    # --- latents -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pixels = Preprocess((self.size["height"], self.size["width"]), (0.5,) * 3, (0.5,) * 3)(images)
        return self.scaled(vae.encode(pixels.to(vae.dtype)).latent.float())

    # --- the stock pipeline --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        further = self._between(steps) if self.sprint else {"negative_prompt": [self.negative_prompt] * len(texts)}
        further |= {"guidance_scale": self.distilled_guidance if self.sprint else guidance, "latents": noise, **self.size, **self.prompting}
        own = self.pipeline.scheduler
        self.pipeline.register_modules(scheduler=self.scheduler)
        try:
            return self.pipeline(list(texts), num_inference_steps=steps, output_type="pt", use_resolution_binning=False, **further)[0]
        finally:
            self.pipeline.register_modules(scheduler=own)
