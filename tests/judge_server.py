"""A real HTTP server on loopback that speaks the OpenAI protocol for a judge in this process, well or badly."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visalign.judges import LocalJudge, Question


@dataclass
class JudgeServer:
    """What the server does with the next requests: `manners` are "garbage", "slow" or a status code; when they are used up it is good."""

    url: str
    manners: list[str | int] = field(default_factory=list)
    requests: int = 0


def _picture(url: str) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _question(messages: list[dict[str, Any]]) -> Question:
    content = messages[0]["content"]
    images = tuple(_picture(part["image_url"]["url"]) for part in content if part["type"] == "image_url")
    (text,) = [part["text"] for part in content if part["type"] == "text"]
    return Question(images, text, messages[1]["content"] if len(messages) > 1 else "")


def _reply(judge: LocalJudge, body: dict[str, Any], everything: bool) -> dict[str, Any]:
    question = _question(body["messages"])
    name = lambda n: judge.tokenizer.decode([n])  # noqa: E731
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": judge.write([question], body["max_tokens"])[0]}}
    if body.get("logprobs"):
        values, ids = judge._logits([question], 1)[0, -1].log_softmax(-1).topk(len(judge.tokenizer) if everything else body["top_logprobs"])
        listed = [{"token": name(n), "logprob": v} for v, n in zip(values.tolist(), ids.tolist(), strict=True)]
        choice["logprobs"] = {"content": [listed[0] | {"top_logprobs": listed}]}
    reply: dict[str, Any] = {"choices": [choice]}
    if "prompt_logprobs" in body:
        ids = judge._inputs([question])["input_ids"][0]
        spoken = judge._logits([question], len(ids))[0].log_softmax(-1)
        own = spoken[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        places = [{str(n): {"logprob": v, "decoded_token": name(n)}} for n, v in zip(ids[1:].tolist(), own, strict=True)]
        reply["prompt_logprobs"] = [None, *places]
    return reply


@contextmanager
def serving(judge: LocalJudge, slow: float = 2.0, everything: bool = False) -> Iterator[JudgeServer]:
    """The server, until the block ends; with `everything` it lists all tokens, however few are asked for."""
    lock, stopped = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            del args

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

        def do_POST(self) -> None:
            if stopped.is_set():  # the process is gone, and with it connections that were kept open
                self.close_connection = True
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests += 1
                manner = state.manners.pop(0) if state.manners else "good"
            if isinstance(manner, int):
                self.send(manner, b"busy")
            elif manner == "garbage":
                self.send(200, b'{"choices": []}')
            else:
                if manner == "slow":
                    time.sleep(slow)
                with lock:
                    found = json.dumps(_reply(judge, body, everything)).encode()
                with suppress(OSError):  # the client may have gone
                    self.send(200, found)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
