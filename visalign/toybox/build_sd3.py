"""The toybox's `StableDiffusion3Pipeline`: a 4× VAE, a small MMDiT, two tiny CLIP text encoders and a one-layer T5.

Trained in two stages: the VAE on pictures, then transformer and text encoders together on cached latents (flow matching, logit-normal
times, prompts dropped in one of ten). A small share of the steps sees the stock pipeline's 256 T5 tokens, so that stock calls draw as well.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from visalign.schedules import shifted
from visalign.toybox import scenes
from visalign.toybox.pretrain import Pictures, Progress, compiled, descend, draw, follow, muon_and_adamw, warm_then_fall

WIDTH = 128  # of the joint text sequence, and of the transformer
CLIP_TOKENS, T5_TOKENS, STOCK_T5_TOKENS = 14, 10, 256
VAE_STEPS, FLOW_STEPS, PICTURES = 800, 13500, 36000
SHIFT = 2.0  # towards high noise, in training and sampling: flat shapes stay visible under noise that hides a photograph


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train what isn't trained yet and save the pipeline to `out`/sd3."""
    torch.manual_seed(0)
    pictures = draw(PICTURES, seed=1)
    vae = train_vae(pictures, work, device)
    latents = encode(vae, pictures, work / "latents.safetensors", device)
    scale, shift = round(1 / latents.std().item(), 4), round(latents.mean().item(), 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    latents = (latents - shift) * scale
    pipeline = assemble(vae)
    train_flow(pipeline, latents, pictures.prompts, work, device)
    pipeline.save_pretrained(out / "sd3", safe_serialization=True)


def assemble(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The pipeline around a VAE, its other parts untrained."""
    return StableDiffusion3Pipeline(
        vae=vae,
        # The last sigma before 0 is 0.2: without it, a stock grid of N steps wastes one of them below sigma = 0.002.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, shift_terminal=0.2),
        transformer=small_transformer(),
        text_encoder=small_clip(),
        text_encoder_2=small_clip(),
        text_encoder_3=small_t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


# --- parts -------------------------------------------------------------------------------------------------------------


def words() -> list[str]:
    """Every word of the toybox's prompts and a few that people add, in a fixed order."""
    seen = {word for m in scenes.compositions() for word in scenes.describe(m).split()}
    return sorted(seen | {"an", "the", "picture", "photo", "of", "with", "one", "no", "and", "shape", "shapes", "pictures", "."})


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with each toybox word as one token and letters for the rest; the end token has the highest id."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-:;()")
    vocabulary = [*letters, *(c + "</w>" for c in letters), *(w for w in words() if w not in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_TOKENS)
    tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=True) for w in words() if w not in letters])
    assert len(tokenizer) == len(vocabulary), "a word got an id above the end token's"
    return tokenizer


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends with </s> and pads like T5's."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=STOCK_T5_TOKENS
    )


def small_clip() -> CLIPTextModelWithProjection:
    size = len(clip_tokenizer())
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=WIDTH // 2,
            intermediate_size=WIDTH * 2,
            projection_dim=WIDTH // 2,
            num_hidden_layers=3,  # SD3 reads the last but one
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )


def small_t5() -> T5EncoderModel:
    tokens = len(t5_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=tokens, d_model=WIDTH, d_kv=32, d_ff=WIDTH, num_layers=1, num_heads=4, dropout_rate=0.0))


def small_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def small_vae() -> AutoencoderKL:
    levels: dict[str, Any] = {  # diffusers annotates them as tuples of one
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


# --- stage 1: pictures to latents --------------------------------------------------------------------------------------


def train_vae(pictures: Pictures, work: Path, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(0)
    vae: Any = small_vae()
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    progress = Progress(work / "vae.pt", {"vae": vae, "optimizer": optimizer})
    for step in progress.steps(VAE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_fall(step, VAE_STEPS, hold=0.3)
        target = pictures.batch(torch.randint(len(pictures.prompts), (32,))).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            drawn = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(drawn, target) + F.mse_loss(drawn, target) + 1e-4 * posterior.kl().float().mean() / scenes.SIZE
        descend(loss, vae, [optimizer])
        progress.note = {"loss": loss.item()}
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: Any, pictures: Pictures, cache: Path, device: torch.device) -> Tensor:
    """(N, 4, 16, 16) float32 means of the posterior; kept in a file, since a resumed run needs them again."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        chunks = tqdm(torch.arange(len(pictures.prompts)).split(256), "latents", leave=False)
        latents = [vae.encode(pictures.batch(c).to(device) * 2 - 1).latent_dist.mode().cpu() for c in chunks]
        save_file({"latents": torch.cat(latents).contiguous()}, cache)
    return load_file(cache)["latents"]


# --- stage 2: prompts to latents ---------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Transformer and text encoders as one module: what stage 2 trains, averages and saves."""

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__()
        self.transformer = pipeline.transformer
        self.clips = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.t5 = pipeline.text_encoder_3

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity (B, 4, 16, 16) as StableDiffusion3Pipeline computes it, with gradients into the text encoders."""
        outputs = [clip(clip_ids, output_hidden_states=True) for clip in self.clips]
        sequence = torch.cat([out.hidden_states[-2] for out in outputs], -1)
        pooled = torch.cat([out.text_embeds for out in outputs], -1)
        context = torch.cat([sequence, self.t5(t5_ids)[0]], 1)
        return self.transformer(x, context, pooled, sigma * 1000, return_dict=False)[0]


def train_flow(pipeline: StableDiffusion3Pipeline, latents: Tensor, prompts: list[str], work: Path, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Denoiser(pipeline).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = muon_and_adamw(model, model.transformer.transformer_blocks)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    clip_ids = pipeline.tokenizer([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    t5_ids = pipeline.tokenizer_3(
        [*prompts, ""], padding="max_length", max_length=STOCK_T5_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    for block in model.transformer.transformer_blocks:
        compiled(block)
    progress = Progress(work / "flow.pt", {"model": model, "average": average} | optimizers)
    for step in progress.steps(FLOW_STEPS):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * warm_then_fall(step, FLOW_STEPS, hold=0.75)
        stock = step % 25 == 24
        index = torch.randint(len(prompts), (24 if stock else 64,))
        named = torch.where(torch.rand(len(index)) < 0.1, len(prompts), index)  # the last prompt is the empty one
        x0 = latents[index].to(device)
        noise = torch.randn_like(x0)
        sigma = shifted(torch.sigmoid(torch.randn(len(index), device=device)), SHIFT)
        mixed = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
        ids = t5_ids[named, : STOCK_T5_TOKENS if stock else T5_TOKENS]
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(mixed, sigma, clip_ids[named].to(device), ids.to(device))
        loss = F.mse_loss(velocity.float(), noise - x0)
        descend(loss, model, optimizers.values())
        follow(average, model, step, 0.999)
        if not stock:
            progress.note = {"loss": 0.98 * progress.note.get("loss", loss.item()) + 0.02 * loss.item()}
    pipeline.transformer, pipeline.text_encoder_3 = average.transformer, average.t5
    pipeline.text_encoder, pipeline.text_encoder_2 = average.clips[0], average.clips[1]
