"""Worlds in which every guided-sampling method costs milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import visalign
from tests.toy_rewards import Closeness
from visalign import registry
from visalign.drawing import listed
from visalign.findings import Budget, State
from visalign.guiding import search
from visalign.policy import Policy
from visalign.scoring import Panel
from visalign.tasks import Task

Run = Callable[..., tuple[Task, list[State]]]


@pytest.fixture
def policy() -> Policy:
    """The Gaussian world, with a reference so that the hybrid sampler has something to mix with."""
    loaded = visalign.load("toy:gaussian", device="cpu")
    loaded.keep_reference()
    return loaded


@pytest.fixture
def run(policy: Policy) -> Run:
    """Runs a method on `n` pictures that should lie close to a point; the task with its best, and all states."""

    def search_with(
        method: str, n: int = 4, budget: Mapping[str, Any] | None = None, panel: Panel | None = None, sampler: Any = None, **options: Any
    ) -> tuple[Task, list[State]]:
        chosen = registry.load("steering", method)(method, options)
        judged = panel or Panel({"close": (Closeness(), 1.0)})
        task = Task(policy, listed("a", n), judged, **({"steps": 6, "batch": 256, "budget": Budget(**(budget or {}))} | (sampler or {})))
        return task, list(search(chosen, task))

    return search_with
