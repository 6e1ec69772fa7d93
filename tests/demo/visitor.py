"""A visitor of the demo without a browser: speaks its protocol over HTTP, as the page's script does."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import httpx

Message = dict[str, Any]


class Visitor:
    """A session of its own with the demo at an address."""

    def __init__(self, address: str):
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(base_url=address, timeout=60)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.http.get("config").json()

    def number(self, button: str) -> int:
        """Of the event that a button, named by its elem_id, triggers first."""
        there = next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == button)
        return next(d["id"] for d in self.config["dependencies"] if [there, "click"] in [list(target) for target in d["targets"]])

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
