"""Adversarial reward: a head on frozen DINO features learns, during training, to tell the policy's pictures from reference pictures.

Adv-GRPO (arXiv 2511.20256). Differs from the authors' code:

1. features have one length in training and in scoring (theirs are normalised in scoring alone, so that the bias is most of the reward);
2. both sides pass through 8 bits, the same size and the same colour jitter: a codec is the first thing that a discriminator learns;
3. the patches that score are chosen once per version, not for every picture, so that a score is a function of its picture;
4. pictures of the past are shown again, and a head that is right too often waits; a prompt without references is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.references import References, resized
from visalign.replay import Features, Replay
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.vision import Pixels, load_vision_encoder

HIDDEN, BATCH = 512, 64  # width of the head; pictures per forward of an update


class Adversarial(Reward):
    """λ · h(f) + (1 - λ) · mean_j h(f_j) with a trainable head h on frozen features, differentiable; an unbounded logit.

    The head is linear, GELU, linear; f are features of the picture and f_j of S patches, all of length √D.
    `update` takes Adam steps (betas 0.5, 0.999) on one of

        hinge:    ½ E relu(1 - h(real)) + ½ E relu(1 + h(fake))
        pairwise: E -log σ(h(real) - h(fake)) over pairs of one prompt

    of whole pictures, plus `patch_loss` times the same of patches.

    Args:
        checkpoint, resolution: see `visalign.vision.load_vision_encoder`; checkpoint "pixels": no encoder but `visalign.vision.Pixels`, for
            looks (a palette, a ground) that an encoder of meaning ignores; its resolution is 32, at which no fine pattern can pass for one.
        references, count: see `visalign.references.References`.
        loss: which of the two.
        image_weight: λ.
        patches: S, at most the encoder's.
        select: the S patches of a score: "random" ones, the same for all pictures of a version, or each picture's "top" S logits.
        patch_loss: weight of the patches' loss.
        lr, steps: of Adam; steps per update.
        every: calls of `update` per update.
        schedule: "trigger" updates only when generated pictures score above the references on average, which is when the head is being
            exploited (and once at first, when there is nothing to exploit).
        max_accuracy: no update while the head is right more often than this: rewards of a perfect judge are flat. None: always.
        r1: weight of ½ E‖∇h(f)‖² at real pictures.
        jitter: size of the colour jitter on both sides of an update.
        replay: generated pictures of the past that are kept, a uniform sample of all; 0 keeps none.
        eight_bits: scores round pictures to 8 bits as files are, with gradients straight through.
        seed: of the head's first weights and of everything drawn.
        head: a checkpoint of a run (its folder, or the rewards.safetensors in it) to start from; None for a head that has learned nothing.

    Raises:
        UserError: a bad option, a checkpoint that cannot be loaded, or (in `update`) a prompt without references.
    """

    spec = RewardSpec("adversarial", "0", differentiable=True, trainable=True, licence="Apache-2.0", model_id="facebook/dinov2-base")

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        references: str | None = None,
        count: int = 8,
        resolution: int | None = None,
        loss: Literal["hinge", "pairwise"] = "hinge",
        image_weight: float = 0.7,
        patches: int = 64,
        select: Literal["random", "top"] = "random",
        patch_loss: float = 0.3,
        lr: float = 1e-4,
        steps: int = 1,
        every: int = 1,
        schedule: Literal["always", "trigger"] = "always",
        max_accuracy: float | None = 0.95,
        r1: float = 0.0,
        jitter: float = 0.02,
        replay: int = 256,
        eight_bits: bool = True,
        seed: int = 0,
        head: str | None = None,
    ):
        if not 0 <= image_weight <= 1:
            raise UserError(f"adversarial: image_weight must be in [0, 1], got {image_weight}")
        if min(patches, steps, every) < 1:
            raise UserError(f"adversarial: patches, steps and every must be at least 1, got {patches}, {steps}, {every}")
        self.loss, self.image_weight, self.select, self.patch_loss = loss, image_weight, select, patch_loss
        self.steps, self.every, self.schedule, self.max_accuracy = steps, every, schedule, max_accuracy
        self.r1, self.jitter, self.eight_bits, self.seed = r1, jitter, eight_bits, seed
        self.encoder = Pixels(resolution or 32) if checkpoint == "pixels" else load_vision_encoder(checkpoint, resolution)
        self.patches = min(patches, math.prod(self.encoder.grid))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(self.encoder.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1)).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr, betas=(0.5, 0.999))
        self.replay = Replay(replay, self.patches, self.encoder.width)
        self.references = References("adversarial", references, count, lambda images: ((images * 255).round().byte(),))
        self.calls = 0
        if head:
            self.load_state_dict(_saved(Path(head).expanduser()))

    # --- scoring -------------------------------------------------------------------------------------------------------

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; dense (N, h, w) of patch logits; embeddings "adversarial" (N, D); `info["version"]` of the head."""
        image, patches = self._see(_eight_bits(batch.images) if self.eight_bits else batch.images)
        whole, logits = self._logits(image), self._logits(patches)
        if self.select == "top":
            patch = logits.topk(self.patches, 1).values.mean(1)
        else:
            chosen = torch.randperm(logits.shape[1], generator=self._generator(int(self.spec.version)))[: self.patches]
            patch = logits[:, chosen.to(logits.device)].mean(1)
        return RewardOutput.of(
            self.image_weight * whole + (1 - self.image_weight) * patch,
            components={"image": whole, "patch": patch},
            dense=logits.unflatten(1, self.encoder.grid),
            embeddings={"adversarial": image.detach()},
            info={"version": self.spec.version},
        )

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) and (N, P, D) of length √D: entries near 1, as the head's first weights expect them."""
        seen = self.encoder.encode(images)
        return seen.image * self.encoder.width**0.5, seen.patches * self.encoder.width**0.5

    def _logits(self, features: Tensor) -> Tensor:
        """(..., D) -> (...); without autocast, which would leave 8 bits of a logit."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features).squeeze(-1)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        if self.references.draw is not None:
            self.references.prepare(prompts, metadata)

    # --- training ------------------------------------------------------------------------------------------------------

    def real(self, batch: RewardInput) -> RewardInput:
        """The references of a batch's prompts, each prompt's once, in the size of the batch's pictures."""
        found = self.references(batch)
        rows = list({id(kept): row for row, kept in enumerate(found)}.values())
        height, width = batch.images.shape[-2:]
        images = [resized(found[row][0].to(batch.images.device).float() / 255, (height, width)) for row in rows]
        owner = [row for row, own in zip(rows, images, strict=True) for _ in own]
        return RewardInput(torch.cat(images), [batch.prompts[row] for row in owner], [batch.metadata[row] for row in owner])

    def update(self, real: RewardInput, fake: RewardInput) -> dict[str, float]:
        """One update of the head, if its schedule says so.

        Returns `d_loss`, `d_accuracy` and the mean scores `real` and `fake` before it, `updated` (0 or 1) and the `version` after it.
        """
        self.calls += 1
        generator = self._generator(-self.calls)
        reals, fakes = self._features(real, generator), self._features(fake, generator)
        with torch.no_grad():
            scores = self._rate(reals), self._rate(fakes)
            accuracy = self._accuracy(*scores, reals.prompt, fakes.prompt)
            metrics = {"d_loss": self._loss(reals, fakes), "d_accuracy": accuracy, "real": scores[0].mean(), "fake": scores[1].mean()}
        found = {name: value.item() for name, value in metrics.items()}
        due = self.calls % self.every == 0 and (self.max_accuracy is None or found["d_accuracy"] <= self.max_accuracy)
        if self.schedule == "trigger" and self.spec.version != "0":
            due = due and found["fake"] > found["real"]
        if due:
            seen = self.replay.sample(len(fake) // 2, generator)
            self._train(reals, Features(*(torch.cat([getattr(fakes, n), getattr(seen, n)]) for n in ("image", "patches", "prompt"))))
            self.spec = replace(self.spec, version=str(int(self.spec.version) + 1))
        self.replay.add(fakes, generator)
        return found | {"updated": float(due), "version": float(self.spec.version)}

    @torch.enable_grad()
    def _train(self, reals: Features, fakes: Features) -> None:
        self.head.requires_grad_(True)
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            loss = self._loss(reals, fakes)
            if self.r1:
                at = reals.image.clone().requires_grad_()
                (slope,) = torch.autograd.grad(self._logits(at).sum(), at, create_graph=True)
                loss = loss + self.r1 / 2 * slope.square().sum(-1).mean()
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.head.requires_grad_(False)

    @torch.no_grad()
    def _features(self, batch: RewardInput, generator: torch.Generator) -> Features:
        """Features of jittered pictures, and of S patches of each, drawn without repeats."""
        pieces: list[tuple[Tensor, Tensor]] = []
        for images in batch.images.split(BATCH):
            image, patches = self._see(_eight_bits(_jittered(images, self.jitter, generator)))
            chosen = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, : self.patches].to(patches.device)
            pieces.append((image, patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))))
        image, patches = map(torch.cat, zip(*pieces, strict=True))
        return Features(image, patches, torch.tensor([_number(prompt) for prompt in batch.prompts], device=image.device))

    def _rate(self, features: Features) -> Tensor:
        return self.image_weight * self._logits(features.image) + (1 - self.image_weight) * self._logits(features.patches).mean(1)

    def _loss(self, reals: Features, fakes: Features) -> Tensor:
        sides = [(self._logits(f.image), self._logits(f.patches)) for f in (reals, fakes)]
        if self.loss == "hinge":
            whole, patch = (((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2 for real, fake in zip(*sides, strict=True))
        else:
            same = reals.prompt[:, None] == fakes.prompt
            margins = (real[:, None] - fake for real, fake in ((sides[0][0], sides[1][0]), (sides[0][1].mean(1), sides[1][1].mean(1))))
            whole, patch = (F.softplus(-margin[same]).mean() for margin in margins)
        return whole + self.patch_loss * patch

    def _accuracy(self, real: Tensor, fake: Tensor, real_prompt: Tensor, fake_prompt: Tensor) -> Tensor:
        if self.loss == "hinge":
            return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return (real[:, None] > fake)[real_prompt[:, None] == fake_prompt].float().mean()

    # --- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Head, optimizer, pictures of the past, and [version, calls] in `counts`."""
        state = {"counts": torch.tensor([int(self.spec.version), self.calls])}
        state |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        state |= {f"replay.{name}": value for name, value in self.replay.state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        return state | {f"optimizer.{n}.{name}": value for n, values in moments.items() for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        try:
            self.head.load_state_dict(_under("head.", state))
            self.replay.load_state_dict(_under("replay.", state))
            version, self.calls = state["counts"].tolist()
        except (KeyError, RuntimeError) as error:
            raise UserError(f"adversarial: the checkpoint's head is another; were options changed? ({str(error)[:60]!r})") from None
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", state).items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = value.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.spec = replace(self.spec, version=str(version))


def _saved(path: Path) -> dict[str, Tensor]:
    """The state of the one adversarial reward that a run's checkpoint holds."""
    file = path / "rewards.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adversarial: head {path} can't be read ({error}); expected a run's checkpoints/step_N") from None
    heads = {name.removesuffix("counts") for name in tensors if name.endswith("/counts")}
    if len(heads) != 1:
        raise UserError(f"adversarial: {file} holds {len(heads)} heads of adversarial rewards, expected one")
    return _under(heads.pop(), tensors)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _eight_bits(images: Tensor) -> Tensor:
    """Rounded as a file would be; gradients pass as if they weren't."""
    return images + ((images * 255).round() / 255 - images).detach()


def _jittered(images: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Contrast, colour cast and brightness of each picture, changed by about `size`."""
    noise = (size * torch.randn(3, len(images), 3, 1, 1, generator=generator)).to(images)
    return ((images - 0.5) * (1 + noise[0, :, :1]) + 0.5 + noise[1] / 2 + noise[2, :, :1] / 2).clamp(0, 1)


def _number(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
