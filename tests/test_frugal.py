"""Less memory for what does not learn changes nothing that is learned, and what is missing for it is one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_attention import said
from visalign import build, config, frugal, registry
from visalign.errors import UserError
from visalign.policy import Policy

CPU = torch.device("cpu")


def learner(model: Path, **options: Any) -> Policy:
    """A policy with an adapter that says something else than its base."""
    section = {"model": str(model), "lora": {"rank": 4, "alpha": 8}, "options": {"max_sequence_length": 10}} | options
    policy = build.policy(config.parse({"policy": section}), CPU)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(0.02)
    return policy


def test_a_frozen_base_in_four_bits(tiny_sd3: Path) -> None:
    plain, small = learner(tiny_sd3), learner(tiny_sd3, quantise="nf4")
    layers = [m for m in small.family.network.modules() if "Linear4bit" in type(m).__name__]
    assert len(layers) >= 6
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    stored = sum(layer.weight.numel() for layer in layers)
    assert stored * 2 == sum(layer.in_features * layer.out_features for layer in layers)
    assert {name for name in plain.named_trainable()} == {name for name in small.named_trainable()}
    exact, rounded = said(plain), said(small)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.2
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.trainable())


def test_four_bits_are_refused_where_all_learns(tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="a network in four bits can't learn"):
        learner(tiny_sd3, quantise="nf4", lora=None)


def test_without_the_library_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer\.kind=adamw8bit needs bitsandbytes \(.*pip install 'visalign\[small\]'"):
        frugal.bitsandbytes("optimizer.kind=adamw8bit")


def test_parts_rest_while_they_are_idle(tiny_sd3: Path) -> None:
    policy = registry.load_policy(str(tiny_sd3), max_sequence_length=10)
    places: list[tuple[str, str]] = []
    plain = policy.family.encode(["a red circle"])
    latents = torch.zeros(1, *policy.family.latent_shape)
    picture = policy.family.decode(latents)
    frugal.rest(policy)
    assert {name.partition("_")[0] for name in policy.resting} == {"text", "vae"}
    for name, module in policy.family.modules().items():
        real = module.to
        module.to = lambda place, name=name, real=real: (places.append((name, str(place))), real(place))[1]  # pyright: ignore
    policy.device = torch.device("cpu:0")  # told apart from where they rest
    assert torch.equal(policy.family.encode(["a red circle"]).positive()["sequence"], plain.positive()["sequence"])
    assert {place for name, place in places} == {"cpu:0", "cpu"}
    places.clear()
    with torch.no_grad():
        assert torch.equal(policy.family.decode(latents), picture)
    assert places == [("vae", "cpu:0"), ("vae", "cpu")]
    places.clear()
    policy.family.decode(latents.requires_grad_()).sum().backward()
    assert places == [("vae", "cpu:0")], "its backward pass needs it there"


def test_compiled_blocks_say_the_same(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = learner(tiny_sd3)
    before, real, compiled = said(policy), nn.Module.compile, list[str]()

    def traced(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        real(self, backend="eager")  # what is traced, without a compiler

    monkeypatch.setattr(nn.Module, "compile", traced)
    policy.compile()
    assert compiled == ["JointTransformerBlock"] * len(policy.blocks())
    assert (said(policy) - before).abs().max() < 1e-5
    with pytest.raises(UserError, match="the network of toy:gaussian has no repeated blocks"):
        registry.load_policy("toy:gaussian").compile()


def test_checkpointed_activations_give_the_same_gradient(tiny_sd3: Path) -> None:
    gradients: list[torch.Tensor] = []
    for checkpointing in (False, True):
        policy = learner(tiny_sd3, gradient_checkpointing=checkpointing)
        said(policy).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()
