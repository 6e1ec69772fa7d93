"""Plug-in files as text: read, not imported, since they may need a library that is missing, or seconds."""

from __future__ import annotations

import ast
from importlib.resources import files
from typing import Any


def tree(kind: str, name: str) -> ast.Module:
    """The file of a plug-in, parsed."""
    return ast.parse((files(f"visalign.{kind}") / f"{name}.py").read_text(encoding="utf-8"))


def summary(kind: str, name: str) -> str:
    """First line of a plug-in's module docstring."""
    return (ast.get_docstring(tree(kind, name)) or "").split("\n")[0]


def constant(kind: str, name: str, attribute: str) -> Any:
    """What a plug-in's class sets an attribute to, written out there; None where it doesn't."""
    assigned = [node for node in ast.walk(tree(kind, name)) if isinstance(node, ast.Assign)]
    return next((ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == attribute), None)
