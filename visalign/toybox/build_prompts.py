"""The toybox's prompt lists: every composition once, split into train and held-out test; those of a subject are a part of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from visalign.toybox import scenes


def build(out: Path, work: Path, device: torch.device) -> None:
    """Write `out`/prompts_train.jsonl and prompts_test.jsonl, and their prompts with a star as star_train.jsonl and star_test.jsonl."""
    del work, device
    out.mkdir(parents=True, exist_ok=True)
    for name, test in (("train", False), ("test", True)):
        records: list[dict[str, Any]] = [{"prompt": scenes.describe(m)} | m for kind in scenes.prompts(test).values() for m in kind]
        stars = [record for record in records if any(clause["class"] == "star" for clause in record["include"])]
        for stem, rows in (("prompts", records), ("star", stars)):
            (out / f"{stem}_{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
