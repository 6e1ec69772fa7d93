"""`visalign plan`: what a recipe would need, before any weights are loaded: memory by part, forwards, FLOPs, seconds, and a geometry.

Networks run on the meta device (`ledger`), the algorithm on a toy world (`dry_run`); the rest is sums. Memory is what tensors hold: of a
GPU's own a tenth is left for what its libraries and the gaps between tensors take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from visalign import build
from visalign.attention import attentions, within
from visalign.config import Config, PolicySection
from visalign.dry_run import Count
from visalign.errors import UserError
from visalign.explain import nearest
from visalign.frugal import NF4_BITS
from visalign.ledger import META, Fused, flops, held
from visalign.policy import PRECISIONS, Policy
from visalign.skeletons import Skeleton, skeleton

GB = 1e9
UTILISATION = 0.4  # of a GPU's peak that training reaches; replace it by what benchmarks/gpu.py measures
USABLE = 0.9  # of a GPU's memory


@dataclass(frozen=True)
class GPU:
    """Public figures of a GPU: memory in GB, and dense bf16 TFLOPS (fp32 sums) without sparsity."""

    memory: float
    tflops: float


GPUS = {
    "rtx3090": GPU(24, 71),
    "rtx4090": GPU(24, 165),
    "rtx5090": GPU(32, 209),
    "l40s": GPU(48, 362),
    "a100-40": GPU(40, 312),
    "a100-80": GPU(80, 312),
    "h100": GPU(80, 989),
    "h200": GPU(141, 989),
    "b200": GPU(180, 2250),
}


def gpu(name: str) -> GPU:
    """By name. Raises UserError with those that are known."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not in the table{nearest(name, list(GPUS))} (known: {', '.join(GPUS)})")
    return GPUS[name]


@dataclass(frozen=True)
class Line:
    """A cost that grows with the number of samples in a forward: fixed + each·n, in bytes."""

    fixed: float
    each: float

    def __call__(self, count: float) -> float:
        return self.fixed + self.each * count


def computed(section: PolicySection) -> torch.dtype:
    """In which a network's forwards are computed."""
    return PRECISIONS[section.precision if section.precision != "fp32" else section.dtype]


class Subject:
    """A recipe's networks on the meta device, with what they cost per sample.

    Args:
        config: with the trainer's defaults filled in.
        count: of its forwards.
    """

    def __init__(self, config: Config, count: Count):
        self.config, self.count = config, count
        self.skeleton: Skeleton = skeleton(config.policy)
        self.policy: Policy = build.adapted(self.skeleton.policy, config.policy)
        self.computed = computed(config.policy)
        for module in self.policy.family.modules().values():
            nn.Module.to(module, self.computed)  # diffusers' own warns of layers that would stay in float32, which is nothing here
            for attention in attentions(module):
                attention.forward = within(attention.forward, Fused())
        self.trainable = sum(p.numel() for p in self.policy.trainable())
        self.frozen = sum(p.numel() for p in self.policy.family.network.parameters()) - self.trainable

    @cached_property
    def quantised(self) -> int:
        """Frozen weights that `policy.quantise` would store in four bits: linear layers of the blocks."""
        layers = {m for block in self.policy.blocks() for m in block.modules() if isinstance(m, nn.Linear)}
        return sum(layer.weight.numel() for layer in layers if not layer.weight.requires_grad)

    @cached_property
    def forward(self) -> int:
        """FLOPs of one prediction for one sample, unguided."""
        return flops(self._run(1, learns=False)[0])

    @cached_property
    def backward(self) -> int:
        """FLOPs of one with its backward pass, nothing computed again."""
        network: Any = self.policy.family.network
        network.disable_gradient_checkpointing()
        return flops(self._run(1, learns=True)[0])

    @cached_property
    def rolling(self) -> Line:
        """Bytes of a forward without gradients."""
        return self._line(lambda n: held(*self._run(n, learns=False)))

    def learning(self, checkpointing: bool) -> Line:
        """Bytes of a forward and its backward pass, beside weights and gradients."""
        network: Any = self.policy.family.network
        if checkpointing:
            self.policy.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()
        return self._line(lambda n: held(*self._run(n, learns=True)))

    @cached_property
    def decoding(self) -> Line:
        """Bytes of latents becoming pictures."""
        return self._line(lambda n: held(*self._decode(n)))

    @cached_property
    def decoding_flops(self) -> int:
        return flops(self._decode(1)[0])

    @cached_property
    def picture(self) -> Tensor:
        """One decoded sample, without content."""
        with torch.no_grad():
            return self.policy.family.decode(self._latents(1))

    def _line(self, bytes_of: Any) -> Line:
        one, three = bytes_of(1), bytes_of(3)
        each = (three - one) / 2
        return Line(one - each, each)

    def _latents(self, count: int) -> Tensor:
        return torch.empty(count, *self.policy.family.latent_shape, device=META)

    def _run(self, count: int, learns: bool) -> tuple[Callable[[], None], list[Tensor]]:
        """A prediction, with its backward pass or without, and what is there before."""
        x, sigma = self._latents(count), torch.empty(count, device=META)
        condition = self.skeleton.condition.take(torch.zeros(count, dtype=torch.int64))
        network, learning = self.policy.family.network, self.policy.trainable()
        for parameter in learning:
            parameter.grad = torch.empty_like(parameter)  # as after the first micro-batch

        def run() -> None:
            with torch.set_grad_enabled(learns):
                said = self.policy.predict(x, sigma, condition)
                if learns:
                    said.square().mean().backward()

        grads = [p.grad for p in learning if p.grad is not None]
        return run, [x, sigma, *network.parameters(), *network.buffers(), *grads, *condition.tensors.values()]

    def _decode(self, count: int) -> tuple[Callable[[], None], list[Tensor]]:
        x, vae = self._latents(count), self.policy.family.modules().get("vae")

        def run() -> None:
            with torch.no_grad():
                self.policy.family.decode(x)

        return run, [x, *(vae.parameters() if vae else ()), *(vae.buffers() if vae else ())]


@dataclass(frozen=True)
class Needs:
    """Bytes on one device, by part; `peak` is the worst of a step's phases."""

    weights: float
    encoders: float
    gradients: float
    optimiser: float
    copies: float
    storage: float
    rewards: float
    encoding: float
    rolling: float
    decoding: float
    learning: float

    @property
    def standing(self) -> float:
        """What is there all the time."""
        return self.weights + self.encoders + self.optimiser + self.copies + self.storage + self.rewards

    @property
    def phases(self) -> Mapping[str, float]:
        return {"encoding": self.encoding, "rollout": self.rolling, "decoding": self.decoding, "training": self.learning + self.gradients}

    @property
    def peak(self) -> float:
        return self.standing + max(self.phases.values())


def needs(subject: Subject, config: Config, gpus: int, micro_batch: int, lines: Mapping[bool, Line], rewards: float) -> Needs:
    """What a process of `gpus` holds, with a recipe's settings (which may differ from the subject's in what saves memory).

    A backward pass through sampler, decoder and rewards, as reward gradients have it, takes more: it is not in here.
    """
    section, settings = config.policy, config.trainer
    size = PRECISIONS[section.dtype].itemsize
    halved = computed(section).itemsize / subject.computed.itemsize  # activations in another precision than they were followed in
    frozen = subject.frozen * size
    if section.quantise:
        frozen += subject.quantised * (NF4_BITS / 8 - size)
    casts = subject.frozen * 2 * (section.dtype == "fp32" and section.precision != "fp32")  # which autocast keeps for the backward pass
    decoder = _numel(subject.policy.family.modules().get("vae"))
    resting = sum(subject.skeleton.encoders.values()) + decoder
    own = pictures(settings.options, gpus)
    latent = float(torch.Size(subject.policy.family.latent_shape).numel() * 4)
    each = latent * (subject.count.states + subject.count.predictions) + subject.picture.numel() * 4
    prompt = sum(value[0].numel() for value in subject.skeleton.condition.tensors.values()) * size
    states = math.ceil(own * subject.count.nfe_backward / settings.options["updates"])  # that an update's backward passes start from
    batch = min(micro_batch * settings.options["stacked_timesteps"], states)
    return Needs(
        weights=frozen + subject.trainable * 4,
        encoders=0.0 if section.rest else resting * size,
        gradients=subject.trainable * 4,
        optimiser=subject.trainable * (2 if config.optimizer.kind == "adamw8bit" else 8),
        copies=subject.trainable * 4 * (subject.count.copies + (section.ema is not None)),
        storage=own * each + settings.options["prompts"] // gpus * prompt,
        rewards=rewards,
        encoding=resting * size * section.rest,
        rolling=subject.rolling(micro_batch) * halved + casts,
        decoding=subject.decoding(micro_batch) * halved + decoder * size * section.rest,
        learning=lines[section.gradient_checkpointing](batch) * halved + casts,
    )


def pictures(options: Mapping[str, Any], gpus: int) -> int:
    """Of one process and step."""
    return options["prompts"] // gpus * options["group_size"]


def _numel(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module else 0
