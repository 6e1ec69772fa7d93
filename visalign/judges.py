"""Vision-language models as judges: what they say of pictures, as log-probabilities of words, of whole texts, or as text.

`LocalJudge` runs any image-text-to-text model of transformers in this process, with gradients to the pictures where the model's picture
processor can be repeated on tensors; `visalign.judge_client.ServerJudge` asks an OpenAI-compatible server the same questions. Rewards
write the questions; nothing here knows what is a good answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.features import loading, locate
from visalign.preprocess import Preprocess
from visalign.qwen_pixels import QwenPixels

CACHED_TEXTS = 4096  # tokenised texts kept; the oldest leave first
EIGHT_BITS = 0.05  # most that two picture pipelines may differ, in units of the normalised input: PIL rounds to 8 bits


@dataclass(frozen=True)
class Question:
    """What a judge is asked.

    Attributes:
        images: (3, H, W) each, in [0, 1], in the order in which they are shown, before the text.
        text: the question.
        answer: how the judge's answer begins, as if it had said so itself.
    """

    images: tuple[Tensor, ...]
    text: str
    answer: str = ""


@dataclass(frozen=True)
class Echo:
    """How likely a judge finds an answer: its `tokens` and their (L,) float32 log-probabilities, in nats."""

    tokens: list[str]
    log_probs: Tensor


class Judge(ABC):
    """A frozen vision-language model.

    Attributes:
        name: of the model, for records.
        differentiable: whether answers carry gradients to the pictures.
        last_error: why the last question failed that did; "" if none has.
    """

    name: str
    differentiable: bool = False
    last_error: str = ""

    def errors(self, scores: Tensor) -> list[str | None]:
        """Why scores (N,) made of this judge's answers are missing, for `info["errors"]`; None for those that are there."""
        return [None if there else self.last_error or "the picture isn't finite" for there in scores.isfinite().tolist()]

    @abstractmethod
    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        """(B, W) float32 log-probabilities that each answer goes on with each word, in any case; a row of NaN where it failed."""

    @abstractmethod
    def echo(self, questions: Sequence[Question]) -> list[Echo | None]:
        """How likely each question's `answer` is, token by token; None where it failed."""

    @abstractmethod
    def write(self, questions: Sequence[Question], most: int = 128) -> list[str | None]:
        """What the judge answers, at most so many tokens, without sampling; None where it failed."""


def load_judge(checkpoint: str, server: str | dict[str, Any] | None = None, batch: int = 16) -> Judge:
    """A judge in this process, or the one that a server has.

    Args:
        checkpoint: `toybox` or `toybox/vlm`; a folder or hub id that `AutoModelForImageTextToText` loads; with `server`, the name under
            which it has the model, or "auto" for the only one there is.
        server: address of an OpenAI-compatible server, such as http://localhost:8000/v1, or {url: …, key: …, timeout: …}: the options of
            `visalign.judge_client.ServerJudge`. None runs the model here.
        batch: questions per forward.

    Raises:
        UserError: no such model, or no such server.
    """
    if server is not None:
        from visalign.judge_client import ServerJudge

        options: dict[str, Any] = {"url": server} if isinstance(server, str) else dict(server)
        try:
            return ServerJudge(model=checkpoint, **options)
        except TypeError as error:
            raise UserError(f"server {options}: {str(error).removeprefix('ServerJudge.__init__() ')}; it needs url") from None
    name = locate(checkpoint, "vlm")
    judge = _loaded.get(name)
    if judge is None:
        judge = _loaded[name] = own_judge(checkpoint, batch)
    judge.batch = min(judge.batch, batch)  # who shares a model shares the memory that the most careful one leaves it
    return judge


def own_judge(checkpoint: str, batch: int = 16) -> LocalJudge:
    """A judge in this process that nobody else holds, to be trained: once its weights require gradients, its answers carry them."""
    with loading(checkpoint, "a vision-language model", "a folder of an image-text-to-text model, a server"):
        return LocalJudge(locate(checkpoint, "vlm"), batch)


_loaded: WeakValueDictionary[str, LocalJudge] = WeakValueDictionary()


class LocalJudge(nn.Module, Judge):
    """An image-text-to-text model of transformers in this process, frozen, in the dtype it is stored in."""

    def __init__(self, checkpoint: str, batch: int = 16):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__()
        self.name, self.batch = checkpoint, batch
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").eval().requires_grad_(False)
        self.tokenizer: Any = self.processor.tokenizer
        self.pixels = tensor_pixels(self.processor.image_processor)
        self.differentiable = self.pixels is not None
        self._encoded: dict[Any, dict[str, Tensor]] = {}
        self._vocabulary: dict[str, list[int]] = {}

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        groups = [self._ids_of(word) for word in words]
        found = [self._logits(part, 1)[:, -1] for part in self._batches(questions)]
        spoken = torch.cat(found).log_softmax(-1)
        return torch.stack([spoken[:, ids].logsumexp(-1) for ids in groups], 1)

    def echo(self, questions: Sequence[Question]) -> list[Echo | None]:
        found: list[Echo | None] = []
        for part in self._batches(questions):
            answers = [self._answer_ids(question) for question in part]
            most = max(len(ids) for ids in answers)
            spoken = self._logits(part, most + 1)[:, :-1].log_softmax(-1)
            for row, ids in zip(spoken, answers, strict=True):
                own = row[most - len(ids) :].gather(1, ids.to(row.device)[:, None])[:, 0]
                found.append(Echo([self.tokenizer.decode([n]).strip() for n in ids.tolist()], own))
        return found

    @torch.no_grad()
    def write(self, questions: Sequence[Question], most: int = 128) -> list[str | None]:
        found: list[str | None] = []
        for part in self._batches(questions):
            inputs = self._inputs(part)
            ids = self.model.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=self._pad)
            new = ids[:, inputs["input_ids"].shape[1] :]
            found += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found

    def train(self, mode: bool = True) -> LocalJudge:
        """Stays in evaluation mode, whatever module it is part of."""
        return super().train(False)

    # --- inside --------------------------------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def _batches(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        return [questions[n : n + self.batch] for n in range(0, len(questions), self.batch)]

    def _ids_of(self, word: str) -> list[int]:
        """Every token that reads as the word, however it is spaced and capitalised."""
        if not self._vocabulary:
            for n, text in enumerate(self.tokenizer.batch_decode([[n] for n in range(len(self.tokenizer))])):
                self._vocabulary.setdefault(text.strip().lower(), []).append(n)
        if word.lower() not in self._vocabulary:
            raise UserError(f"{self.name} has no token {word!r}; ask for words that its tokenizer keeps whole")
        return self._vocabulary[word.lower()]

    def _text(self, question: Question) -> str:
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + question.answer

    def _encode(self, text: str, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the processor makes of a text for pictures of these sizes: its (L,) sequences."""
        key = text, *(tuple(image.shape) for image in images)
        if key not in self._encoded:
            found = self.processor(text=[text], images=[list(map(_eight_bits, images))], return_tensors="pt")
            length = found["input_ids"].shape[1]
            self._encoded[key] = {name: value[0] for name, value in found.items() if value.shape == (1, length)}
            while len(self._encoded) > CACHED_TEXTS:
                del self._encoded[next(iter(self._encoded))]
        return self._encoded[key]

    def _answer_ids(self, question: Question) -> Tensor:
        """Tokens of the answer: where the text with it departs from the text without."""
        whole = self._encode(self._text(question), question.images)["input_ids"]
        bare = self._encode(self._text(Question(question.images, question.text)), question.images)["input_ids"]
        same = int((whole[: len(bare)] == bare[: len(whole)]).long().cumprod(0).sum())
        return whole[same:]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Texts padded on the left, so that every answer goes on at the last place, and the pictures of all of them."""
        device = next(self.model.parameters()).device
        rows = [self._encode(self._text(question), question.images) for question in questions]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._pad}
        inputs = {
            name: torch.stack([F.pad(row[name], (longest - len(row[name]), 0), value=fill.get(name, 0)) for row in rows]).to(device)
            for name in rows[0]
        }
        images = [image for question in questions for image in question.images]
        if self.pixels is not None:
            return inputs | self.pixels([image.to(device) for image in images])
        found = self.processor.image_processor(images=list(map(_eight_bits, images)), return_tensors="pt")
        return inputs | {name: value.to(device) for name, value in found.items()}

    def _logits(self, questions: Sequence[Question], keep: int) -> Tensor:
        """(B, keep, V) float32 logits at the last places."""
        inputs = self._inputs(questions)
        parameter = next(self.model.parameters())
        inputs = {name: value.to(parameter.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        learns = any(value.requires_grad for value in (*inputs.values(), *self.model.parameters()))
        with nullcontext() if learns else torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            return self.model(**inputs, logits_to_keep=keep).logits[:, -keep:].float()


def _eight_bits(image: Tensor) -> Any:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8 array, what every picture processor takes."""
    return (image.detach().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def tensor_pixels(processor: Any) -> Callable[[Sequence[Tensor]], dict[str, Tensor]] | None:
    """A picture processor repeated on tensors, with gradients: pictures to the model's inputs. None if it can't be repeated.

    It is tried against the processor itself on two sizes before it is trusted.
    """
    try:
        pixels = _qwen_pixels(processor) if hasattr(processor, "merge_size") else _plain_pixels(processor)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    generator = torch.Generator().manual_seed(0)
    for size in ((40, 56), (97, 64)):
        image = torch.rand(3, *size, generator=generator)
        image = (image * 255).round() / 255
        theirs = processor(images=[_eight_bits(image)], return_tensors="pt")
        ours = pixels([image])
        same = set(theirs) == set(ours) and all(theirs[name].shape == ours[name].shape for name in ours)
        if not same or any((theirs[name] - ours[name]).abs().max() > EIGHT_BITS for name in ours):
            return None
    return pixels


def _plain_pixels(processor: Any) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    preprocess = Preprocess.of(processor)
    return lambda images: {"pixel_values": torch.cat([preprocess(image[None]) for image in images])}


def _qwen_pixels(processor: Any) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    patches = QwenPixels.of(processor)

    def pixels(images: Sequence[Tensor]) -> dict[str, Tensor]:
        rows, grids = zip(*(patches(image[None]) for image in images), strict=True)
        return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.cat(grids)}

    return pixels
