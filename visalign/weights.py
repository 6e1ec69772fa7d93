"""Files of published checkpoints: where they lie, what is in them, and whether they fit.

Never pickle: safetensors, or torch files that hold tensors alone. Whatever is missing, left over or of another shape is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from visalign.errors import UserError


def fetch(checkpoint: str, *names: str) -> Path:
    """A checkpoint's file.

    Args:
        checkpoint: the file itself, a folder, or a hub id.
        names: what it may be called in a folder or hub repository; the first that is there is taken.

    Raises:
        UserError: there is none of them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"checkpoint {checkpoint!r} has none of the files {', '.join(names)}")
        return found
    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(checkpoint, name))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = reason or " ".join(str(error).split())[:160]
    raise UserError(f"checkpoint {checkpoint!r}: no such file or folder, and the hub gives no {' or '.join(names)} ({reason})")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file; of a nested one those under "state_dict" or "model".

    Raises:
        UserError: the file is broken, or holds more than tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the two libraries raise almost anything
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:160]}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path} holds no state dict: expected names of tensors, nested under state_dict or model at most")
    return state


def fitting(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError unless two state dicts have the same names and shapes."""
    wrong = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in (("without", sorted(expected.keys() - state.keys())), ("with a foreign", sorted(state.keys() - expected.keys())))
        if names
    ]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in sorted(expected.items())
        if name in state and state[name].shape != value.shape
    ]
    if wrong or shapes:
        raise UserError(f"weights of {where} do not fit: {'; '.join([*wrong, *shapes[:3]])}")


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies a state dict into a module, all of it or nothing. Raises UserError if it doesn't fit; `where` is named then."""
    fitting(state, module.state_dict(), where)
    module.load_state_dict(dict(state))


def renamed(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """A state dict under other names: every rule (pattern, replacement) is applied in turn; a name that becomes empty is dropped."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name:
            found[name] = value
    return found


def collapsed(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Linear layers without activations between them as the one affine map that they are, x -> x·weightᵀ + bias.

    Args:
        state: `….N.weight` (out, in) and `….N.bias` (out,) of the layers, N in their order; or one layer's `weight` and `bias`.

    Returns:
        weight (out, in) and bias (out,), float32, multiplied in float64.
    """

    def order(name: str) -> int:
        return int("".join(filter(str.isdigit, name)) or 0)

    names = sorted((name.removesuffix("weight") for name in state if name.endswith("weight")), key=order)
    weight, bias = state[names[0] + "weight"].double(), state[names[0] + "bias"].double()
    for name in names[1:]:
        layer = state[name + "weight"].double()
        weight, bias = layer @ weight, layer @ bias + state[name + "bias"].double()
    return weight.float(), bias.float()
