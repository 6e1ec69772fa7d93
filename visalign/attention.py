"""Attention backends by diffusers' dispatcher, also for networks whose attention calls torch's own function (Stable Diffusion's do).

A backend is proven before it is used, forward and backward on the run's device: what can't be had, or has no gradient, is said, and torch's
own attention takes its place.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NATIVE = "native"
NEEDS = {  # backend -> what to install for it
    "xformers": "pip install 'visalign[xformers]'",
    "flash": "pip install flash-attn",
    "flash_hub": "pip install kernels",
    "sage": "pip install sageattention",
    "flex": "torch 2.5 or newer, and a GPU",
}
PROBE = (1, 128, 2, 64)  # pictures, tokens, heads, elements of a head


def preload() -> None:
    """Load CUDA 12's runtime, which the newest wheel of xformers is built for and a torch for CUDA 13 lacks, before anything imports it."""
    if find_spec("xformers") is None or find_spec("nvidia") is None:
        return
    spec = find_spec("nvidia.cuda_runtime")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in sorted(Path(folder, "lib").glob("libcudart.so.12*")):
            ctypes.CDLL(str(library))


preload()  # diffusers imports xformers by itself: whoever loads a family imports this module before


def settled(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`name` if that backend works here, else "native", which is then printed with the reason."""
    if name == NATIVE:
        return name
    reason = fault(name, device, dtype)
    if not reason:
        return name
    print(f"visalign: policy.attention={name} can't be had ({reason}; it needs {NEEDS[name]}); native takes its place", file=sys.stderr)
    return NATIVE


@cache
def fault(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend can't train on a device; "" if it can."""
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    parts: Any = [torch.ones(PROBE, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    try:
        with attention_backend(name):  # which checks for the package, and fetches a kernel of the hub
            found = dispatch_attention_fn(*parts)
        found.float().sum().backward()
    except Exception as error:  # a foreign kernel can fail in any way
        return " ".join(str(error).split())[:160] or type(error).__name__
    return "" if all(part.grad is not None for part in parts) else "it has no backward pass"


def apply(network: nn.Module, name: str) -> None:
    """Use a settled backend in every attention of a network."""
    if name == NATIVE:
        return
    from diffusers.models.attention_dispatch import attention_backend

    changing: Any = network
    with attention_backend(NATIVE):  # it would stay the default of all networks otherwise
        changing.set_attention_backend(name)
    for module in direct(network):
        module.forward = within(module.forward, Route(name))


def direct(network: nn.Module) -> list[nn.Module]:
    """The attentions of a network that call torch's own function, past the dispatcher."""
    return [module for module in attentions(network) if not hasattr(module.processor, "_attention_backend")]


def attentions(network: nn.Module) -> list[nn.Module]:
    """All attentions of a diffusers network."""
    return [module for module in network.modules() if getattr(module, "processor", None) is not None]


def within(forward: Callable[..., Any], mode: TorchFunctionMode) -> Callable[..., Any]:
    """A module's forward in a mode: around the network the mode would be left while checkpointing computes activations again."""

    @wraps(forward)
    def through(*arguments: Any, **options: Any) -> Any:
        with mode:
            return forward(*arguments, **options)

    return through


class Route(TorchFunctionMode):
    """Within it torch's own attention is a backend's."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        """(N, heads, tokens, width), as torch's function has it; the dispatcher's has heads and tokens the other way round."""
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        turned = [part.transpose(1, 2) for part in (query, key, value)]
        backend = AttentionBackendName(self.name)
        return dispatch_attention_fn(*turned, attn_mask=attn_mask, dropout_p=dropout_p, backend=backend, **options).transpose(1, 2)
