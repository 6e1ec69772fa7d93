"""Attention backends: what works is used in every attention of a network, what can't be had is said and replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visalign import attention, build, config, registry
from visalign.attention import Route, direct, fault, settled, within
from visalign.noise import gaussian
from visalign.policy import Policy

CPU = torch.device("cpu")


def said(policy: Policy) -> torch.Tensor:
    """What a network says of noise."""
    condition = policy.family.encode(["a red circle", "a blue square"])
    noise = gaussian(policy.family.latent_shape, 0, torch.arange(2), 0)
    grid = policy.family.grid(4)
    return policy.predict(noise, grid[1].expand(2), condition)


def test_what_a_processor_lacks_is_said_and_native_takes_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert settled("native", CPU, torch.float32) == "native"
    assert capsys.readouterr().err == ""
    for name in ("flash", "sage"):
        assert settled(name, CPU, torch.float32) == "native"
        line = capsys.readouterr().err
        assert line.startswith(f"visalign: policy.attention={name} can't be had (")
        assert line.endswith(f"it needs {attention.NEEDS[name]}); native takes its place\n")


def test_a_backend_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    def blind(query: Any, key: Any, value: Any) -> Any:
        return value.detach().requires_grad_()

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", blind)
    fault.cache_clear()
    assert fault("native", CPU, torch.float32) == "it has no backward pass"
    fault.cache_clear()


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_sd15"])
def test_attention_past_the_dispatcher_is_led_through_it(model: str, request: pytest.FixtureRequest) -> None:
    policy = registry.load_policy(str(request.getfixturevalue(model)))
    before = said(policy)
    found = direct(policy.family.network)
    assert found
    calls: list[str] = []

    def counted(forward: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append("call")
            return forward(*arguments, **options)

        return call

    for module in found:
        module.forward = within(counted(module.forward), Route("_native_math"))
    assert (said(policy) - before).abs().max() < 1e-5
    assert len(calls) == len(found)


def test_the_backend_is_used_in_a_recomputation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    real, calls = attention_dispatch.dispatch_attention_fn, list[str]()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["backend"].value)
        return real(*arguments, **options)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", counted)
    q = torch.ones(1, 2, 8, 4, requires_grad=True)
    attend = within(lambda x: nn.functional.scaled_dot_product_attention(x, x, x, scale=0.5), Route("native"))
    torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False).sum().backward()
    assert calls == ["native", "native"]
    assert q.grad is not None


def test_a_network_of_the_dispatcher_takes_the_backend_and_others_keep_theirs() -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    size: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}
    network = FluxTransformer2DModel(**size, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))
    attention.apply(network, "flex")
    taken = {module.processor._attention_backend.value for module in network.modules() if hasattr(module, "processor")}
    assert taken == {"flex"}
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"


def test_what_was_used_is_kept_in_the_runs_config(tiny_sd3: Path) -> None:
    section = config.parse({"policy": {"model": str(tiny_sd3), "attention": "sage"}}).policy
    assert build.settled(section, CPU).attention == "native"
