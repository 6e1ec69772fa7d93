"""Sampling from a diffusers pipeline that belongs to someone else: whatever is done with it, it comes back bitwise as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def untouched(pipeline: Any) -> Iterator[None]:
    """Give back a pipeline's settings when the block ends: gradients and modes of its modules, its scheduler, its progress bar.

    Weights are nobody's to change here, and modules stay on their devices. The scheduler of the block is a copy.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    wants = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    bar = copy.copy(vars(pipeline).get("_progress_bar_config"))
    scheduler = pipeline.scheduler
    pipeline.scheduler = copy.deepcopy(scheduler)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        for parameter, wanted in wants:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        if bar is None:
            vars(pipeline).pop("_progress_bar_config", None)
        else:
            pipeline._progress_bar_config = bar
