"""Less memory for what does not learn: parts that rest on the CPU, and a frozen network in four bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.policy import PRECISIONS, Policy

RESTING = ("text_encoder", "image_encoder", "vae")  # how the parts of a pipeline begin that are needed before and after denoising alone
NF4_BITS = 4 + 32 / 64  # of a weight: four, and a float32 scale of every 64


def rest(policy: Policy) -> None:
    """Keep text encoders and VAE on the CPU from now on; each comes to the policy's device for as long as a method needs it."""
    family = policy.family
    parts = {name: module for name, module in family.modules().items() if name.startswith(RESTING)}
    decoder = {name: module for name, module in parts.items() if name.startswith("vae")}
    policy.resting = frozenset(parts)
    for method, needed in {"encode": parts, "decode": decoder, "encode_images": decoder, "stock": parts}.items():
        setattr(family, method, _woken(policy, getattr(family, method), needed))


def _woken(policy: Policy, method: Callable[..., Any], parts: Mapping[str, nn.Module]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        for module in parts.values():
            module.to(policy.device)
        found = method(*arguments, **options)
        if not (isinstance(found, Tensor) and found.requires_grad):  # else its backward pass needs them where they are
            for module in parts.values():
                module.to("cpu")
        return found

    return call


def quantise(policy: Policy, kind: str) -> None:
    """Store the frozen linear layers of the network's blocks in four bits (NF4, arXiv 2305.14314); the adapter stays as it is.

    Raises:
        UserError: bitsandbytes isn't there, nothing is frozen, or the network has no blocks.
    """
    bits = bitsandbytes(f"policy.quantise={kind}")
    if not policy.lora:
        raise UserError(f"policy.quantise={kind}: a network in four bits can't learn; train an adapter, such as policy.lora.rank=32")
    compute = PRECISIONS[policy.precision] if policy.precision != "fp32" else None
    for block in policy.blocks():
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and not layer.weight.requires_grad:
                    setattr(parent, name, _in_four_bits(bits, layer, kind, compute or layer.weight.dtype))


def _in_four_bits(bits: Any, layer: nn.Linear, kind: str, compute: torch.dtype) -> nn.Module:
    """A layer whose weights will be quantised by their next move to a device."""
    options = {"compute_dtype": compute, "quant_type": kind, "compress_statistics": False, "device": "meta"}
    small = bits.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
    small.weight = bits.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=False)
    small.bias = layer.bias
    return small


def bitsandbytes(key: str) -> Any:
    """The library. Raises UserError, which names the recipe's key, if it can't be imported."""
    try:
        import bitsandbytes as bits  # pyright: ignore[reportMissingImports]
    except Exception as error:  # without its native library it fails in its own ways
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{key} needs bitsandbytes ({reason}): pip install 'visalign[small]', or leave it out") from None
    return bits
