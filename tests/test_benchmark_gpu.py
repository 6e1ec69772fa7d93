"""The GPU benchmark, at the toybox's size on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu, plan_memory


def test_everything_of_one_model_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "GROUP", 4)
    found = gpu.measure("toybox", torch.device("cpu"), 2)
    assert set(found["settings"]) == {"native", "checkpointing"}, "compilers and other backends are for GPUs"
    assert all(part["step_seconds"] > part["forward_seconds"] / 2 > 0 for part in found["settings"].values())
    iteration = found["iteration"]
    assert iteration["pictures"] == 4
    assert iteration["nfe"] == 10
    assert iteration["step"] >= iteration["learn"] + iteration["collect"] - 1e-3
    assert iteration["rollout"] > 0
    assert found["planned_gb"]["checkpointing"] < found["planned_gb"]["native"]


@pytest.mark.parametrize("name", list(gpu.CASES))
def test_its_recipes_are_recipes_of_known_models(name: str) -> None:
    recipe = gpu.recipe(name, 2, "bf16")
    assert recipe.policy.model == "toybox" or recipe.policy.model in gpu.skeletons.known()
    assert recipe.trainer.options["group_size"] == gpu.GROUP


def test_the_resident_set_is_read(tmp_path: Path) -> None:
    plan_memory.forget()
    now = plan_memory.memory("VmRSS")
    kept = torch.ones(16_000_000)
    assert plan_memory.memory("VmHWM") - now == pytest.approx(kept.nbytes / 1e9, abs=0.03)
