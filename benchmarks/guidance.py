"""`python -m benchmarks.guidance [METHOD …] [--seeds 0,1,2] [--prompts 36] [--aligned RUN] [--only-table]`: guided sampling at equal cost.

Every method of `visalign/steering/` draws the same test prompts of the toybox with the same noise, guided by one reward, for multiples of
the plain sampler's NFE (a backward counts as two forwards), and for multiples of its seconds. The verifier and the second judge only judge.
Each run is one file, results/guidance/METHOD-KIND-MULTIPLE-SEED.json; one that is there and was made with the same settings is not run
again, so the command goes on where it was stopped. From all files that exist it then writes benchmarks/guidance.md and its plot.

Seconds are those of the whole batch on this machine, scoring included: run it alone. `hybrid` needs a policy that has learned something:
with --aligned RUN it is drawn beside that run's plain pictures, at the plain cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import guidance_page, records
from benchmarks.machine import describe
from visalign import api, drawing, prompts, registry
from visalign.drawing import Result
from visalign.policy import Policy

FOLDER = records.RESULTS / "guidance"
STEPS, GUIDANCE, PICTURES = 8, 1.0, 2  # of the sampler, and per prompt
NFE, SECONDS = (1, 4, 32), (8,)  # multiples of the plain sampler's cost
REWARD: dict[str, Any] = {"vlm_yes": {"use": "vlm_yes", "checkpoint": "toybox/vlm"}}
JUDGES: dict[str, Any] = {
    "strict": {"use": "toybox", "form": "strict"},
    "second_judge": {"use": "visalign.toybox.judge:SecondJudge"},
    "diversity": {"use": "diversity", "checkpoint": "toybox/dino"},
}
PRECISION = "bf16"  # of the toybox; a run's own recipe says its
SCALES = (2.0, 3.0, 4.5)  # of classifier-free guidance, for plain pictures of twice the cost


class Bench:
    """The toybox with its prompts, reward and judges, and the runs that have been made on it.

    Args:
        folder: of the runs.
        count: prompts.
        batch: latents per forward.
    """

    def __init__(self, folder: Path, count: int, batch: int = 128):
        drawn = prompts.load("toybox/prompts_test.jsonl").evaluation(count, "tag")
        self.folder, self.texts, self.metadata, self.batch = folder, drawn.texts, drawn.metadata, batch
        self.policies: dict[str, Policy] = {}
        self.panel, self.judges = api.panel(REWARD), api.panel(JUDGES)
        self.settings = {"reward_options": REWARD, "prompts": count, "pictures": PICTURES, "steps": STEPS, "precision": PRECISION}

    def run(self, method: str, kind: str, multiple: int, seed: int, model: str = "toybox", guidance: float = GUIDANCE) -> dict[str, Any]:
        """One method with one budget and seed: from its file, or drawn now."""
        label, file = label_of(method, model, guidance), self.folder / file_name(method, kind, multiple, seed, model, guidance)
        made = self.settings | {"model": model, "guidance": guidance, "method": method}
        mark = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
        if file.is_file() and (there := records.read(file))["settings"] == mark:
            return there
        cost = STEPS * (1 if guidance == GUIDANCE else 2)
        limit = multiple * cost if kind == "nfe" else multiple * self.run("plain", "nfe", 1, seed)["seconds"]
        result = self.draw(method, {kind: limit}, seed, model, guidance)
        head = {"name": label, "kind": kind, "multiple": multiple, "seed": seed, "settings": mark, "limit": limit} | self.settings
        records.write(file, head | describe() | figures(result) | {"trace": result.trace[-1:]})
        return records.read(file)

    def draw(self, method: str, budget: dict[str, float], seed: int, model: str, guidance: float) -> Result:
        if model not in self.policies:
            self.policies[model] = api.load(model, "cpu", **({} if Path(model).is_dir() else {"precision": PRECISION}))
        sampler: dict[str, Any] = {"steps": STEPS, "guidance": guidance, "seed": seed, "batch": self.batch}
        return drawing.sample(
            self.policies[model],
            self.texts,
            self.panel,
            method,
            PICTURES,
            **sampler,
            budget=budget,
            judges=self.judges,
            metadata=self.metadata,
            progress=True,
        )


def label_of(method: str, model: str, guidance: float) -> str:
    label = method if guidance == GUIDANCE else f"{method} at guidance {guidance:g}"
    return label if model == "toybox" else f"{label} of an aligned policy"


def file_name(method: str, kind: str, multiple: int, seed: int, model: str, guidance: float) -> str:
    return f"{label_of(method, model, guidance).replace(' ', '_')}-{kind}-{multiple}-{seed}.json"


def figures(result: Result) -> dict[str, float]:
    """Means over pictures, and what they cost."""
    means = {name: values.nanmean().item() for name, values in (result.scores | result.held_out).items() if name != "total"}
    means["reward"] = means.pop(next(iter(REWARD)))
    costs = {"nfe": result.nfe, "nfe_backward": result.nfe_backward, "seconds": result.seconds}
    costs["reward_calls"] = result.reward_calls / len(result.images)
    return {name: records.rounded(value) for name, value in (means | costs).items()}


def jobs(methods: list[str], seeds: list[int], aligned: str | None) -> list[tuple[Any, ...]]:
    """What is to be run, cheap first: (method, kind, multiple, seed, model, guidance)."""
    found: list[tuple[Any, ...]] = [("plain", "nfe", 1, seed, "toybox", GUIDANCE) for seed in seeds]
    found += [("plain", "nfe", 1, seed, "toybox", scale) for scale in SCALES for seed in seeds]
    if aligned:
        found += [(method, "nfe", 1, seed, aligned, GUIDANCE) for method in ("plain", "hybrid") for seed in seeds]
    searches = [method for method in methods if method not in ("plain", "hybrid")]
    for kind, multiples in (("nfe", NFE[1:]), ("seconds", SECONDS)):
        found += [(method, kind, multiple, seed, "toybox", GUIDANCE) for multiple in multiples for seed in seeds for method in searches]
    return found


def main() -> None:
    known = registry.names("steering")
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=known, metavar="METHOD")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--prompts", type=int, default=36, help="of six kinds, so a multiple of six")
    parser.add_argument("--aligned", help="a run folder, for the hybrid sampler")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--only-table", action="store_true")
    parsed = parser.parse_args()
    if unknown := set(parsed.methods) - set(known):
        parser.error(f"no method {', '.join(sorted(unknown))}; there is: {', '.join(known)}")
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    if not parsed.only_table:
        bench = Bench(FOLDER, parsed.prompts)
        for job in tqdm(jobs(parsed.methods, [int(seed) for seed in parsed.seeds.split(",")], parsed.aligned), unit="run"):
            bench.run(*job)
    guidance_page.write(FOLDER)


if __name__ == "__main__":
    main()
