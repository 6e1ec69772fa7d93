"""`python benchmarks/verifier.py [COUNT]`: how far both judges of the toybox can be trusted; writes benchmarks/results/verifier.json.

Fresh scenes (half train, half held-out compositions) are drawn by both renderers. A judge should accept each with its own prompt and refuse
it with one attribute changed. Pictures that show no scene should get nothing from the verifier, and close to nothing from the second judge.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from visalign.rewards.toybox import Toybox
from visalign.scoring import Panel, Reward, RewardInput, RewardOutput
from visalign.toybox import scenes
from visalign.toybox.build_judge import as_scene, render_smooth
from visalign.toybox.judge import SecondJudge

SEED = 20_000  # no training seed comes near


def main(count: int = 2400) -> None:
    rng = random.Random(SEED)
    records = [rng.choice(scenes.prompts(n % 2 == 1)[scenes.KINDS[n // 2 % 6]]) for n in range(count)]
    layouts = [scenes.lay_out(record, rng) for record in records]
    altered = [scenes.alter(record, rng) for record in records]
    sharp = torch.stack([torch.from_numpy(scenes.to_array(scenes.render(layout)).copy()).permute(2, 0, 1) / 255 for layout in layouts])
    noise = torch.Generator().manual_seed(SEED)
    smooth = torch.cat([render_smooth(as_scene(layouts[n : n + 100]), noise) for n in range(0, count, 100)])
    soft = (gaussian_blur(sharp, [7, 7], [0.7, 0.7]) + 0.03 * torch.randn(sharp.shape, generator=noise)).clamp(0, 1)
    # Off both axes by more than 30 degrees an object is both left and above: such a change leaves the prompt true.
    false = [n for n, (_, record) in enumerate(altered) if not scenes.meets(layouts[n], record)[0]]
    result: dict[str, object] = {"count": count, "changes_that_stay_true": count - len(false)}
    for name, judge in (("verifier", Toybox(form="strict")), ("second_judge", SecondJudge())):
        rows: dict[str, object] = {}
        for style, images in (("own renderer", sharp), ("smooth renderer", smooth), ("blur 0.7 and noise 0.03", soft)):
            rows[style] = figures(judge, images, records, altered, false)
        rows["no scene"] = {kind: worst(judge, images, records) for kind, images in degenerate(sharp[:200], noise).items()}
        result[name] = rows
    Toybox().score(batch(sharp[:8], records[:8]))
    start = time.process_time()
    Toybox().score(batch(sharp, records))
    result["verifier_ms_per_picture"] = round((time.process_time() - start) / count * 1000, 2)
    text = json.dumps(result, indent=2)
    (Path(__file__).parent / "results" / "verifier.json").write_text(text + "\n")
    print(text)


def figures(
    judge: Reward, images: Tensor, records: list[scenes.Metadata], altered: list[tuple[str, scenes.Metadata]], false: list[int]
) -> dict[str, float]:
    """Shares of pictures accepted: with their own prompts, and with altered ones by what was altered."""
    accepted = score(judge, images, records).scores
    fooled = score(judge, images[false], [altered[n][1] for n in false]).scores
    shares = {"true": accepted.mean().item(), "altered": fooled.mean().item()}
    for what in ("shape", "colour", "count", "relation"):
        shares[what] = fooled[[k for k, n in enumerate(false) if altered[n][0] == what]].mean().item()
    return {name: round(value, 4) for name, value in shares.items()}


def worst(judge: Reward, images: Tensor, records: list[scenes.Metadata]) -> dict[str, float]:
    """The highest scores of pictures that show nothing."""
    output = score(judge, images, records[: len(images)])
    parts = {"score": output.scores} | output.components
    return {name: round(value.max().item(), 4) for name, value in parts.items()} | {"mean": round(output.scores.mean().item(), 4)}


def degenerate(images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Pictures without a scene, and scenes that are out of the world: (N, 3, 64, 64) each."""
    count, size = len(images), scenes.SIZE
    plain = ((images - 128 / 255).abs().amax(1, keepdim=True) < 0.01).float()
    block = torch.tensor([scenes.GROUND, *scenes.COLOURS.values()])[torch.randint(9, (count, 8, 8), generator=rng)] / 255
    blot = torch.rand(count, 3, 8, 8, generator=rng)
    return {
        "blank": torch.full_like(images, 128 / 255),
        "white": torch.ones_like(images),
        "uniform noise": torch.rand(images.shape, generator=rng),
        "normal noise": (0.5 + 0.3 * torch.randn(images.shape, generator=rng)).clamp(0, 1),
        "tiled": F.interpolate(images, (size // 2, size // 2), mode="bilinear", antialias=True).repeat(1, 1, 2, 2),
        "palette blocks": F.interpolate(block.permute(0, 3, 1, 2), size=(size, size), mode="nearest"),
        "many colours": F.interpolate(blot, (size, size), mode="bicubic").clamp(0, 1),
        "orange ground": images * (1 - plain) + plain * torch.tensor([0.9, 0.55, 0.2])[:, None, None],
        "pale objects": 0.5 + 0.4 * (images - 0.5),
        "blur of 3 pixels": gaussian_blur(images, [13, 13], [3.0, 3.0]),
    }


def batch(images: Tensor, records: list[scenes.Metadata]) -> RewardInput:
    return RewardInput(images, [scenes.describe(record) for record in records], list(records))


def score(judge: Reward, images: Tensor, records: list[scenes.Metadata]) -> RewardOutput:
    return Panel({"judge": (judge, 1.0)}).score(batch(images, records)).outputs["judge"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
