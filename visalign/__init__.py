"""visalign: align image and video generators with reward models.

Everything public is here and loaded on first use, so that `import visalign` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visalign.api import align, load, load_reward, score
    from visalign.config import Config
    from visalign.drawing import Result, sample, sample_stream
    from visalign.errors import UserError
    from visalign.policy import Family, Policy
    from visalign.scoring import Panel, Reward, RewardInput, RewardOutput, RewardSpec
    from visalign.trainer import Trainer

__version__ = "0.1.0"
_HOME = {
    "api": ("align", "load", "load_reward", "score"),
    "config": ("Config",),
    "drawing": ("Result", "sample", "sample_stream"),
    "errors": ("UserError",),
    "policy": ("Family", "Policy"),
    "scoring": ("Panel", "Reward", "RewardInput", "RewardOutput", "RewardSpec"),
    "trainer": ("Trainer",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 (by importance)
    "load", "sample", "sample_stream", "score", "align", "load_reward", "Policy", "Family", "Reward", "RewardInput", "RewardOutput",
    "RewardSpec", "Panel", "Trainer", "Config", "Result", "UserError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'visalign' has no attribute {name!r}")
    return getattr(import_module(f"visalign.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
