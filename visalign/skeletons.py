"""Policies without weights, on the meta device: from a pipeline's folder, or for models that can't be reached from their published
configurations, which are kept in assets/models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visalign import registry
from visalign.config import PolicySection
from visalign.errors import UserError
from visalign.ledger import META
from visalign.policy import Policy, quiet_loading
from visalign.rollout import Condition

KNOWN = "models"  # folder of the assets


@dataclass(frozen=True)
class Skeleton:
    """A policy on the meta device.

    Attributes:
        policy: its network is whole, and so is what decodes its latents.
        condition: of one prompt.
        encoders: name -> weights of what encodes prompts.
        source: where its shapes are from, in words.
    """

    policy: Policy
    condition: Condition
    encoders: dict[str, int]
    source: str


def skeleton(section: PolicySection) -> Skeleton:
    """Of a recipe's policy, before anything learns.

    Raises:
        UserError: neither a folder nor a model whose configuration is known.
    """
    options = dict(section.options) | ({"resolution": section.resolution} if section.resolution else {})
    if section.model.startswith("toybox"):
        options = {"max_sequence_length": 10} | options  # as it is loaded
    path = Path(registry.resolve_model(section.model))
    if (path / "model_index.json").is_file():
        return _of_folder(section, path, options)
    return of_known(section, options)


def known() -> dict[str, dict[str, Any]]:
    """hub id -> record, of the models whose configurations are kept."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(registry.asset(KNOWN).glob("*.json"))]
    return {record["id"]: record for record in records}


def _of_folder(section: PolicySection, path: Path, options: dict[str, Any]) -> Skeleton:
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    with quiet_loading():
        listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] and name != "safety_checker"}
        parts = {name: _part(path, name, *entry) for name, entry in listed.items()}
    policy = _policy(section, index["_class_name"], parts, options)
    try:
        condition = policy.family.encode(["a plan"])
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: its text encoders can't be followed without weights ({' '.join(str(error).split())[:160]})") from None
    encoders = {name: _count(part) for name, part in policy.family.modules().items() if part is not policy.family.network and name != "vae"}
    return Skeleton(policy, condition, encoders, f"the configurations in {path}")


def _part(path: Path, name: str, library: str, kind: str) -> Any:
    """One component: modules without weights, everything else as it is."""
    import diffusers
    import transformers

    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    if library not in libraries:
        raise UserError(f"{path}: its {name} is a class of {library}, which can't be built without running the folder's own code")
    made: Any = getattr(libraries[library], kind)
    if not _is_module(made):
        return made.from_pretrained(path / name)
    with META:
        if library == "diffusers":
            return made.from_config(made.load_config(path / name))
        return made(made.config_class.from_pretrained(path / name))


def of_known(section: PolicySection, options: dict[str, Any], place: torch.device = META) -> Skeleton:
    """A known model; on any other device than "meta" it has random weights, for benchmarks."""
    if section.model not in known():
        raise UserError(
            f"policy.model={section.model!r}: no such folder, and no configuration of it is known; give a pipeline's folder (its weights "
            f"aren't read), or one of {', '.join(sorted(known()))}"
        )
    import diffusers

    record = known()[section.model]
    parts: dict[str, Any] = {}
    for name, (kind, settings) in record["components"].items():
        made = getattr(diffusers, kind)
        with place if _is_module(made) else torch.device("cpu"):
            parts[name] = made(**settings)
    policy = _policy(section, record["pipeline"], parts, options)
    rows = {name: _row(value, policy.family.latent_shape, place) for name, value in record["condition"].items()}
    condition = Condition(torch.zeros(1, dtype=torch.int64), rows, rows if record["guided"] else None)
    return Skeleton(policy, condition, record["encoders"], f"the published configuration of {record['id']}")


def _row(value: Any, latent_shape: tuple[int, ...], place: torch.device) -> torch.Tensor:
    """A prompt's row of a known model's condition: of a shape, of the "latent"'s, or a number, which is read at every forward."""
    if isinstance(value, int):
        return torch.tensor([value])
    return torch.zeros(1, *(latent_shape if value == "latent" else value), device=place)


def _policy(section: PolicySection, pipeline: str, parts: dict[str, Any], options: dict[str, Any]) -> Policy:
    import diffusers

    kind: Any = getattr(diffusers, pipeline)
    made = kind(**_completed(kind, parts))
    policy = registry.load_policy(made, section.family, **options)
    policy.name = section.model
    return policy


def _completed(kind: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's components, None for those that it expects and nobody gives."""
    expected, _ = kind._get_signature_keys(kind)
    return {name: None for name in expected} | parts


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
