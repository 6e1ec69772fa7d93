"""Published checkpoints at full size, on the meta device: their tensors' names and shapes are those that our loaders expect.

The tables in checkpoints/ say where their names are known from, and what could not be verified without the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visalign import qwen_reader
from visalign.rewards import hps3, image_reward, video_reward
from visalign.weights import collapsed, fitting

TABLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((Path(__file__).parent / "checkpoints").glob("*.json"))
}
RANK = 4  # for the shapes' "r"


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a table, without values; `{0..31}` in a name stands for a layer each."""
    table = TABLES[TABLES[name].get("like", name)]
    found: dict[str, Tensor] = {}
    for pattern, shape in table["tensors"].items():
        size = [RANK if side == "r" else side for side in shape]
        layers = re.search(r"\{0\.\.(\d+)\}", pattern)
        names = [pattern.replace(layers[0], str(n)) for n in range(int(layers[1]) + 1)] if layers else [pattern]
        found |= {name: torch.empty(size, device="meta") for name in names}
    return found


def open_clip_model(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import open_clip

    return published(name), open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()  # type: ignore[arg-type]


def transformers_model(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel

    return published(name), CLIPModel(CLIPConfig(**TABLES[name]["config"])).state_dict()


def aesthetic_head(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weight, bias = collapsed(published(name))
    return {"weight": weight, "bias": bias}, nn.Linear(768, 1).state_dict()


def blip(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from transformers import BlipConfig

    return image_reward.converted(published(name)), image_reward.Blip(BlipConfig(**image_reward.PUBLISHED)).state_dict()


def qwen(name: str, head: Callable[[int], nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config: Any = Qwen2VLConfig(**TABLES[name]["config"])
    layers = {f"{qwen_reader.HEAD}{key}": value for key, value in head(config.text_config.hidden_size).state_dict().items()}
    return qwen_reader.converted(published(name), 1.0), Qwen2VLModel(config).state_dict() | layers


LOADERS: dict[str, Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]]] = {
    "aesthetic": aesthetic_head,
    "clip_h": open_clip_model,
    "clip_l": transformers_model,
    "hps": open_clip_model,
    "hps3": lambda name: qwen(name, hps3.head),
    "image_reward": blip,
    "pickscore": transformers_model,
    "video_reward": lambda name: qwen(name, video_reward.head),
}


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_published_tensors_fit_our_models(name: str) -> None:
    with torch.device("meta"):
        found, expected = LOADERS[name](name)
    fitting(found, expected, name)


def test_every_table_has_a_loader_and_a_source() -> None:
    assert set(TABLES) == set(LOADERS)
    assert all(table["source"] and table["verified"] and table["file"] for table in TABLES.values())


def test_sizes_are_the_published_ones() -> None:
    """Parameters in millions, as model cards and papers give them."""
    counts = {name: sum(value.numel() for value in published(name).values()) / 1e6 for name in ("clip_h", "clip_l", "hps3", "image_reward")}
    for name, millions in {"clip_h": 986, "clip_l": 428, "hps3": 8295, "image_reward": 447}.items():
        assert counts[name] == pytest.approx(millions, rel=0.02), counts
