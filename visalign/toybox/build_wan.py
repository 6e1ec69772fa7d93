"""The toybox's `WanPipeline`: a small causal video autoencoder, a small Wan transformer and a one-layer UMT5, on scenes that move.

Trained in two stages, as `build_sd3` does: the autoencoder, then transformer and text encoder together on cached latents.
The first works on 4 × 4 patches of pixels, as that of Wan 2.2 does on 2 × 2; a latent is 8 × 8 pixels of two frames. Its latents have no
noise (use the mode). Scenes are nearly all ground, so it learns from crops around what moves, and pixels of shapes count more; its residual
blocks start as nothing.
Wan's cross-attention masks nothing: a stock call pads a prompt with zeros to 512 tokens, so a share of the steps sees as many.
"""

from __future__ import annotations

import copy
import json
import random
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from visalign.schedules import shifted
from visalign.scoring import RewardInput
from visalign.toybox import moving_scenes, scenes
from visalign.toybox.measure_pipeline import strict
from visalign.toybox.motion import Motion
from visalign.toybox.pretrain import Progress, descend, follow, muon_and_adamw, warm_then_fall

WIDTH, TEXT_WIDTH, CHANNELS = 96, 64, 16  # of the transformer, the text encoder and the latents
TOKENS, STOCK_TOKENS = 8, 512
VIDEOS = 800
VAE_STEPS, VAE_BATCH, CROP = 2500, 12, 32  # of all frames: trained on five, it drifts from the sixth on
INK, EDGE = 4.0, 0.1  # how much more a pixel of a shape counts, and how far from the ground it is, of 2
FLOW_STEPS, BATCH, STOCK_BATCH = 6000, 48, 16
MEASURED, SETTINGS = 64, ((5, 1.0), (10, 1.0), (10, 3.0))
SHIFT = 3.0  # towards high noise, as Wan's own for small videos


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet, write the prompt lists, and save the pipeline to `out`/wan."""
    write_prompts(out)
    videos, prompts = draw(VIDEOS, seed=1)
    vae = train_vae(videos, work, device)
    latents = encode(vae, videos, work / "wan_latents.safetensors", device)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=[round(m, 4) for m in mean.tolist()], latents_std=[round(s, 4) for s in std.tolist()])
    pipeline = assemble(vae)
    train_flow(pipeline, (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1), prompts, work, device)
    pipeline.to("cpu").save_pretrained(out / "wan", safe_serialization=True)
    quality = measure(pipeline)
    (out / "wan" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("wan:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


def write_prompts(out: Path) -> None:
    """Write `out`/moving_train.jsonl and moving_test.jsonl: every record once."""
    out.mkdir(parents=True, exist_ok=True)
    for name, test in (("train", False), ("test", True)):
        rows = [{"prompt": scenes.describe(record)} | record for record in moving_scenes.records(test)]
        (out / f"moving_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """(N, F, 3, 64, 64) uint8 videos of `count` train records, and their prompts."""
    rng, known = random.Random(seed), moving_scenes.records(test=False)
    drawn = [rng.choice(known) for _ in range(count)]
    shown = [moving_scenes.render(moving_scenes.lay_out(record, rng)) for record in tqdm(drawn, "videos", leave=False)]
    videos = torch.stack([torch.from_numpy(video).permute(0, 3, 1, 2) for video in shown])
    return videos.contiguous(), [scenes.describe(record) for record in drawn]


@torch.no_grad()
def measure(pipeline: Any, count: int = MEASURED) -> dict[str, float]:
    """On held-out prompts, per setting: `strict`, the share of frames that show what they should, and `motion`, how far it goes where."""
    records = list(islice(cycle(moving_scenes.records(test=True)), count))
    texts = [scenes.describe(record) for record in records]
    latents = torch.randn(count, CHANNELS, 5, 8, 8, generator=torch.Generator().manual_seed(9))
    size = {"height": scenes.SIZE, "width": scenes.SIZE, "num_frames": moving_scenes.FRAMES, "max_sequence_length": TOKENS}
    pipeline.set_progress_bar_config(disable=True)
    report: dict[str, float] = {}
    for steps, guidance in SETTINGS:
        call = size | {"num_inference_steps": steps, "guidance_scale": guidance, "latents": latents.clone(), "output_type": "pt"}
        videos = pipeline(prompt=texts, **call)[0].float()
        name = f"{steps}_steps_guidance_{guidance:g}"
        report[f"strict_{name}"] = strict(videos.flatten(0, 1), [r for r in records for _ in range(videos.shape[1])]).mean().item()
        report[f"motion_{name}"] = Motion().score(RewardInput(videos, texts, list(records))).scores.mean().item()
    return report


# --- parts -------------------------------------------------------------------------------------------------------------


def assemble(vae: AutoencoderKLWan) -> WanPipeline:
    """The pipeline around a VAE, its other parts untrained."""
    words = {word for test in (False, True) for record in moving_scenes.records(test) for word in scenes.describe(record).split()}
    tokenizer = word_tokenizer(sorted(words))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, shift_terminal=0.2)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": small_text_encoder(len(tokenizer)), "vae": vae}
    return WanPipeline(**parts, scheduler=scheduler, transformer=small_transformer())


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends with </s> and pads like T5's."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=STOCK_TOKENS
    )


def small_text_encoder(tokens: int) -> UMT5EncoderModel:
    size: dict[str, Any] = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 2 * TEXT_WIDTH, "num_layers": 1, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=tokens, dropout_rate=0.0, **size))


def small_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        num_layers=4,
        rope_max_seq_len=32,
    )


def small_vae(width: int = 32) -> AutoencoderKLWan:
    """Untrained; its residual blocks are the identity (or their shortcut) at first."""
    vae = AutoencoderKLWan(
        base_dim=width,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
    return vae


# --- stage 1: videos to latents ----------------------------------------------------------------------------------------


def train_vae(videos: Tensor, work: Path, device: torch.device) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae: Any = small_vae()
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    progress = Progress(work / "wan_vae.pt", {"vae": vae, "optimizer": optimizer})
    ground = as_input(torch.tensor(scenes.GROUND, dtype=torch.uint8).view(1, 1, 3, 1, 1), device)
    for step in progress.steps(VAE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_fall(step, VAE_STEPS, hold=0.3)
        target = as_input(crops(videos, VAE_BATCH), device)
        with torch.autocast(device.type, torch.bfloat16):
            drawn = vae.decode(vae.encode(target).latent_dist.mode()).sample.float()
        ink = (target - ground).abs().amax(1, keepdim=True) > EDGE
        loss = ((1 + INK * ink) * ((drawn - target).abs() + (drawn - target).square())).mean()
        descend(loss, vae, [optimizer])
        progress.note = {"loss": loss.item()}
    return vae.eval().requires_grad_(False)


def crops(videos: Tensor, count: int) -> Tensor:
    """(count, F, 3, CROP, CROP) of random videos, each with some pixel of its shape inside, aligned with the latents."""
    chosen = videos[torch.randint(len(videos), (count,))]
    ground = torch.tensor(scenes.GROUND, dtype=torch.uint8).view(3, 1, 1)
    moved = (chosen != ground).flatten(1, 2).any(1).flatten(1).float()
    at = moved.multinomial(1)[:, 0]
    inside = torch.stack([at // scenes.SIZE, at % scenes.SIZE], 1) - torch.randint(CROP, (count, 2))
    corners = (inside.clamp(0, scenes.SIZE - CROP) // 8 * 8).tolist()
    return torch.stack([video[..., top : top + CROP, left : left + CROP] for video, (top, left) in zip(chosen, corners, strict=True)])


def as_input(videos: Tensor, device: torch.device) -> Tensor:
    """(N, F, 3, H, W) uint8 to (N, 3, F, H, W) in [-1, 1]."""
    return videos.to(device).transpose(1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, videos: Tensor, cache: Path, device: torch.device) -> Tensor:
    """(N, 16, 5, 8, 8) float32 means of the posterior; kept in a file, since a resumed run needs them again."""
    if not cache.exists():
        chunks = tqdm(videos.split(64), "latents", leave=False)
        latents = [vae.encode(as_input(chunk, device)).latent_dist.mode().cpu() for chunk in chunks]
        save_file({"latents": torch.cat(latents).contiguous()}, cache)
    return load_file(cache)["latents"]


# --- stage 2: prompts to latents ---------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Transformer and text encoder as one module: what stage 2 trains, averages and saves."""

    def __init__(self, pipeline: WanPipeline):
        super().__init__()
        self.transformer, self.text_encoder = pipeline.transformer, pipeline.text_encoder

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
        """Velocity (B, 16, 5, 8, 8) as WanPipeline computes it, zeros for a prompt's padding to `tokens`, with gradients into the text."""
        text = self.text_encoder(ids, mask)[0] * mask[..., None]
        return self.transformer(x, sigma * 1000, F.pad(text, (0, 0, 0, tokens - text.shape[1])), return_dict=False)[0]


def train_flow(pipeline: WanPipeline, latents: Tensor, prompts: list[str], work: Path, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Denoiser(pipeline).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = muon_and_adamw(model, model.transformer.blocks)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    text = pipeline.tokenizer([*prompts, ""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    progress = Progress(work / "wan_flow.pt", {"model": model, "average": average} | optimizers)
    for step in progress.steps(FLOW_STEPS):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * warm_then_fall(step, FLOW_STEPS, hold=0.5)
        stock = step % 10 == 9
        index = torch.randint(len(prompts), (STOCK_BATCH if stock else BATCH,))
        named = torch.where(torch.rand(len(index)) < 0.1, len(prompts), index)  # the last prompt is the empty one
        x0 = latents[index].to(device)
        noise = torch.randn_like(x0)
        sigma = shifted(torch.sigmoid(torch.randn(len(index), device=device)), SHIFT)
        mixed = (1 - sigma.view(-1, 1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1, 1) * noise
        ids, mask = text.input_ids[named].to(device), text.attention_mask[named].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(mixed, sigma, ids, mask, STOCK_TOKENS if stock else TOKENS)
        loss = F.mse_loss(velocity.float(), noise - x0)
        descend(loss, model, optimizers.values())
        follow(average, model, step, 0.998)
        if not stock:
            progress.note = {"loss": progress.smoothed("loss", loss.item(), 0.98)}
    pipeline.register_modules(transformer=average.transformer, text_encoder=average.text_encoder)
