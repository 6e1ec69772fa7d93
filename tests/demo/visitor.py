"""A visitor of the demo without a browser: speaks its protocol over HTTP, as the page's script does."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx

Message = dict[str, Any]


@functools.cache
def config(address: str) -> dict[str, Any]:
    """What the page at an address consists of; the same for every visitor."""
    return httpx.get(f"{address}config", timeout=120).json()


class Visitor:
    """A session of its own with the demo at an address."""

    def __init__(self, address: str):
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(base_url=address, timeout=120)

    def number(self, button: str) -> int:
        """Of the event that a button, named by its elem_id, triggers first."""
        page = config(str(self.http.base_url))
        there = next(c["id"] for c in page["components"] if c["props"].get("elem_id") == button)
        return next(d["id"] for d in page["dependencies"] if [there, "click"] in [list(target) for target in d["targets"]])

    def press(self, button: str, *values: Any) -> list[Message]:
        """All that the server says until the event is over; the last message holds the answer."""
        body = {"data": list(values), "fn_index": self.number(button), "session_hash": self.session, "trigger_id": None}
        joined = self.http.post("gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return [{"msg": "refused", "output": joined.json()}]
        return list(self._messages())

    def _messages(self) -> Iterator[Message]:
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line.removeprefix("data:"))
                    yield message
                    if message["msg"] == "process_completed":
                        return
