"""A policy: a model family with what learning adds to it (adapter, reference, moving average, precision).

It turns latents, time and a condition into one prediction. A family is the only place that knows a diffusers pipeline.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visalign import attention  # before any family imports diffusers
from visalign.errors import UserError
from visalign.paths import Path
from visalign.rollout import Condition
from visalign.snapshots import swapped

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Family(ABC):
    """The border to one kind of diffusers pipeline. A new family is one file that implements these methods.

    Attributes:
        network: the denoiser, the only part that learns.
        path: how data and noise mix, and what the network predicts.
        latent_shape: of one sample.
        pipeline_classes: names of the diffusers pipelines that it wraps, as in model_index.json.
        lora_targets: names of the linear layers that an adapter wraps.
        output_layer: name of the network's last layer with weights, for an adapter that predicts noise.
        step_distilled: few-step students, for which forward-process losses are invalid.
    """

    network: nn.Module
    path: Path
    latent_shape: tuple[int, ...]
    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    output_layer: ClassVar[str] = ""
    step_distilled: bool = False

    @property
    def moving(self) -> bool:
        """Whether it draws videos: its latents are (C, F, h, w), and `decode` gives (N, F, 3, H, W)."""
        return len(self.latent_shape) == 4

    @abstractmethod
    def encode(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Condition:
        """Encode prompts, each unique text once; N rows in the order of `texts`.

        `metadata`, N or none, may hold a further `condition` of each, where a family knows one.
        """

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) float32 times of `path`, decreasing from noise to data, exactly the stock pipeline's.

        Only the path knows their unit (flows: σ from 1 to 0; variance-preserving models: table indices): whoever wants a noise level
        asks its `coefficients`.
        """

    @abstractmethod
    def forward(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """One denoiser forward: x (N, ...), times sigma (N,), condition name -> (N, ...); prediction (N, ...)."""

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float, sigma: Tensor) -> Tensor:
        """Both halves (N, ...) float32 of classifier-free guidance at times sigma (N,) as one prediction: v_u + w (v_c - v_u)."""
        del sigma
        return unconditional + guidance * (conditional - unconditional)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(N, ...) latents to pictures (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1]; differentiable."""

    def encode_images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) pictures in [0, 1] to (N, ...) clean latents; pictures of another size are scaled and their middle is cut out.

        Raises:
            UserError: this family can't.
        """
        del images
        raise UserError(f"{type(self).__name__} has no way from given pictures to latents; train on pictures that the policy draws instead")

    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """The wrapped pipeline's own pictures (N, 3, H, W) in [0, 1] from the same initial noise."""
        raise NotImplementedError(f"{type(self).__name__} wraps no stock pipeline")

    def save_adapter(self, folder: FilePath, state: dict[str, Tensor]) -> None:
        """Save LoRA weights so that the stock pipeline's `load_lora_weights(folder)` reads them."""
        raise NotImplementedError(f"{type(self).__name__} has no adapter format")

    def save(self, folder: FilePath) -> None:
        """Save the whole pipeline in the stock format."""
        raise NotImplementedError(f"{type(self).__name__} has no pipeline to save")

    def modules(self) -> dict[str, nn.Module]:
        """Every module by name: they move between devices and dtypes together."""
        return {"network": self.network}


def repeated(network: nn.Module) -> list[nn.Module]:
    """The modules of which a diffusers network says that they repeat, outer ones first."""
    kinds: Sequence[str] = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    return [module for module in network.modules() if type(module).__name__ in kinds]


DISTILLED = ("turbo", "lightning", "lcm", "hyper", "schnell")  # words in the names of few-step students


def named_as_distilled(name: str | None) -> bool:
    """Whether one of the words in a checkpoint's name (of a folder's or hub id's last part) is in `DISTILLED`: their formats don't say."""
    return not set(re.split(r"[^a-z]+", FilePath(name or "").name.lower())).isdisjoint(DISTILLED)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars for the loading of weights; downloads keep theirs."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.enable_progress_bar()


class Policy:
    """A family ready to be sampled and trained.

    Args:
        family: the wrapped model.
        precision: "fp32", "bf16" or "fp16" autocast around every denoiser forward, in rollout and replay alike.
        name: what it was loaded from, for run folders and messages.
    """

    def __init__(self, family: Family, precision: str = "fp32", name: str = ""):
        self.family, self.precision, self.name = family, precision, name
        self.network: nn.Module = family.network  # accelerate may wrap it; `family.network` stays bare
        self.lora = False
        self.device = torch.device("cpu")
        self.resting: frozenset[str] = frozenset()  # parts that stay on the CPU
        self.nfe = 0  # denoiser forwards so far, in samples
        self._base: list[Tensor] | None = None

    # --- acting --------------------------------------------------------------------------------------------------------

    def start(self, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Latents (N, ...) at which a chain begins, of standard normal noise (N, ...) at its time sigma (N,): here the noise itself."""
        del sigma, condition
        return noise

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0, *, through_guidance: bool = False) -> Tensor:
        """The model's prediction (N, ...) float32 at x (N, ...), times sigma (N,).

        With classifier-free guidance both halves are batches of N of their own, in rollout and replay alike, and `Family.guide` joins them.
        The unconditional half stays outside the autograd graph, unless gradients are to flow `through_guidance`.
        """
        conditional = self._forward(x, sigma, condition.positive())
        if guidance == 1.0:
            return conditional
        if condition.negative is None:
            raise UserError(f"guidance {guidance:g}: {self.name} has no unconditional half to guide away from; use guidance 1")
        with torch.set_grad_enabled(through_guidance and torch.is_grad_enabled()):
            unconditional = self._forward(x, sigma, condition.unconditional())
        return self.family.guide(conditional, unconditional, guidance, sigma)

    def _forward(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.nfe += len(x)
        with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
            return self.family.forward(self.network, x, sigma, condition).float()

    def to(self, device: torch.device | str) -> Policy:
        self.device = torch.device(device)
        for name, module in self.family.modules().items():
            module.to("cpu" if name in self.resting else self.device)
        return self

    # --- learning ------------------------------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
        """Train an adapter alone: W + (alpha / rank)·B·A on the family's attention layers, Gaussian A, B = 0 (2106.09685)."""
        from peft import LoraConfig

        names = list(targets or self.family.lora_targets)
        network: Any = self.family.network
        network.requires_grad_(False)
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian", "target_modules": names}
        network.add_adapter(LoraConfig(**settings))
        for parameter in self.trainable():
            parameter.data = parameter.data.float()  # the base may be in half precision, what learns never is
        self.lora = True

    def train_weights(self, parts: Sequence[str] = ()) -> None:
        """Train the weights whose names contain one of `parts`, or all of them, and no adapter.

        Raises:
            ValueError: one of `parts` is in no weight's name.
        """
        weights = dict(self.family.network.named_parameters())
        for part in parts:
            if not any(part in name for name in weights):
                raise ValueError(f"no weight has {part!r} in its name; names look like {next(iter(weights))}, {next(reversed(weights))}")
        for name, parameter in weights.items():
            parameter.requires_grad_(not parts or any(part in name for part in parts))

    def merge(self) -> None:
        """Add the adapter to the weights that it wraps, for good; without one nothing happens."""
        if self.lora:
            network: Any = self.family.network
            network.fuse_lora()
            network.unload_lora()
            self.lora = False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, a third more time."""
        network: Any = self.family.network
        network.enable_gradient_checkpointing()
        network.train()  # diffusers checkpoints in training mode only; these networks have no dropout

    def blocks(self) -> list[nn.Module]:
        """The modules that repeat in the network, which are compiled, quantised and sharded one by one.

        Raises:
            UserError: it says of none that it repeats.
        """
        found = repeated(self.family.network)
        if not found:
            raise UserError(f"policy: the network of {self.name} has no repeated blocks to compile or to quantise")
        return found

    def attend_by(self, backend: str) -> None:
        """Use a backend of diffusers' dispatcher, which `attention.settled` has tried, in every attention of the network."""
        attention.apply(self.family.network, backend)

    def compile(self) -> None:
        """Compile each repeated block, at its first call; rollout and replay then agree within rounding, no longer to the bit."""
        for block in self.blocks():
            block.compile()

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.family.network.parameters() if p.requires_grad]

    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.family.network.named_parameters() if p.requires_grad}

    def keep_reference(self) -> None:
        """Remember the weights as they are now, as the reference; with LoRA nothing needs to be kept."""
        if not self.lora:
            self._base = [p.detach().clone() for p in self.trainable()]

    @property
    def has_reference(self) -> bool:
        """Whether `reference` can be entered."""
        return self.lora or self._base is not None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model before training: adapter off, or the remembered weights in place of the current ones."""
        network: Any = self.family.network
        if self.lora:
            network.disable_adapters()
            try:
                yield
            finally:
                network.enable_adapters()
        elif self._base is None:
            raise RuntimeError("no reference was kept: call keep_reference() before training")
        else:
            with swapped(self.trainable(), self._base):
                yield


@torch.no_grad()
def interpolated(first: Policy, second: Policy, share: float) -> dict[str, Tensor]:
    """Weights (1 - share)·first + share·second of the networks, for `load_state_dict`, to trade what one was trained for against the other.

    As in diversity-rewarded CFG distillation (arXiv 2410.06084). 0 and 1 are the ends to the bit. Adapters are merged first, in both: the
    product of averaged factors is not the average of the products.

    Raises:
        UserError: the networks are not alike.
    """
    first.merge()
    second.merge()
    here, there = (policy.family.network.state_dict() for policy in (first, second))
    if {name: value.shape for name, value in here.items()} != {name: value.shape for name, value in there.items()}:
        raise UserError(f"{first.name} and {second.name} have other networks; only weights of one architecture can be interpolated")
    return {name: value.lerp(there[name].to(value), share) if value.is_floating_point() else value for name, value in here.items()}
