"""What a computation would hold in memory and cost, followed on the meta device: every tensor that lives, none with content."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


def held(run: Callable[[], object], there: Iterable[Tensor]) -> int:
    """Bytes that lived at once, at most, while `run` ran on the meta device, beside what was there before.

    Args:
        run: whose tensors are all on the meta device, and whose attentions are `Fused`; its result is dropped.
        there: tensors that exist before it, weights and inputs, which are counted elsewhere.
    """
    ledger = Ledger(there)
    with ledger:
        run()
    return ledger.peak


def flops(run: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention; a multiplication and an addition count 2. Apart from `held`: torch's counter keeps
    alive what checkpointing lets go."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, for as long as anything refers to them."""

    def __init__(self, there: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._enter(tensor.untyped_storage())
        return found

    def _enter(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self.seen:
            return
        self.seen.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, name, size)

    def _leave(self, name: int, size: int) -> None:
        self.seen.discard(name)
        self.now -= size


class Fused(TorchFunctionMode):
    """Attention as GPUs and CPUs compute it, tile by tile: on the meta device torch would write out every pair of tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        """Masks, scales and causality change nothing that is counted here."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)[0]
