"""The toybox's `StableDiffusionPipeline`: a small U-Net that predicts noise, for what is made for variance-preserving models.

It shares the VAE with `sd3/` and starts from one of its text encoders, so `sd3` comes first. The noise schedule is Stable Diffusion's own;
sampling is trailing (arXiv 2305.08891), because a leading grid of 10 steps would begin where a tenth of a picture should already show.
The loss of the noise is divided by ᾱ, which makes it that of v (arXiv 2202.00512), but by no less than `LEAST`: unweighted, the layout of a
scene, which is decided where ᾱ is small, would hardly count.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from visalign.toybox.build_sd3 import PICTURES, clip_tokenizer, encode, small_clip
from visalign.toybox.measure_pipeline import measure
from visalign.toybox.pretrain import Progress, compiled, descend, draw, follow, warm_then_fall

WIDTHS = (48, 96, 128)
STEPS, BATCH, LEARNING_RATE = 4500, 32, 1e-3
LEAST = 0.05  # of ᾱ, in the weight of the loss
DROPPED = 0.1  # share of the prompts that are replaced by the empty one, for guidance
TIMES = 1000
MEASURED = ((10, 1.0), (10, 3.0), (20, 1.0), (20, 3.0))


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet, save the pipeline to `out`/sd15 with its measured quality."""
    vae: Any = AutoencoderKL.from_pretrained(out / "sd3", subfolder="vae")
    vae.register_to_config(_name_or_path="")  # or a path of this machine is saved with it
    pictures = draw(PICTURES, seed=1)
    latents = encode(vae.to(device), pictures, work / "latents.safetensors", device) * vae.config.scaling_factor
    pipeline: Any = assemble(vae)
    pipeline.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(out / "sd3", subfolder="text_encoder").state_dict())
    train(pipeline, latents, pictures.prompts, work, device)
    pipeline.to("cpu").save_pretrained(out / "sd15", safe_serialization=True)
    pipeline.set_progress_bar_config(disable=True)
    quality = measure(pipeline, MEASURED)
    (out / "sd15" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("sd15:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


def assemble(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline around a VAE, its other parts untrained."""
    parts: dict[str, Any] = {"tokenizer": clip_tokenizer(), "text_encoder": small_text_encoder(), "unet": small_unet()}
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=TIMES,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    others: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "scheduler": scheduler}
    return StableDiffusionPipeline(vae=vae, **parts, **others, requires_safety_checker=False)


def small_text_encoder() -> CLIPTextModel:
    """Of the size of `sd3/`'s."""
    config: CLIPTextConfig = small_clip().config
    return CLIPTextModel(config)


def small_unet() -> UNet2DConditionModel:
    """Untrained network, 5.2 M parameters."""
    shape: dict[str, Any] = {  # diffusers annotates them as tuples of one
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,  # the number of heads, by an old mistake of diffusers that published configurations rely on
    }
    text = small_clip().config.hidden_size
    return UNet2DConditionModel(**shape, sample_size=16, layers_per_block=1, cross_attention_dim=text, norm_num_groups=16)


class Denoiser(nn.Module):
    """U-Net and text encoder as one module: what is trained, averaged and saved."""

    def __init__(self, pipeline: StableDiffusionPipeline):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder

    def forward(self, x: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """Noise (B, 4, 16, 16) as StableDiffusionPipeline computes it, with gradients into the text encoder."""
        return self.unet(x, times, encoder_hidden_states=self.text_encoder(ids)[0], return_dict=False)[0]


def train(pipeline: Any, latents: Tensor, prompts: list[str], work: Path, device: torch.device) -> None:
    """Train U-Net and text encoder; the pipeline gets their average."""
    torch.manual_seed(0)
    model = Denoiser(pipeline).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    ids = pipeline.tokenizer([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    table = pipeline.scheduler.alphas_cumprod.to(device)
    compiled(model.unet)
    progress = Progress(work / "sd15.pt", {"model": model, "average": average, "optimizer": optimizer})
    for step in progress.steps(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_then_fall(step, STEPS, hold=0.5)
        index = torch.randint(len(prompts), (BATCH,))
        named = torch.where(torch.rand(BATCH) < DROPPED, len(prompts), index)  # the last prompt is the empty one
        clean = latents[index].to(device)
        noise, times = torch.randn_like(clean), torch.randint(TIMES, (BATCH,), device=device)
        square = table[times].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            said = model(square.sqrt() * clean + (1 - square).sqrt() * noise, times, ids[named].to(device))
        loss = ((said.float() - noise).square() / square.clamp(min=LEAST)).mean()
        descend(loss, model, [optimizer])
        follow(average, model, step, 0.998)
        progress.note = {"loss": progress.smoothed("loss", loss.item(), 0.98)}
    pipeline.register_modules(unet=average.unet, text_encoder=average.text_encoder)
