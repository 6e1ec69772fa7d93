"""Judges behind an OpenAI-compatible server (vLLM, SGLang): the same questions as in process, asked side by side over HTTP.

A question that fails after its retries is invalid, never a score. A server that fails again and again is left alone for a while (a circuit
breaker), so that a dead one costs a training step milliseconds instead of minutes.
"""

from __future__ import annotations

import base64
import io
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import urllib3
from PIL import Image
from torch import Tensor
from urllib3.exceptions import HTTPError

from visalign.errors import UserError
from visalign.judges import Echo, Judge, Question

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 20.0  # seconds between two attempts
Answer = TypeVar("Answer")


class JudgeError(RuntimeError):
    """One question could not be answered."""


class ServerJudge(Judge):
    """A judge that a server runs; not differentiable.

    Args:
        url: base of the OpenAI protocol, such as http://localhost:8000/v1.
        model: the served name; "auto" for the only one there is.
        key: sent as a bearer token, if given.
        concurrency: requests under way at once.
        retries: further attempts after a time-out, a lost connection or a status such as 429 or 503, with doubling waits.
        timeout: seconds for one attempt.
        breaker: questions that fail in a row until the server is left alone.
        cooldown: seconds for which it then is.
        top: log-probabilities asked for at a place; 20 is what servers allow unless told otherwise.

    Raises:
        UserError: no such server, or it doesn't serve the model.
    """

    def __init__(
        self,
        url: str,
        model: str = "auto",
        key: str | None = None,
        concurrency: int = 32,
        retries: int = 4,
        timeout: float = 60.0,
        breaker: int = 8,
        cooldown: float = 30.0,
        top: int = 20,
    ):
        self.url, self.retries, self.breaker, self.cooldown, self.top = url.rstrip("/"), retries, breaker, cooldown, top
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = urllib3.PoolManager(maxsize=concurrency, headers=headers, timeout=timeout, retries=False)
        self.pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self.lock = threading.Lock()
        self.failed, self.closed_until, self.warned = 0, 0.0, False
        self.name = self._served(model)

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        more = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top}
        rows = self._ask(questions, more, lambda reply: _masses(reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"], words))
        nothing = [math.nan] * len(words)
        return torch.tensor([nothing if row is None else row for row in rows], dtype=torch.float32).reshape(len(questions), len(words))

    def echo(self, questions: Sequence[Question]) -> list[Echo | None]:
        """Needs vLLM's extension `prompt_logprobs`."""
        bare = [Question(question.images, question.text) for question in questions]
        count = lambda reply: len(_prompt_tokens(reply))  # noqa: E731
        more = {"max_tokens": 1, "prompt_logprobs": 1}
        starts = self._ask(bare, more, count)
        wholes = self._ask(questions, more, _prompt_tokens)
        return [None if whole is None or start is None else _echo(whole[start:]) for start, whole in zip(starts, wholes, strict=True)]

    def write(self, questions: Sequence[Question], most: int = 128) -> list[str | None]:
        return self._ask(questions, {"max_tokens": most}, lambda reply: str(reply["choices"][0]["message"]["content"]).strip())

    # --- inside --------------------------------------------------------------------------------------------------------

    def _served(self, model: str) -> str:
        try:
            reply = self.http.request("GET", f"{self.url}/models")
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {reply.data[:200].decode(errors='replace')}")
            names = [entry["id"] for entry in reply.json()["data"]]
        except (HTTPError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"no judge answers at {self.url} ({reason}); start the server, or give another url") from None
        if model == "auto" and len(names) == 1:
            return names[0]
        if model not in names:
            raise UserError(f"{self.url} doesn't serve {model!r}; it serves {', '.join(names) or 'nothing'}")
        return model

    def _ask(self, questions: Sequence[Question], more: dict[str, Any], read: Callable[[Any], Answer]) -> list[Answer | None]:
        """What `read` makes of every reply; None where it failed."""
        pictures = {id(image): image for question in questions for image in question.images}
        urls = dict(zip(pictures, self.pool.map(_data_url, pictures.values()), strict=True))
        bodies = [self._body(question, urls) | more for question in questions]
        return list(self.pool.map(lambda body: self._answer(body, read), bodies))

    def _body(self, question: Question, urls: dict[int, str]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in question.images]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
        body = {"model": self.name, "messages": messages, "temperature": 0}
        if question.answer:
            messages.append({"role": "assistant", "content": question.answer})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body

    def _answer(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer | None:
        if time.monotonic() < self.closed_until:
            return None
        try:
            found = read(self._post(body))
        except (JudgeError, KeyError, IndexError, TypeError, ValueError) as error:
            unread = f"an answer that can't be read ({type(error).__name__}: {error})"
            self._count(str(error) if isinstance(error, JudgeError) else unread)
            return None
        with self.lock:
            self.failed, self.warned = 0, False
        return found

    def _count(self, error: str) -> None:
        """One more failure in a row; said once, and after too many the server is left alone."""
        with self.lock:
            self.failed, self.last_error = self.failed + 1, f"{self.url}: {error}"
            if self.failed >= self.breaker:
                self.closed_until = time.monotonic() + self.cooldown
            if not self.warned:
                self.warned = True
                warnings.warn(f"judge {self.last_error}; its scores are invalid until it answers again", stacklevel=2)

    def _post(self, body: dict[str, Any]) -> Any:
        error, wait, attempt = "", 0.0, 0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
            wait = min(LONGEST_WAIT, 0.25 * 2**attempt)
            try:
                reply = self.http.request("POST", f"{self.url}/chat/completions", json=body)
            except HTTPError as problem:
                error = f"{type(problem).__name__}: {problem}"
                continue
            if reply.status == 200:
                return reply.json()
            error = f"status {reply.status}: {reply.data[:200].decode(errors='replace')}"
            if reply.status not in RETRIED:
                break
            asked = reply.headers.get("retry-after", "")  # seconds, or a date, which is passed over
            wait = min(LONGEST_WAIT, float(asked) if asked.isdigit() else wait)
        raise JudgeError(f"{error} (after {attempt + 1} attempts)")


def _data_url(image: Tensor) -> str:
    """(3, H, W) in [0, 1] as a PNG in a data URL."""
    pixels = (image.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _masses(listed: Sequence[dict[str, Any]], words: Sequence[str]) -> list[float]:
    """Log-probability of each word over the tokens that read as it; of one that isn't listed, at most that of the last token listed."""
    found = {str(entry["token"]).strip().lower(): -math.inf for entry in listed}
    for entry in listed:
        word, value = str(entry["token"]).strip().lower(), float(entry["logprob"])
        high, low = max(found[word], value), min(found[word], value)
        found[word] = high + math.log1p(math.exp(low - high))
    if not any(word.lower() in found for word in words):
        raise JudgeError(f"none of {', '.join(words)} is among its first {len(listed)} tokens")
    least = min(float(entry["logprob"]) for entry in listed)
    return [found.get(word.lower(), least) for word in words]


def _prompt_tokens(reply: Any) -> list[tuple[str, float]]:
    """(token, log-probability) at every place of the prompt; the first has none."""
    places = reply["prompt_logprobs"]
    if places is None:
        raise JudgeError("the server sends no prompt_logprobs: it must be a vLLM that allows them")
    # The first entry of a place is the token itself, the others are likelier ones.
    firsts = [next(iter(place.values())) if place else {"decoded_token": "", "logprob": 0.0} for place in places]
    return [(str(entry["decoded_token"]), float(entry["logprob"])) for entry in firsts]


def _echo(tokens: Sequence[tuple[str, float]]) -> Echo | None:
    return Echo([token.strip() for token, _ in tokens], torch.tensor([value for _, value in tokens])) if tokens else None
