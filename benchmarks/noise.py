"""`python -m benchmarks.noise [METHOD …] [--policy toybox/turbo] [--steps 1] [--seeds 0,1,2]`: what the initial noise is worth.

ReNO's claim (arXiv 2406.04312) in miniature: 50 iterations of noise optimisation make a few-step generator's pictures better, and by more
than as many seconds of best-of-N. HyperNoise's (arXiv 2508.09968): a network learns most of that for one forward, while the same rewards
on the generator's weights (`direct`) are hacked. All with the same rewards, prompts and first noises; the verifier and the second judge
are no part of what is optimised. Of the noise it says how far it is from fresh noise, of which 1 % lies outside the bands.

An hour and a half of one core. One file per run, results/noise/POLICY-STEPS-METHOD-SEED.json; one that is there and was made alike is
not made again. From all files of a policy it writes benchmarks/noise.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import noise_page, records
from benchmarks.machine import describe as machine
from benchmarks.records import rounded
from benchmarks.toybox import digest
from visalign import build, config, registry, sampling
from visalign.climbing import look
from visalign.config import Config
from visalign.distributed import Processes
from visalign.loop import Session
from visalign.noise import gaussian
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.scoring import Panel, RewardInput
from visalign.shifted_noise import ShiftedNoise
from visalign.steering.noise_optimization import Found, Search, Settings
from visalign.trainer import Trainer
from visalign.whiteness import band, describe

FOLDER, PAGE = records.RESULTS / "noise", Path(__file__).parent / "noise.md"
ADAPTER = {"rank": 32, "alpha": 64}
SEARCHES: dict[str, dict[str, Any]] = {  # method -> how it differs from ReNO
    "reno": {},
    "reno, short steps": {"lr": 1.25, "whiteness": 0.1},  # a noise here is a quarter as long as that of ReNO's generators
    "langevin": {"method": "langevin", "refresh": 0.05, "temperature": 0.02, "max_grad_norm": 1.0},
    "pairs": {"gradient": "antithetic", "pairs": 2},
}
TRAINED = {"hypernoise": "toybox_noise_hypernet", "direct": "toybox_reward_gradient"}  # method -> recipe
METHODS = ("none", "reno", "langevin", "best of n", "hypernoise", "direct", "reno, short steps", "pairs")


@dataclass(frozen=True)
class Given:
    """What is compared on: where, how much, and what is optimised."""

    policy: str
    steps: int
    images: int
    iterations: int
    train_seconds: float
    rewards: Mapping[str, Any]
    batch: int = 8

    def recipe(self, name: str, seed: int, **more: Any) -> Config:
        """A packaged recipe for this policy and these rewards."""
        changes = {"policy.model": self.policy, "policy.steps": self.steps, "rewards": dict(self.rewards), "run.seed": seed}
        changes |= {"eval.rewards.clip_score": 1.0, "eval.images": self.images, "run.resume": "never"}
        loaded = config.load(name, changes | more)
        return build.completed(loaded, registry.load("trainers", loaded.trainer.name).defaults)


@dataclass
class Outcome:
    """Pictures (N, 3, H, W) with the noise (N, ...) they came from, what one cost, and curves worth keeping."""

    images: Tensor
    noise: Tensor
    seconds: float
    nfe: float
    nfe_backward: float = 0.0
    reward_calls: float = 0.0
    more: dict[str, Any] = field(default_factory=dict[str, Any])


# --- methods -----------------------------------------------------------------------------------------------------------


def batches(prompts: Prompts, size: int) -> Iterator[Prompts]:
    for rows in torch.arange(len(prompts)).split(size):
        yield prompts.take(rows)


def searched(given: Given, session: Session, prompts: Prompts, changes: Mapping[str, Any]) -> Outcome:
    """Every batch's search to its end."""
    settings = Settings(iterations=given.iterations, **changes)
    search = Search(session.policy, session.rewards, settings, steps=given.steps)
    started, best, curves = time.perf_counter(), list[Found](), list[list[Tensor]]()
    for batch in batches(prompts, given.batch):
        curve: list[Tensor] = []
        for state in search(batch):
            curve.append(state.best.scores["total"])
        best.append(state.best)
        curves.append(curve)
    seconds = (time.perf_counter() - started) / len(prompts)
    mean = torch.cat([torch.stack(curve, 1) for curve in curves]).nanmean(0)
    more = {"best so far": [rounded(value) for value in mean.tolist()]}
    return Outcome(torch.cat([b.images for b in best]), torch.cat([b.noise for b in best]), seconds, **vars(state.spent), more=more)


def best_of_n(given: Given, session: Session, prompts: Prompts, seconds: float) -> Outcome:
    """Fresh noises, and the best of them, until a batch has had its seconds per picture; the first is the plain sample's."""
    policy, shape, found, drawn = session.policy, session.policy.family.latent_shape, list[Found](), list[int]()
    started = time.perf_counter()
    for batch in batches(prompts, given.batch):
        condition, begun, best, count = policy.family.encode(batch.texts, batch.metadata), time.perf_counter(), None, 0
        while best is None or time.perf_counter() - begun < seconds * len(batch):
            noise = gaussian(shape, 0, batch.noise_ids, f"fresh/{count}" if count else 0, device=policy.device)
            seen = look(policy, session.rewards, noise, batch, condition, steps=given.steps, guidance=1.0, slope=False)
            now = Found(torch.full((len(batch),), count), noise, seen.latents, seen.images, seen.scores.by_name())
            best, count = best.better(now) if best else now, count + 1
        found.append(best)
        drawn.append(count)
    each = (time.perf_counter() - started) / len(prompts)
    n = statistics.fmean(drawn)
    images, noise = (torch.cat([getattr(best, part) for best in found]) for part in ("images", "noise"))
    return Outcome(images, noise, each, n * given.steps, 0.0, n, {"n": n})


@torch.no_grad()
def plain(given: Given, policy: Policy, prompts: Prompts) -> Outcome:
    """The sampler's own pictures; with a noise hypernetwork those of the moved noise."""
    before, started = policy.nfe, time.perf_counter()
    images = sampling.pictures(policy, prompts, steps=given.steps, seed=0, batch=given.batch)
    seconds, nfe = (time.perf_counter() - started) / len(prompts), (policy.nfe - before) / len(prompts)
    sigma = policy.family.grid(given.steps).to(policy.device)[0].expand(len(prompts))
    noise = gaussian(policy.family.latent_shape, 0, prompts.noise_ids, 0, device=policy.device)
    return Outcome(images, policy.start(noise, sigma, policy.family.encode(prompts.texts, prompts.metadata)), seconds, nfe)


def trained(given: Given, name: str, seed: int, folder: Path) -> tuple[Trainer, float, int]:
    """A recipe trained for the seconds: the trainer, its seconds and steps."""
    common = {"run.path": str(folder), "policy.lora": ADAPTER, "policy.train": [], "optimizer.decay_steps": None}
    more = common | ({} if TRAINED["hypernoise"] == name else {"trainer.depth": None, "trainer.prompts": 24, "trainer.micro_batch": 24})
    trainer = build.trainer(given.recipe(name, seed, **more))
    spent, steps = 0.0, 0
    while spent < given.train_seconds:
        steps += 1
        spent += trainer.step(steps)["seconds"]
    return trainer, spent, steps


# --- a run -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judged(panel: Panel, prompts: Prompts, images: Tensor) -> dict[str, float]:
    """Mean score by name, with "total"."""
    said = panel.score(RewardInput(images, prompts.texts, prompts.metadata, groups=prompts.groups)).by_name()
    return {name: rounded(scores.nanmean().item()) for name, scores in said.items()}


def noise_figures(noise: Tensor) -> dict[str, list[float]]:
    """figure -> [mean, share of the noises that lie outside the band of 99 % of fresh noise]."""
    limits, found = band(tuple(noise.shape[1:])), describe(noise.cpu())
    outside = {name: ((values < limits[name][0]) | (values > limits[name][1])).float().mean() for name, values in found.items()}
    return {name: [rounded(values.mean().item()), rounded(outside[name].item())] for name, values in found.items()}


def run(given: Given, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One method with one seed, which picks other prompts and noises or another training, and its record."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = given.recipe("toybox_noise_optimization", seed, **{"run.path": scratch})
        session = build.session(recipe, Processes(recipe.run.device))
        session.policy.family.network.requires_grad_(False)
        whole = session.test_prompts.evaluation(given.images * (seed + 1), recipe.prompts.balance)
        prompts = whole.take(torch.arange(given.images * seed, given.images * (seed + 1)))
        more: dict[str, Any] = {}
        if method in SEARCHES:
            outcome = searched(given, session, prompts, SEARCHES[method])
        elif method == "best of n":
            outcome = best_of_n(given, session, prompts, made(given, "langevin", seed, folder)["seconds"])
        elif method == "none":
            outcome = plain(given, session.policy, prompts)
        else:
            trainer, spent, steps = trained(given, TRAINED[method], seed, Path(scratch) / "run")
            more = {"trained_seconds": rounded(spent), "trained_steps": steps}
            with trainer.average.weights() if trainer.average else nullcontext():
                outcome = plain(given, trainer.policy, prompts)
            assert isinstance(trainer.policy, ShiftedNoise) == (method == "hypernoise")
        cost = {key: rounded(getattr(outcome, key)) for key in ("seconds", "nfe", "nfe_backward", "reward_calls")}
        scores = {"rewards": judged(session.rewards, prompts, outcome.images), "judges": judged(session.judges, prompts, outcome.images)}
        head = {"name": method, "seed": seed, "key": key_of(given, method), "policy": given.policy, "steps": given.steps}
        asked = {"images": given.images, "iterations": given.iterations, "train_seconds": given.train_seconds, "optimised": given.rewards}
        return head | asked | machine() | cost | scores | {"noise": noise_figures(outcome.noise)} | more | outcome.more


def key_of(given: Given, method: str) -> str:
    """Equal for runs that would be the same."""
    recipe = given.recipe(TRAINED.get(method, "toybox_noise_optimization"), 0).model_dump(mode="json", exclude={"run": True, "log": True})
    return digest([recipe, given.iterations, given.batch, given.train_seconds if method in TRAINED else 0, SEARCHES.get(method)])


def file_name(policy: str, steps: int, method: str, seed: int) -> str:
    stem = "-".join(part.replace("/", "_").replace(", ", "_").replace(" ", "_") for part in (policy, str(steps), method))
    return f"{stem}-{seed}.json"


def made(given: Given, method: str, seed: int, folder: Path = FOLDER) -> dict[str, Any]:
    """The record of a run, which is made if it isn't there."""
    file = folder / file_name(given.policy, given.steps, method, seed)
    if file.exists() and (known := records.read(file))["key"] == key_of(given, method):
        return known
    found = run(given, method, seed, folder)
    records.write(file, found)
    print(f"{method}, seed {seed}: strict {found['judges']['strict']:.3f}, rewards {found['rewards']['total']:.3f}", flush=True)
    return found


def write(folder: Path = FOLDER, sheet: Path = PAGE) -> None:
    """The page of all runs that are there."""
    runs = [records.read(file) for file in sorted(folder.glob("*.json"))]
    if runs:
        text = (__doc__ or "").split("\n\n")[1]
        sheet.write_text(noise_page.page(runs, text, METHODS), encoding="utf-8")


def default_rewards() -> dict[str, Any]:
    """CLIP and the vision-language model, whose differences weigh alike, the latter less its spread over small changes of the picture.

    By itself it is fooled: its probability rises by what no eye would see, and the verifier's verdict falls.
    """
    judge = {"use": "uncertainty", "of": {"use": "vlm_yes", "checkpoint": "toybox/vlm"}, "source": "augment", "changes": 2, "weight": 1.0}
    return {"clip_score": {"use": "clip_score", "weight": 10.0}, "vlm_yes": judge}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description="Noise optimisation and its rivals.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {'; '.join(METHODS)} (default: all)")
    parser.add_argument("--policy", default="toybox/turbo", help="a few-step generator")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=32, help="prompts a seed")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--train-seconds", type=float, default=180.0, help="of hypernoise and direct")
    parser.add_argument("--only-table", action="store_true", help="draw nothing")
    asked = parser.parse_args()
    given = Given(asked.policy, asked.steps, asked.images, asked.iterations, asked.train_seconds, default_rewards())
    known = [method for method in asked.methods or METHODS if TRAINED.get(method, "toybox") in config.packaged()]
    methods = [] if asked.only_table else known
    for seed in map(int, asked.seeds.split(",")):
        for method in methods:
            made(given, method, seed)
            write()
    write()


if __name__ == "__main__":
    main()
