"""What is wrong with a recipe, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from visalign.errors import UserError

UNION_BRANCH = re.compile(r"(constrained-)?(float|int|str|bool)|\w+\[.*\]")  # where several types are allowed, pydantic's keys name one


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for one error: which key, what was expected, what was given, and the nearest known key."""
    found = max(error.errors(), key=lambda e: len(e["loc"]))  # the first, or the branch of a union that came furthest
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    location = [str(part) for part in found["loc"] if not UNION_BRANCH.fullmatch(str(part))]
    key = ".".join([prefix, *location] if prefix else location) or "config"
    if found["type"] == "extra_forbidden":
        return f"{key} is unknown{nearest(location[-1], _keys(model, location[:-1]))}"
    if found["type"] == "missing":
        return f"{key} is missing"
    common = {"model_type": "keys with values", "tuple_type": "a list", "list_type": "a list", "dict_type": "keys with values"}
    message = common.get(found["type"], found["msg"].removeprefix("Input should be "))
    return f"{key}: expected {message}, got {found['input']!r}"


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message: `; did you mean X?`, or the list of what is known."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


def _keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for name in location:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)
