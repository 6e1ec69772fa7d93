"""Processes and devices. With `trainer.py` and `checkpoint.py`, the only modules that know accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from visalign.errors import UserError
from visalign.policy import repeated

Row = TypeVar("Row")


def pick_device(name: str, key: str = "run.device") -> torch.device:
    """ "auto" is cuda, else mps, else cpu. Raises UserError, which names the recipe's `key`, if it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key}: {name!r} can't be used here ({str(error).splitlines()[0][:120]}); try auto or cpu") from None
    return torch.device(name)


def placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value on a parameter's device, as this process's share of it where the parameter's weights are shared out."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:  # such as an optimizer's number of steps
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _forget(network: nn.Module) -> None:
    """Let go of the weights that a sharded network has gathered: others have been put in their place."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Processes:
    """The processes of a run: rank, sums and gathers over all of them, and how what learns is laid out over them.

    By default each holds all weights and gradients are averaged (DDP). Started by `accelerate launch` with FSDP (version 2), each holds a
    share of every weight, gradient and optimizer state, by torch's own `fully_shard`, on CPUs too.

    Args:
        device: as in `run.device`; several processes on CUDA take one device each.
        precision: "fp16" gets a gradient scaler; autocast belongs to the policy.

    Attributes:
        sharded: whether weights are shared out.
    """

    def __init__(self, device: str = "auto", precision: str = "fp32"):
        picked = pick_device(device)
        if picked.type == "cpu":
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise UserError("accelerate: DeepSpeed steps before a loss is known to be finite; use configs/accelerate/zero2.yaml, its like")
        wanted = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"  # accelerate itself would shard on GPUs alone
        if wanted and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate: expected fsdp_version: 2 in its config, as in configs/accelerate/fsdp2.yaml")
        mixed = "fp16" if precision == "fp16" and picked.type == "cuda" else "no"
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # SD3's last block leaves its text half unused
        self.accelerator = Accelerator(cpu=picked.type == "cpu", mixed_precision=mixed, kwargs_handlers=[unused])
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.count: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.sharded = wanted and self.count > 1
        if wanted:
            os.environ["ACCELERATE_USE_FSDP"] = "true"

    # --- what learns -----------------------------------------------------------------------------------------------------

    def share_out(self, network: nn.Module) -> None:
        """Where weights are sharded, leave this process its share of them; in place, and parameters are other objects afterwards.

        Raises:
            UserError: weights that can't be sharded.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        if any(not p.is_floating_point() for p in network.parameters()):
            raise UserError("policy.quantise: weights in four bits can't be sharded; use DDP, or leave them as they are")
        off = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        mesh = init_device_mesh(self.device.type, (self.count,))
        options = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if off else OffloadPolicy()}
        for block in reversed(repeated(network)):
            fully_shard(block, reshard_after_forward=again, **options)
        shards: Any = fully_shard(network, reshard_after_forward=again, **options)
        forget = partial(_forget, shards)
        for parameter in shards.parameters():
            parameter.forget = forget  # for `snapshots.overwrite`

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The network and its optimizer as accelerate wraps them."""
        if self.sharded:
            return network, self.accelerator.prepare(optimizer)
        return self.accelerator.prepare(network, optimizer)

    def adding(self, network: Any, last: bool) -> AbstractContextManager[None]:
        """Around a forward and its backward pass: only the `last` of an update brings all processes' gradients together."""
        if self.sharded:
            network.set_requires_gradient_sync(last)
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(network)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients down to a norm of at most `limit`; their norm before, over all processes."""
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit)).detach()  # pyright: ignore[reportArgumentType]
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --- what is said to all -----------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes; `values` is left alone."""
        if self.count == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.count

    def max(self, values: Tensor) -> Tensor:
        if self.count == 1:
            return values
        largest = values.clone()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in the order of ranks; every process brings as many."""
        return values if self.count == 1 else self.accelerator.gather(values.contiguous())  # pyright: ignore[reportReturnType]

    def gather_list(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other."""
        return values if self.count == 1 else gather_object(values)

    def broadcast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main process's tensors, on all of them; every process brings the same names and shapes."""
        if self.count == 1:
            return tensors
        shared = {name: value.detach().to(self.device, copy=True).contiguous() for name, value in tensors.items()}
        for value in shared.values():
            torch.distributed.broadcast(value, 0)
        return {name: value.to(tensors[name].device) for name, value in shared.items()}

    def agree(self, value: str) -> str:
        """The main process's value, on all of them."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def shard(self, count: int, what: str) -> slice:
        """This process's share of `count` rows."""
        if count % self.count:
            raise UserError(f"{what}={count} can't be split over {self.count} processes; use a multiple of {self.count}")
        share = count // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This process's part of any rows, as long on every process: of what `gather` brings back, the first `len(rows)` count."""
        share = -(-len(rows) // self.count)
        return [rows[n % len(rows)] for n in range(self.rank * share, (self.rank + 1) * share)]
