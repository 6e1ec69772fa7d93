"""`python -m benchmarks.stock_call`: what a plain diffusers call of the toybox loses against visalign, in strict accuracy.

The plain pipeline pads prompts to its own 256 T5 tokens; the same 128 test prompts, noise, steps and guidance.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks.machine import describe
from visalign import api, prompts, registry
from visalign.noise import gaussian
from visalign.sampling import pictures
from visalign.scoring import RewardInput

PROMPTS, CALLS = 430, [(5, 1.0), (8, 1.0), (8, 3.0)]  # steps and guidance


def main() -> None:
    drawn = prompts.load("toybox/prompts_test.jsonl").evaluation(PROMPTS, "tag")
    verifier = api.load_reward("toybox", form="strict")
    policy = api.load("toybox", device="cpu")
    plain = StableDiffusion3Pipeline.from_pretrained(registry.resolve_model("toybox"))
    plain.set_progress_bar_config(disable=True)
    rows = []
    noise = gaussian(policy.family.latent_shape, 0, drawn.noise_ids, 0)
    for steps, guidance in CALLS:
        ours = pictures(policy, drawn, steps=steps, seed=0, guidance=guidance)
        theirs = torch.cat([
            plain(
                drawn.texts[n : n + 32],
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise[n : n + 32],
                output_type="pt",
            ).images
            for n in range(0, PROMPTS, 32)
        ])  # fmt: skip
        strict = [verifier.score(RewardInput(x, drawn.texts, drawn.metadata)).scores.mean().item() for x in (ours, theirs)]
        rows.append({"steps": steps, "guidance": guidance, "visalign": round(strict[0], 4), "stock call": round(strict[1], 4)})
        print(rows[-1])
    found = {"prompts": PROMPTS, "rows": rows} | describe()
    (Path(__file__).parent / "results" / "stock_call.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
