"""Recipes as plain values: reading YAML, and putting `key.sub=value` into what was read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from visalign.errors import UserError


class Yaml(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a text; here, as in YAML 1.2, it is a number."""


Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789"))


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: not YAML, or no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Yaml)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections such as `run:` and `policy:`, got {'nothing' if data is None else type(data).__name__}")
    return data


def split(item: str) -> tuple[str, Any]:
    """(key, value) of `key.sub=value`; the value is YAML."""
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise UserError(f"override {item!r}: expected key.sub=value, such as run.steps=20")
    try:
        return key, yaml.load(value, Yaml)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: {value!r} is not valid YAML") from None


def pairs(words: Sequence[str], flag: str) -> dict[str, Any]:
    """What the `KEY=VALUE` words of an option say."""
    if wrong := [word for word in words if not word.partition("=")[1]]:
        raise UserError(f"{flag} {wrong[0]!r}: expected KEY=VALUE")
    return dict(split(word) for word in words)


def put(data: dict[str, Any], key: list[str], value: Any) -> None:
    """Set a key in place, making the sections that are missing. A reward's weight may stand alone: `toybox: 2` is `toybox: {weight: 2}`."""
    for n, name in enumerate(key[:-1]):
        inner = data.get(name)
        if n and key[n - 1] == "rewards" and is_number(inner):
            inner = {"weight": inner}
        if not isinstance(inner, dict | None):
            raise UserError(f"override {'.'.join(key)}: {'.'.join(key[: n + 1])} is {inner!r}, which has no keys")
        inner = dict(inner or {})
        data[name] = inner
        data = inner
    known = data.get(key[-1])
    data[key[-1]] = known | {"weight": value} if key[-2:-1] == ["rewards"] and is_number(value) and isinstance(known, dict) else value


def is_number(value: Any) -> bool:
    """Python counts True as a number; a recipe does not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
