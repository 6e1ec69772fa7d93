"""A reward of one's own: a network learns from pairs of pictures which of two is better.

Bradley–Terry, -log σ(r(better) - r(worse)), on log-odds, beside a small cross entropy that calls the better picture yes and the worse one
no, as RewardDance trains its pointwise judge (arXiv 2509.08826). Two kinds:

1. `yes_token`: a vision-language model; r is the log-odds of yes over no that `vlm_yes` reads. All its weights learn, or an adapter.
2. `head`: a small perceptron on the features of a frozen dual encoder, which `preference` reads; seconds instead of hours.

Pairs come from a file, or are drawn from the recipe's policy and labelled by its rewards (`visalign.feedback`): a verifier, or a judge's
ratings. Prompts are split by a hash into what is trained and what is held out.

Differs from RewardDance: the difference of log-odds stands in the sigmoid and not that of the probabilities, which is at most 1, so that
the loss could not fall below 0.31; the cross entropy is over yes and no alone; VideoAlign's ties (arXiv 2501.13918) are an option.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visalign import feedback, preferences
from visalign.config import Above, AtLeastZero, Fraction, LoraSection, Positive, validate
from visalign.config import Config as Recipe
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.features import load_dual_encoder
from visalign.heads import PreferenceHead
from visalign.judges import Question, own_judge
from visalign.loop import Loop, Session
from visalign.losses import Loss, bradley_terry
from visalign.noise import seed_for
from visalign.preferences import Pair
from visalign.questions import POINT, fill


class YesToken:
    """A vision-language model's log-odds of yes over no, asked as `vlm_yes` asks."""

    def __init__(self, checkpoint: str, lora: LoraSection | None, task: str, batch: int, device: torch.device):
        self.judge, self.task = own_judge(checkpoint, batch).to(device), task
        if lora:
            from peft import LoraConfig, get_peft_model

            settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.targets or "all-linear"}
            self.judge.model = get_peft_model(self.judge.model, LoraConfig(**settings))  # its own weights are in float32
        else:
            self.judge.model.float().requires_grad_(True)
        self.model: Any = self.judge.model
        self.network: nn.Module = self.model  # accelerate may wrap it; `model` stays bare

    def named_trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, pairs: Sequence[Pair]) -> Tensor:
        """(B, 2) log-odds."""
        self.judge.model = self.network
        questions = [Question((picture,), fill(POINT, pair.prompt, self.task)) for pair in pairs for picture in pair.load()]
        yes, no = self.judge.choose(questions, ("yes", "no")).unbind(1)
        return (yes - no).unflatten(0, (-1, 2))

    def save(self, folder: Path) -> None:
        """A complete model: what `vlm_yes` takes for its checkpoint."""
        merged = deepcopy(self.model).merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        merged.save_pretrained(folder)
        self.judge.processor.save_pretrained(folder)


class Head:
    """A perceptron on features of a frozen encoder; every picture is encoded once."""

    def __init__(self, checkpoint: str, hidden: int, device: torch.device):
        self.encoder = load_dual_encoder(checkpoint).to(device)
        self.head = PreferenceHead(checkpoint, self.encoder.encode_texts([""]).shape[1], hidden).to(device)
        self.network: nn.Module = self.head
        self._features: dict[Path, Tensor] = {}

    def named_trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.head.named_parameters())

    def __call__(self, pairs: Sequence[Pair]) -> Tensor:
        """(B, 2) log-odds."""
        image = torch.stack([feature for pair in pairs for feature in self._encoded(pair)])
        text = self.encoder.encode_texts([pair.prompt for pair in pairs]).repeat_interleave(2, 0)
        return self.network(image, text).unflatten(0, (-1, 2))

    @torch.no_grad()
    def _encoded(self, pair: Pair) -> list[Tensor]:
        if any(path not in self._features for path in pair.images):
            for path, picture in zip(pair.images, pair.load(), strict=True):
                self._features[path] = self.encoder.encode_images(picture[None])[0]  # alone, so that no batch leaves its rounding
        return [self._features[path] for path in pair.images]

    def save(self, folder: Path) -> None:
        """What `preference` takes for its checkpoint."""
        self.head.save(folder)


class RewardModel(Loop):
    """Draw pairs, compare, learn; the trained reward is RUN/reward, of the averaged weights if there are any."""

    class Config(feedback.Source):
        kind: Literal["yes_token", "head"] = "yes_token"
        checkpoint: str = "toybox"  # yes_token: a vision-language model; head: a dual encoder (CLIP, SigLIP)
        batch: Positive = 32  # pairs a step, over all processes
        micro_batch: Positive = 32  # pairs per forward
        cross_entropy: AtLeastZero = 0.1  # weight; it also fixes the constant that comparisons leave free
        ties: Above | None = None  # Rao-Kupper's k > 1, 5 in VideoAlign: pairs that tie are trained too; null: left out
        ema: Fraction | None = None  # decay of the averaged weights; null: none
        lora: LoraSection | None = None  # yes_token: train an adapter (no targets: all linear layers); null: all weights
        task: str = "alignment"  # yes_token: what to look at, as in vlm_yes
        hidden: Positive = 256  # head: its hidden units

    @classmethod
    def of(cls, config: Recipe, processes: Processes, session: Callable[[], Session]) -> Self:
        return cls(config, processes, feedback.obtain(config, validate(cls.Config, config.trainer.options, "trainer"), processes, session))

    def __init__(self, config: Recipe, processes: Processes, pairs: Sequence[Pair]):
        super().__init__(config, processes)
        chosen = self.settings
        if chosen.ties is not None and chosen.ties <= 1:
            raise UserError(f"trainer.ties={chosen.ties:g}: expected above 1 (VideoAlign's is 5), or null to leave ties out")
        if chosen.batch % processes.count:
            raise UserError(f"trainer.batch={chosen.batch} can't be split over {processes.count} processes; use a multiple")
        known = (0, 1) if chosen.ties is None else (0, 1, "tie")
        self.train_pairs, self.test_pairs = preferences.split([pair for pair in pairs if pair.better in known], chosen.held_out)
        torch.manual_seed(config.run.seed)  # first weights of a head or an adapter
        self.scorer = (
            Head(chosen.checkpoint, chosen.hidden, self.device)
            if chosen.kind == "head"
            else YesToken(chosen.checkpoint, chosen.lora, chosen.task, 2 * chosen.micro_batch, self.device)
        )
        self.learns(self.scorer, chosen.ema)

    def fit(self) -> Path:
        folder = super().fit()
        if self.processes.main:
            with self.averaged():
                self.scorer.save(folder / "reward")
        self.processes.wait()
        return folder

    def step(self, step: int) -> dict[str, float]:
        started, settings = time.perf_counter(), self.settings
        torch.manual_seed(seed_for(self.config.run.seed, self.processes.rank, step))
        pairs = preferences.drawn(self.train_pairs, settings.batch, self.config.run.seed, step)
        own = pairs[self.processes.shard(settings.batch, "trainer.batch")]
        rate = self.set_learning_rate(step)
        metrics = self.update([own[n : n + settings.micro_batch] for n in range(0, len(own), settings.micro_batch)])
        spent = {"seconds": time.perf_counter() - started, "images": 2 * settings.batch}
        return {name: value.item() for name, value in metrics.items()} | {"lr": rate} | spent

    def loss(self, batch: Sequence[Pair]) -> Loss:
        """Bradley–Terry and cross entropy; beside them accuracy, margin and the scores' spread, whose collapse RewardDance warns of."""
        scores = self.scorer(batch)
        better, worse, tied = ordered(batch, scores)
        compared = bradley_terry(better - worse, tied, self.settings.ties or 1.0).mean()
        called = torch.where(tied, 0.0, F.softplus(-better) + F.softplus(worse)).mean()
        right = ((better > worse) & ~tied).sum() / (~tied).sum().clamp_min(1)
        metrics = {"loss/preference": compared, "accuracy": right, "margin": (better - worse).mean(), "spread": scores.std(correction=0)}
        return Loss(compared + self.settings.cross_entropy * called, {name: value.detach() for name, value in metrics.items()})

    @torch.no_grad()
    def examine(self, step: int, scan: bool) -> dict[str, float]:
        """On the held-out pairs: see `quality`."""
        del step
        own, size = self.processes.share(self.test_pairs), self.settings.micro_batch
        scores = torch.cat([self.scorer(own[n : n + size]) for n in range(0, len(own), size)])
        found = quality(self.test_pairs, self.processes.gather(scores)[: len(self.test_pairs)].cpu())
        counts = {"pairs/train": len(self.train_pairs), "pairs/held_out": len(self.test_pairs)} if scan else {}
        return {f"eval/{name}": value for name, value in found.items()} | counts


def ordered(pairs: Sequence[Pair], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, 2) as those of the better and of the worse pictures, (B,) each, and which pairs tie, (B,) bool."""
    first = torch.tensor([pair.better != 1 for pair in pairs], device=scores.device)
    tied = torch.tensor([pair.better == "tie" for pair in pairs], device=scores.device)
    a, b = scores.unbind(1)
    return torch.where(first, a, b), torch.where(first, b, a), tied


def quality(pairs: Sequence[Pair], scores: Tensor) -> dict[str, float]:
    """How well scores (P, 2) predict preferences: `accuracy` and its standard `error`, `loss` in nats, `spread` of P(yes) over pictures,
    and `accuracy/ASPECT` against every judge that scored the pairs and found a difference."""
    better, worse, tied = ordered(pairs, scores)
    margin = (better - worse)[~tied]
    right = (margin > 0).float().mean().item()
    found = {"accuracy": right, "error": math.sqrt(right * (1 - right) / max(1, len(margin)))}
    found |= {"loss": F.softplus(-margin).mean().item(), "spread": scores.sigmoid().std(correction=0).item()}
    aspects = list(dict.fromkeys(name for pair in pairs for name in pair.scores))
    for name in aspects if len(aspects) > 1 else []:
        said = torch.tensor([pair.scores.get(name, (math.nan, math.nan)) for pair in pairs])
        theirs = said[:, 1] - said[:, 0]
        differ = theirs.abs() > 0
        found[f"accuracy/{name}"] = ((scores[:, 1] > scores[:, 0]) == (theirs > 0))[differ].float().mean().item()
    return found
