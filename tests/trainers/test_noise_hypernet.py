"""A network that moves noise: nothing in the beginning, the best linear map in a linear world, and the generator stays as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

from visalign import build, config, sampling
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.noise import gaussian
from visalign.paths import Flow
from visalign.policy import Family, Policy
from visalign.rollout import Condition
from visalign.schedules import linear
from visalign.shifted_noise import ShiftedNoise
from visalign.trainers.noise_hypernet import NoiseHypernet

SCALE, MEAN, TARGET = torch.tensor([[0.8, 0.3], [-0.2, 0.5]]), torch.tensor([1.0, -0.5]), torch.tensor([2.0, 1.0])


class Line(nn.Module, PeftAdapterMixin):
    """Velocity ε - (m + Sε): one step draws m + Sε."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(3, 2, bias=False)
        self.proj_out.weight.data = torch.cat([torch.eye(2) - SCALE, -MEAN[:, None]], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(torch.cat([x, torch.ones_like(x[:, :1])], 1))


class Linear(Family):
    output_layer = "proj_out"
    lora_targets = ("proj_out",)

    def __init__(self) -> None:
        self.path, self.latent_shape, self.network = Flow(), (2,), Line()

    @classmethod
    def load(cls, source: str) -> Linear:
        return cls()

    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        return Condition(torch.zeros(len(texts), dtype=torch.int64), {})

    def grid(self, steps: int) -> Tensor:
        return linear(steps)

    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x)

    def decode(self, latents: Tensor) -> Tensor:
        return Toy("gaussian").decode(latents)


class Unnamed(Linear):
    output_layer = ""


def recipe(path: Path, **changes: Any) -> config.Config:
    prompts = path / "prompts.txt"
    prompts.write_text("\n".join(f"point {n}" for n in range(8)))
    data: dict[str, Any] = {
        "run": {"path": str(path / "run"), "device": "cpu", "steps": 4, "checkpoint_every": 2},
        "policy": {"model": "toy:linear", "family": f"{__name__}:Linear", "lora": {"rank": 2, "alpha": 2}, "steps": 1, "ema": None},
        "prompts": {"train": str(prompts), "test": str(prompts)},
        "rewards": {"close": {"use": "tests.toy_rewards:Closeness"}},
        "eval": {"images": 8, "every": 4},
        "trainer": {"name": "noise_hypernet", "prompts": 64, "micro_batch": 64},
        "optimizer": {"lr": 0.03, "weight_decay": 0.0, "max_grad_norm": 1e9},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    return config.parse(data)


def hypernet(given: config.Config) -> NoiseHypernet:
    built = build.trainer(given)
    assert isinstance(built, NoiseHypernet)
    return built


@pytest.mark.parametrize("kl", [0.5, 4.0])
def test_the_best_map_of_a_linear_world_is_learnt(tmp_path: Path, kl: float) -> None:
    """-½‖m + S(ε + f) - t‖² - kl·½‖f‖²/d is highest where (SᵀS + kl/d)·f = Sᵀ(t - m - Sε)."""
    trainer = hypernet(recipe(tmp_path, trainer__kl=kl, optimizer__decay_steps=150, optimizer__final_lr=1e-3))
    for step in range(1, 151):
        row = trainer.step(step)
    noise = gaussian((2,), 9, torch.arange(500), 0)
    pull = torch.linalg.solve(SCALE.T @ SCALE + kl / 2 * torch.eye(2), SCALE.T)
    best = (TARGET - MEAN - noise @ SCALE.T) @ pull.T
    with torch.no_grad():
        learnt = trainer.mover.shift(noise, torch.ones(500), trainer.policy.family.encode([""] * 500))
    assert (learnt - best).norm() / best.norm() < 0.06
    assert row["kl"] == pytest.approx(best.square().mean().item() / 2, rel=0.25)  # of 64 noises


def test_it_starts_as_the_plain_model_and_costs_one_forward_more(tmp_path: Path) -> None:
    for steps in (1, 3):
        trainer = hypernet(recipe(tmp_path, policy__steps=steps))
        prompts, plain = trainer.examiner.prompts, Policy(Linear())
        before = trainer.policy.nfe
        images = sampling.pictures(trainer.policy, prompts, steps=steps, seed=0)
        assert trainer.policy.nfe - before == len(prompts) * (steps + 1)
        assert torch.equal(images, sampling.pictures(plain, prompts, steps=steps, seed=0))
    trainer.step(1)
    moved, still = (sampling.pictures(p, prompts, steps=3, seed=0) for p in (trainer.policy, plain))
    assert not torch.equal(moved, still)


def test_a_step_says_what_it_spent(tmp_path: Path) -> None:
    row = hypernet(recipe(tmp_path, policy__steps=3)).step(1)
    assert (row["nfe"], row["nfe_train"], row["nfe_backward"]) == (1 + 3 + 3, 1, 1 + 3)  # several steps are recomputed
    assert row["replay/max_deviation"] == 0
    assert (row["kl"], row["noise/shift"]) == (0, 0)
    assert abs(row["noise/length"]) < 0.5


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole = hypernet(recipe(tmp_path, run__path=str(tmp_path / "whole")))
    whole.fit()
    part = recipe(tmp_path, run__steps=2)
    hypernet(part).fit()
    rest = hypernet(part.model_copy(update={"run": part.run.model_copy(update={"steps": 4})}))
    rest.fit()
    for one, two in zip(whole.parameters, rest.parameters, strict=True):
        assert torch.equal(one, two)
    restored = build.restore(rest.config.run.path, torch.device("cpu"))
    assert isinstance(restored, ShiftedNoise)
    drawn = [sampling.pictures(p, rest.examiner.prompts, steps=1, seed=0) for p in (restored, rest.policy)]
    assert torch.equal(*drawn)
    with pytest.raises(UserError, match="export: this adapter predicts noise"):
        build.export(restored, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy__lora": None}, "policy.lora: noise_hypernet trains an adapter"),
        ({"policy__family": f"{__name__}:Unnamed"}, "Unnamed names no output layer"),
        ({"rewards__toybox": {"use": "toybox"}}, r"rewards\.toybox: toybox has no gradient, which noise_hypernet follows"),
        ({"trainer__stacked_timesteps": 2}, "trainer.stacked_timesteps, trainer.updates"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build.trainer(recipe(tmp_path, **changes))


def test_only_the_adapter_learns_and_recomputing_activations_changes_nothing(tmp_path: Path, tiny_sd3: Path) -> None:
    given = {"policy__model": str(tiny_sd3), "policy__family": None, "policy__options": {"max_sequence_length": 8}, "policy__steps": 2}
    given |= {"rewards__close": {"use": "tests.toy_rewards:Brightness", "weight": 10.0}, "trainer__prompts": 4, "trainer__micro_batch": 2}
    ends: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        trainer = hypernet(recipe(tmp_path, **given, policy__gradient_checkpointing=checkpointing))
        network = trainer.policy.family.network
        base = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
        rows = [trainer.step(step) for step in (1, 2, 3)]
        assert all(torch.equal(p, base[name]) for name, p in network.named_parameters() if name in base)
        assert rows[0]["noise/shift"] == 0
        assert rows[2]["noise/shift"] > 0
        assert all(row["replay/max_deviation"] < 1e-6 for row in rows)
        ends.append({name: p.detach().clone() for name, p in trainer.policy.named_trainable().items()})
    assert any("proj_out" in name for name in ends[0])
    assert any("attn" in name for name in ends[0])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)


def test_the_packaged_recipe_takes_a_step(tmp_path: Path) -> None:
    words = [f"run.path={tmp_path}", "run.device=cpu", "trainer.prompts=4", "trainer.micro_batch=2"]
    row = hypernet(config.load("toybox_noise_hypernet", words)).step(1)
    assert 0 < row["grad_norm"] < 1e3
