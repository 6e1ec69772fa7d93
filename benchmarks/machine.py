"""What a measurement was made on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

import torch


def describe() -> dict[str, str | int]:
    """Processor, threads, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), "commit": commit} | versions
