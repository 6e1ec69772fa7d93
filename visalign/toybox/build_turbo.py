"""The toybox's few-step student of `sd3/`: the same pipeline, whose transformer draws in one step what its teacher draws in eight.

Two losses share every batch, because the first alone blurs and the second alone forgets what the teacher draws:

1. Regression, by absolute error, on the teacher's own pictures from the same noise (InstaFlow, arXiv 2309.06380).
2. Latent adversarial distillation (arXiv 2403.12015): heads on the frozen teacher's features, at random noise levels and told the prompt,
   tell the student's latents from real scenes. Real scenes with another scene's prompt count as false, too. Unlike there, the gradient of
   this loss is scaled to a fixed share of the first one's: no weight has to be found.

Some rows of a batch start from noised scenes instead of noise, so that the student can also draw in a few steps.
"""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from visalign.toybox import scenes
from visalign.toybox.build_sd3 import PICTURES, SHIFT, STOCK_T5_TOKENS, T5_TOKENS, WIDTH, encode
from visalign.toybox.measure_pipeline import measure
from visalign.toybox.pretrain import Progress, compiled, descend, draw, follow, warm_then_fall

PAIRS, CHUNK = 6144, 128  # pictures that the teacher draws, and how many at a time
TEACHER_STEPS, GUIDANCE = 8, 3.0
STEPS, ADVERSARIAL_FROM = 1800, 600
Rows = tuple[int, int, int]  # of a batch: teacher's noise, fresh noise, noised scenes
WARM_ROWS: Rows = (40, 0, 8)  # before the second loss, which alone learns from fresh noise
ROWS: Rows = (16, 24, 8)
LEAST_NOISE = 0.25  # of noised scenes
RATE, HEAD_RATE = 3e-4, 1e-3
ADVERSARIAL = 1.0  # size of its gradient at a picture, over that of the absolute error
MEASURED = ((1, 1.0), (2, 1.0), (4, 1.0))


def build(out: Path, work: Path, device: torch.device) -> None:
    """Draw the teacher's pictures, train what isn't trained yet, save the student to `out`/turbo with its measured quality."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(out / "sd3")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    pictures = draw(PICTURES, seed=1)
    vae = pipeline.vae.config
    real = (encode(pipeline.vae, pictures, work / "latents.safetensors", device) - vae.shift_factor) * vae.scaling_factor
    data = Data(*teach(pipeline, work / "turbo_pairs", device), real, pictures.prompts)
    train(pipeline, data, work, device)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)  # the teacher's shift_terminal has no grid of one step
    pipeline.to("cpu").save_pretrained(out / "turbo", safe_serialization=True)
    quality = measure(pipeline, MEASURED, max_sequence_length=T5_TOKENS)
    quality |= {f"{name}_stock_tokens": value for name, value in measure(pipeline, MEASURED[:1]).items()}
    (out / "turbo" / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print("turbo:", ", ".join(f"{name} {value:.3f}" for name, value in quality.items()))


# --- what it learns from -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The teacher's pairs `noise`, `drawn` (P, 4, 16, 16) with their `prompts`, and `real` scenes (N, 4, 16, 16) with theirs."""

    noise: Tensor
    drawn: Tensor
    prompts: list[str]
    real: Tensor
    real_prompts: list[str]


@torch.no_grad()
def teach(pipeline: Any, cache: Path, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Noise and what the teacher draws from it, (PAIRS, 4, 16, 16) each, and the prompts; kept in files, so that it can be resumed."""
    cache.mkdir(parents=True, exist_ok=True)
    rng, by_kind = random.Random(21), scenes.prompts(test=False)
    prompts = [scenes.describe(rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]])) for n in range(PAIRS)]
    noise = torch.randn(PAIRS, 4, 16, 16, generator=torch.Generator().manual_seed(21))
    drawn: list[Tensor] = []
    for first in tqdm(range(0, PAIRS, CHUNK), "teacher"):
        file, rows = cache / f"{first}.safetensors", slice(first, first + CHUNK)
        if not file.exists():
            call = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": GUIDANCE, "max_sequence_length": T5_TOKENS}
            with torch.autocast(device.type, torch.bfloat16):
                found = pipeline(prompt=prompts[rows], latents=noise[rows].to(device), output_type="latent", **call).images
            save_file({"drawn": found.float().cpu().contiguous()}, file)
        drawn.append(load_file(file)["drawn"])
    return noise, torch.cat(drawn), prompts


class Texts:
    """What the frozen text encoders say of prompts, each encoded once."""

    def __init__(self, pipeline: Any, prompts: list[str], device: torch.device):
        self.pipeline, self.device = pipeline, device
        unique = list(dict.fromkeys(prompts))
        self.row = {prompt: n for n, prompt in enumerate(unique)}
        pieces = [self.encoded(unique[n : n + 256], T5_TOKENS) for n in range(0, len(unique), 256)]
        self.sequence, self.pooled = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    def __call__(self, prompts: list[str], stock: bool = False) -> tuple[Tensor, Tensor]:
        """(B, L, D) and (B, D); with `stock`, as many T5 tokens as a stock call has."""
        if stock:
            return self.encoded(prompts, STOCK_T5_TOKENS)
        rows = torch.tensor([self.row[prompt] for prompt in prompts], device=self.device)
        return self.sequence[rows], self.pooled[rows]

    @torch.no_grad()
    def encoded(self, prompts: list[str], tokens: int) -> tuple[Tensor, Tensor]:
        options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": tokens}
        sequence, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, **options)
        return sequence, pooled


# --- the critic --------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Heads on the features of all but the last block of the frozen teacher, one number per 2 × 2 latents each."""

    def __init__(self, teacher: SD3Transformer2DModel):
        super().__init__()
        self.teacher = [teacher]  # in a list: no part of this module's state
        half = WIDTH // 2
        self.heads = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, half, 3, padding=1), nn.SiLU(), nn.Conv2d(half, 1, 1))
            for _ in teacher.transformer_blocks[:-1]
        )

    def forward(self, x: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
        """(B, heads · 64) of clean latents (B, 4, 16, 16), noised by levels of its own choice; high where they look real."""
        teacher: Any = self.teacher[0]
        sigma = torch.sigmoid(torch.randn(len(x), device=x.device))
        level = sigma.view(-1, 1, 1, 1)
        hidden = teacher.pos_embed((1 - level) * x + level * torch.randn_like(x))
        time, context = teacher.time_text_embed(sigma * 1000, texts[1]), teacher.context_embedder(texts[0])
        said: list[Tensor] = []
        for block, head in zip(teacher.transformer_blocks, self.heads, strict=False):
            context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=time)
            side = math.isqrt(hidden.shape[1])
            said.append(head(hidden.mT.unflatten(2, (side, side))).flatten(1))
        return torch.cat(said, 1).float()


# --- training ----------------------------------------------------------------------------------------------------------


def train(pipeline: Any, data: Data, work: Path, device: torch.device) -> None:
    """Train a copy of the pipeline's transformer; the pipeline gets its average."""
    torch.manual_seed(0)
    teacher = pipeline.transformer.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    average = copy.deepcopy(teacher)
    critic, texts = Critic(teacher).to(device), Texts(pipeline, data.prompts + data.real_prompts, device)
    optimizer = torch.optim.AdamW(student.parameters(), RATE, (0.5, 0.98), weight_decay=0.01)
    judging = torch.optim.AdamW(critic.parameters(), HEAD_RATE, (0.5, 0.98), weight_decay=0.01)
    for block in student.transformer_blocks:
        compiled(block)
    parts = {"student": student, "average": average, "critic": critic, "optimizer": optimizer, "judging": judging}
    progress = Progress(work / "turbo.pt", parts)
    for step in progress.steps(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * warm_then_fall(step, STEPS, hold=0.6)
        rows = WARM_ROWS if step < ADVERSARIAL_FROM else ROWS
        start, sigma, wanted, prompts = batch(data, rows, device)
        with torch.autocast(device.type, torch.bfloat16):
            sequence, pooled = texts(prompts, stock=step % 25 == 24)
            velocity = student(start, sequence, pooled, sigma * 1000, return_dict=False)[0].float()
        drawn = start - sigma.view(-1, 1, 1, 1) * velocity
        known = [*range(rows[0]), *range(rows[0] + rows[1], len(drawn))]
        error = (drawn[known] - wanted).abs().mean((1, 2, 3)).sum() / len(drawn)
        push = torch.zeros_like(drawn)
        note = {"error": error.item()}
        if step >= ADVERSARIAL_FROM:
            push, judged = adversarial(critic, judging, drawn.detach(), texts, prompts, data)
            note |= judged
        descend(error + (drawn * push).sum(), student, [optimizer])
        follow(average, student, step, 0.995)
        progress.note = {name: progress.smoothed(name, value, 0.95) for name, value in note.items()}
    pipeline.register_modules(transformer=average)


def batch(data: Data, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """What the student starts from (B, 4, 16, 16), its σ (B,), where it should end as far as that is known, and the prompts.

    It isn't known of the fresh noise, whose rows are left out there.
    """
    paired, fresh, noised = rows
    pair, scene = torch.randint(len(data.noise), (paired,)), torch.randint(len(data.real), (fresh + noised,))
    real, noise = data.real[scene[fresh:]], torch.randn(fresh + noised, *data.real.shape[1:])
    sigma = torch.cat([torch.ones(paired + fresh), LEAST_NOISE + (1 - LEAST_NOISE) * torch.rand(noised)])
    level = sigma[paired + fresh :].view(-1, 1, 1, 1)
    start = torch.cat([data.noise[pair], noise[:fresh], (1 - level) * real + level * noise[fresh:]])
    wanted = torch.cat([data.drawn[pair], real])
    prompts = [data.prompts[int(n)] for n in pair] + [data.real_prompts[int(n)] for n in scene]
    return start.to(device), sigma.to(device), wanted.to(device), prompts


def adversarial(
    critic: Critic, optimizer: torch.optim.Optimizer, drawn: Tensor, texts: Texts, prompts: list[str], data: Data
) -> tuple[Tensor, dict[str, float]]:
    """One step of the critic by its hinge loss, and the gradient (B, 4, 16, 16) of what it then says of the student's latents.

    Half of what the critic should refuse is drawn, the other half real scenes under other scenes' prompts.
    """
    index = torch.randint(len(data.real), (2 * len(drawn),))
    real = data.real[index].to(drawn.device)
    own = [data.real_prompts[int(n)] for n in index]
    own[len(drawn) :] = [*own[len(drawn) + 1 :], own[len(drawn)]]
    with torch.autocast(drawn.device.type, torch.bfloat16):
        true, false, drawn_too = critic(torch.cat([real, drawn]), texts(own + prompts)).chunk(3)
    loss = F.relu(1 - true).mean() + (F.relu(1 + false).mean() + F.relu(1 + drawn_too).mean()) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    x = drawn.clone().requires_grad_()
    with torch.autocast(drawn.device.type, torch.bfloat16):
        (push,) = torch.autograd.grad(-critic(x, texts(prompts)).mean(), x)
    size = push.flatten(1).norm(dim=1).mean()
    share = ADVERSARIAL / (size * math.sqrt(x[0].numel()) * len(x))  # the absolute error's gradient has norm 1/√D at a picture
    return push * share, {"critic": loss.item(), "real": true.mean().item(), "drawn": drawn_too.mean().item()}
