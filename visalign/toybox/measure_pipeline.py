"""How good the toybox's pipelines are: strict accuracy on held-out compositions, by the verifier and by the second judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.scoring import RewardInput
from visalign.toybox import scenes
from visalign.toybox.judge import SecondJudge
from visalign.toybox.perception import CLEAN, look

PICTURES, BATCH = 258, 43
Setting = tuple[int, float]  # denoising steps and guidance


@torch.no_grad()
def measure(pipeline: Any, settings: Sequence[Setting], count: int = PICTURES, **options: Any) -> dict[str, float]:
    """`strict` and `second_judge` in [0, 1] for each setting, such as "strict_10_steps_guidance_3"; the same prompts and noise for all.

    Args:
        pipeline: a text-to-image pipeline of diffusers that draws 64 × 64 pictures; its stock call is measured.
        count: pictures per setting; the six kinds of prompts in equal shares.
        options: further arguments of the call.
    """
    rng, judge = random.Random(9), SecondJudge()
    by_kind = scenes.prompts(test=True)
    records = [rng.choice(by_kind[scenes.KINDS[n % len(scenes.KINDS)]]) for n in range(count)]
    texts = [scenes.describe(record) for record in records]
    noise = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    report: dict[str, float] = {}
    for steps, guidance in settings:
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"} | options
        rows = [slice(n, n + BATCH) for n in range(0, count, BATCH)]
        images = torch.cat([pipeline(prompt=texts[r], latents=noise[r].clone(), **call).images.cpu().float() for r in rows])
        name = f"{steps}_steps_guidance_{guidance:g}"
        report[f"strict_{name}"] = strict(images, records).mean().item()
        report[f"second_judge_{name}"] = judge.score(RewardInput(images, texts, list(records))).scores.mean().item()
    return report


def strict(images: Tensor, records: Sequence[scenes.Metadata]) -> Tensor:
    """(N,) 1 where a picture (N, 3, H, W) shows exactly what its record says and is clean, else 0: `rewards/toybox.py`'s strict score."""
    views = zip(look(images), records, strict=True)
    return torch.tensor([scenes.meets(view.objects, record)[0] * (view.blemish <= CLEAN) for view, record in views])
