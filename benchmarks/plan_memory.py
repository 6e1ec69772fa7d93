"""`python -m benchmarks.plan_memory`: what `visalign plan` says a training step takes against what it takes, the toybox on a CPU.

Each case runs in this process, one after the other: its resident set before (libraries, and a tiny step that loads what is loaded late) is
taken from its peak during a step, which the kernel keeps and is told to forget in between. The C library is told to give back at once what
tensors leave, as its own gaps between them would be half of it; the reward is brightness, as only weights of rewards are planned. Linux.
Writes benchmarks/results/plan_memory.json.
"""

from __future__ import annotations

import ctypes
import gc
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.records import RESULTS, rounded, write
from visalign import build, config, plan_report
from visalign.planning import GB

BRIGHT = "{bright: {use: 'visalign.dry_run:Brightness'}}"
PLAIN = [f"rewards={BRIGHT}", f"eval.rewards={BRIGHT}", "eval.images=2", "eval.scan=[]", "policy.ema=0.9"]
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)
STACKED = ["trainer.micro_batch=96", "exploration={kind: all}", "trainer.stacked_timesteps=5"]  # so that training takes more than decoding
ADAPTER = ["policy.train=[]", "policy.lora={rank: 32, alpha: 64}"]
CASES = {  # name -> recipe and overrides
    "adapter": ("toybox", [*STACKED, *ADAPTER]),
    "adapter, checkpointing": ("toybox", [*STACKED, *ADAPTER, "policy.gradient_checkpointing=true"]),
    "all weights": ("toybox", [*STACKED, "policy.train=[]", "policy.lora=null"]),
    "all weights, checkpointing": ("toybox", [*STACKED, "policy.train=[]", "policy.lora=null", "policy.gradient_checkpointing=true"]),
    "forward process": ("toybox_nft", ["trainer.micro_batch=96"]),
}


def memory(name: str) -> float:
    """GB of this process: VmRSS now, or VmHWM at most since `forget`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / GB


def give_back() -> None:
    """Blocks of 64 kB and more are pages of their own from now on, which go when their tensors go."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        assert libc.mallopt(option, 1 << 16), "glibc refused"


def forget() -> None:
    """Give back what is free, and start the peak anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def stepped(recipe: str, overrides: list[str], **geometry: int) -> None:
    """One training step."""
    sizes = [f"trainer.{key}={value}" for key, value in geometry.items()]
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, *PLAIN, *sizes, f"run.path={folder}", "run.device=cpu", "run.threads=1"]
        build.trainer(config.load(recipe, words)).step(1)


def measure(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Planned and measured growth of the resident set over one step, in GB, and both with what was there before."""
    planned = plan_report.plan(config.load(recipe, [*overrides, *PLAIN])).needs().peak / GB
    stepped(recipe, overrides, prompts=1, group_size=2, micro_batch=2)
    forget()
    before = memory("VmRSS")
    stepped(recipe, overrides)
    found = memory("VmHWM")
    figures = {"before": before, "planned_growth": planned, "measured_growth": found - before}
    figures |= {"planned": before + planned, "measured": found, "ratio": (before + planned) / found}
    return {name: rounded(value) for name, value in figures.items()} | {"growth_ratio": rounded(planned / (found - before))}


def main() -> None:
    give_back()
    found = {name: measure(*case) for name, case in CASES.items()}
    for name, figures in found.items():
        print(name, figures)
    write(RESULTS / "plan_memory.json", {"cases": found} | describe())


if __name__ == "__main__":
    main()
