"""`python -m benchmarks.gpu [NAME …] [--device cuda]`: speed and memory of rollout and training on networks of published sizes.

Random weights, bf16, an adapter of rank 32: pictures per second of a rollout, seconds and memory of a training step with and without
gradient checkpointing, the share of the GPU's peak that it reaches, eager against compiled, native against another attention, and a whole
Flow-GRPO iteration of a group of 24 with its split; beside each what `visalign plan` says. Writes benchmarks/results/gpu-NAME.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.records import RESULTS, rounded, write
from visalign import attention, build, config, plan_report, registry, skeletons
from visalign.distributed import Processes
from visalign.loop import Session
from visalign.planning import GB, GPUS
from visalign.policy import PRECISIONS, Policy
from visalign.prompts import PromptSet
from visalign.rollout import Condition
from visalign.scoring import Panel
from visalign.trainer import Trainer

ROUNDS = 5
GROUP = 24
OTHERS = ("xformers", "flash", "flash_hub", "flex")  # the first that can be had is compared with native
LORA = "policy.lora={rank: 32, alpha: 64}"
CASES = {  # name -> overrides of a Flow-GRPO recipe, and latents in a forward
    "sd35_medium": (["policy.model=stabilityai/stable-diffusion-3.5-medium", "policy.resolution=512", "policy.guidance=4.5"], 8),
    "flux1_dev": (["policy.model=black-forest-labs/FLUX.1-dev", "policy.resolution=512"], 4),
    "wan21_1b": (
        ["policy.model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "policy.options={height: 480, width: 832, frames: 33}", "policy.guidance=5"],
        2,
    ),
    "toybox": (["policy.model=toybox", "policy.train=[]"], 8),
}


def recipe(name: str, batch: int, precision: str) -> config.Config:
    """Flow-GRPO with a window of two of ten steps, on one group."""
    words = [*CASES[name][0], LORA, f"policy.precision={precision}", f"policy.dtype={precision}", "policy.steps=10", "policy.ema=null"]
    words += ["exploration={kind: window, size: 2, range: [1, 5]}", "transition={kind: flow_sde, level: 0.7}", "prompts.balance=null"]
    words += ["rewards={bright: {use: 'visalign.dry_run:Brightness'}}", "eval={}", "ratio={}"]
    return config.load("toybox", [*words, "trainer.prompts=1", f"trainer.group_size={GROUP}", f"trainer.micro_batch={batch}"])


def made(wanted: config.Config, device: torch.device) -> tuple[Policy, Condition]:
    """A policy with random weights on a device, and the condition of one prompt."""
    section = wanted.policy
    dtype = PRECISIONS[section.dtype]
    if section.model == "toybox":
        policy = registry.load_policy("toybox", dtype=section.dtype, **section.options)
        condition = policy.family.encode(["a red circle"])
    else:
        options = section.options | ({"resolution": section.resolution} if section.resolution else {})
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = skeletons.of_known(section, options, device)
        finally:
            torch.set_default_dtype(before)
        policy, condition = found.policy, found.condition
    policy.precision = section.precision
    return build.adapted(policy, section).to(device), condition


class Bench:
    """One model on one device."""

    def __init__(self, name: str, device: torch.device, batch: int | None = None):
        self.name, self.device, self.batch = name, device, batch or CASES[name][1]
        self.config = recipe(name, self.batch, "fp32" if device.type == "cpu" else "bf16")
        self.policy, self.condition = made(self.config, device)
        shape = self.policy.family.latent_shape
        self.x = torch.randn(self.batch, *shape, device=device)
        self.sigma = self.policy.family.grid(10)[5].to(device).expand(self.batch)
        self.rows = self.condition.take(torch.zeros(self.batch, dtype=torch.int64))

    def seconds(self, run: Callable[[], object]) -> tuple[float, float | None]:
        """Median seconds of a call after one to warm up, and GB of the GPU that it took at most."""
        run()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times)[ROUNDS // 2], torch.cuda.max_memory_allocated() / GB if cuda else None

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.policy.predict(self.x, self.sigma, self.rows, self.config.policy.guidance)

    def training(self) -> None:
        said = self.policy.predict(self.x, self.sigma, self.rows, self.config.policy.guidance)
        said.square().mean().backward()
        for parameter in self.policy.trainable():
            parameter.grad = None

    @torch.no_grad()
    def decoding(self) -> torch.Tensor:
        return self.policy.family.decode(self.x)

    def compare(self) -> dict[str, dict[str, Any]]:
        """Seconds and memory of a forward and of a training step, one setting after the other: what a backend changes stays."""
        found: dict[str, dict[str, Any]] = {"native": self.both()}
        self.policy.enable_gradient_checkpointing()
        found["checkpointing"] = self.both()
        network: Any = self.policy.family.network
        network.disable_gradient_checkpointing()
        dtype = PRECISIONS[self.config.policy.precision]
        other = next((name for name in OTHERS if self.device.type == "cuda" and not attention.fault(name, self.device, dtype)), None)
        if self.device.type == "cuda":
            self.policy.compile()
            found["compiled"] = self.both()
            torch.compiler.reset()
        if other:
            self.policy, self.condition = made(self.config, self.device)
            self.policy.attend_by(other)
            found[other] = self.both()
        return found

    def both(self) -> dict[str, Any]:
        forward, low = self.seconds(self.forward)
        step, high = self.seconds(self.training)
        return {"forward_seconds": rounded(forward), "forward_gb": low, "step_seconds": rounded(step), "step_gb": high}

    def iteration(self) -> dict[str, float]:
        """A whole step of Flow-GRPO, warm, with the seconds of its parts."""
        with tempfile.TemporaryDirectory() as folder:
            run = self.config.run.model_copy(update={"path": folder, "device": str(self.device)})
            wanted = self.config.model_copy(update={"run": run})
            panel = Panel({"bright": (registry.load_reward("visalign.dry_run:Brightness"), 1.0)})
            listed = PromptSet(["a red circle"], [{}])
            family: Any = self.policy.family
            family.encode = lambda texts, metadata=(): self.condition.take(torch.zeros(len(texts), dtype=torch.int64))
            processes = Processes(str(self.device), wanted.policy.precision)
            session = Session(wanted, processes, self.policy, panel, panel, listed, listed)
            trainer = registry.load("trainers", "flow_grpo")(session)
            trainer.step(1)
            return split(trainer)


def split(trainer: Trainer) -> dict[str, float]:
    """Seconds of one step and of its parts."""
    spent: dict[str, float] = {}

    def timed(owner: Any, method: str, name: str) -> None:
        real = getattr(owner, method)

        def call(*arguments: Any, **options: Any) -> Any:
            wait(trainer.device)
            started = time.perf_counter()
            found = real(*arguments, **options)
            wait(trainer.device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return found

        setattr(owner, method, call)

    for owner, method, name in ((trainer, "collect", "collect"), (trainer.policy.family, "decode", "decode"), (trainer, "learn", "learn")):
        timed(owner, method, name)
    row = trainer.step(2)
    spent["rollout"] = spent["collect"] - spent["decode"]
    return {name: rounded(value) for name, value in {"step": row["seconds"], **spent}.items()} | {
        "pictures": row["images"],
        "nfe": row["nfe"],
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def card(device: torch.device) -> str | None:
    """The name in the planner's table of the GPU that this is, if it is one."""
    known = torch.cuda.get_device_name().lower().replace(" ", "") if device.type == "cuda" else ""
    return next((name for name in GPUS if name.partition("-")[0] in known), None)


def measure(name: str, device: torch.device, batch: int | None = None) -> dict[str, Any]:
    """Everything of one model."""
    bench = Bench(name, device, batch)
    planned = plan_report.plan(bench.config)
    found: dict[str, Any] = {"settings": bench.compare()}
    native = found["settings"]["native"]
    decode, _ = bench.seconds(bench.decoding)
    steps = bench.config.policy.steps
    found["pictures_per_second"] = rounded(bench.batch / (steps * native["forward_seconds"] + decode))
    guided = 1 + (bench.config.policy.guidance != 1)
    flops = bench.batch * (planned.subject.backward + (guided - 1) * planned.subject.forward)
    found["step_tflops"] = rounded(flops / native["step_seconds"] / 1e12)
    if known := card(device):
        found["mfu"] = rounded(found["step_tflops"] / GPUS[known].tflops)
        found["largest_rollout"] = {name: planned.largest_group(GPUS[name], planned.recipe) for name in (known, "rtx4090")}
    need = planned.needs(micro_batch=bench.batch)
    line = planned.lines
    found["planned_gb"] = {"weights": (need.weights + need.encoders) / GB} | {
        "checkpointing" if on else "native": line[on](bench.batch) / GB for on in (False, True)
    }
    found["iteration"] = bench.iteration()
    return {"name": name, "batch": bench.batch} | found | describe()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["sd35_medium", "flux1_dev", "wan21_1b"], help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args(words)
    for name in given.names:
        found = measure(name, torch.device(given.device), given.batch)
        print(found, flush=True)
        write(RESULTS / f"gpu-{name}.json", found)


if __name__ == "__main__":
    main()
