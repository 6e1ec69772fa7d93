"""Plug-ins by file name: `rewards/NAME.py`, `trainers/NAME.py`, and in visalign/ `families/NAME.py` and `steering/NAME.py`.

`package.module:Class` loads a user's own. The only module that imports plug-ins. There is no list to edit: a file is its entry.
"""

from __future__ import annotations

import inspect
import os
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlparse

import torch
from pydantic import BaseModel, ConfigDict, create_model

from visalign import sources
from visalign.composite import Members
from visalign.config import RewardSection, expand_rewards, validate
from visalign.errors import UserError
from visalign.explain import nearest
from visalign.policy import PRECISIONS, Family, Policy
from visalign.scoring import Panel, Reward

KINDS = {"rewards": "reward", "trainers": "trainer", "families": "family", "steering": "sampling method"}  # folder -> one of them
TOYBOX_PARTS = {  # what `checkpoint: auto` means on the toybox
    "toybox/clip": ("clip_score", "hps", "lambda_harmonic", "pickscore"),
    "toybox/dino": ("adversarial", "dino", "diversity"),
    "toybox/vlm": ("listener", "pairwise_winrate", "prompt_echo", "vlm_rating", "vlm_yes"),
}
TOYBOX_MODELS: dict[str, dict[str, Any]] = {  # parts that load as policies -> options of their families
    "toybox/sd3": {"max_sequence_length": 10},
    "toybox/sd15": {},
    "toybox/turbo": {"max_sequence_length": 10},
    "toybox/wan": {"max_sequence_length": 8, "resolution": 64, "frames": 9},
}
TOYBOX_CHECKPOINTS = {name: part for part, names in TOYBOX_PARTS.items() for name in names}


def names(kind: str) -> list[str]:
    """File stems of a plug-in folder, sorted."""
    return sorted(p.name[:-3] for p in files(f"visalign.{kind}").iterdir() if p.name.endswith(".py") and not p.name.startswith("_"))


def load(kind: str, name: str) -> type[Any]:
    """The class of a plug-in.

    Args:
        kind: "rewards", "trainers", "families" or "steering".
        name: a file stem, or `package.module:Class`.

    Raises:
        UserError: no such plug-in; the message names the nearest one.
    """
    from visalign.guiding import Method
    from visalign.loop import Job

    base = {"rewards": Reward, "trainers": Job, "families": Family, "steering": Method}[kind]
    module_name, _, class_name = name.partition(":")
    if class_name:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a console script does not look there
        try:
            found = getattr(import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{name}: {error}; expected package.module:Class") from None
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise UserError(f"{name} is no subclass of visalign's {base.__name__}")
        return found
    if name not in names(kind):
        raise UserError(f"no {KINDS[kind]} named {name!r}{nearest(name, names(kind))}")
    module = import_module(f"visalign.{kind}.{name}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__]
    if len(classes) != 1:
        raise RuntimeError(f"{module.__file__} must define exactly one {base.__name__}, found {len(classes)}")
    return classes[0]


def checked(kind: type[Any], options: dict[str, Any], where: str, skip: int = 0, built: Sequence[str] = ()) -> dict[str, Any]:
    """Options for a class, checked against the annotated arguments of its `__init__`, of which the first `skip` are not options.

    What is named in `built` is still to be built, and may be anything.

    Raises:
        UserError: an unknown option, a wrong type, or one that is missing.
    """
    parameters = list(inspect.signature(kind).parameters.values())[skip:]
    hints = _hints(kind) | dict.fromkeys(built, Any)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in named}
    others = "forbid" if all(p.kind != p.VAR_KEYWORD for p in parameters) else "allow"
    settings = ConfigDict(extra=others, arbitrary_types_allowed=True, protected_namespaces=())
    section: BaseModel = validate(create_model("Options", __config__=settings, **fields), options, where)
    return {name: getattr(section, name) for name in options}


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Annotations of a class's arguments."""
    try:
        return get_type_hints(kind.__init__)
    except NameError:  # names that are imported for type checkers only
        return {}


# --- policies ----------------------------------------------------------------------------------------------------------


def asset(name: str) -> Path:
    """Path of a packaged asset."""
    return Path(str(files("visalign.assets"))) / name


def resolve_model(source: str) -> str:
    """`toybox` and `toybox/PART` are packaged folders; everything else is a folder or a hub id."""
    if source == "toybox":
        source = "toybox/sd3"
    if source.startswith("toybox/"):
        if not asset(source).is_dir():
            if source in TOYBOX_MODELS:
                make = f"python -m visalign.toybox.pretrain {source.partition('/')[2]} --out {asset('toybox')}"
                raise UserError(f"{source}: its weights are not here yet; make them, in minutes or hours of a CPU, with `{make}`")
            parts = [f"toybox/{p.name}" for p in asset("toybox").iterdir() if p.is_dir()]
            raise UserError(f"no toybox part {source!r}{nearest(source, parts)}")
        return str(asset(source))
    return source


def load_policy(source: Any = "toybox", family: str | None = None, precision: str = "fp32", dtype: str = "fp32", **options: Any) -> Policy:
    """A policy from "toybox", a folder, a hub id, or a diffusers pipeline object.

    Raises:
        UserError: nothing there, or no family that knows the pipeline's class.
    """
    for option, value in (("precision", precision), ("dtype", dtype)):
        if value not in PRECISIONS:
            raise UserError(f"policy.{option}: expected {', '.join(PRECISIONS)}, got {value!r}")
    if not isinstance(source, str):
        name = family or _family_of(type(source).__name__, repr(type(source)))
        kind = load("families", name)
        return Policy(kind(source, **checked(kind, options, f"family {name}", skip=1)), precision, type(source).__name__)
    if source.startswith("toy:"):
        kind = load("families", family or "toy")
        return Policy(kind.load(source, **checked(kind, options, "policy.options", skip=1)), precision, source)
    path = resolve_model(source)
    kind = load("families", family or _family_of(_pipeline_class(path), source))
    options = TOYBOX_MODELS.get("toybox/sd3" if source == "toybox" else source, {}) | options
    options = checked(kind, options, "policy.options", skip=1)
    try:
        return Policy(kind.load(path, dtype=PRECISIONS[dtype], **options), precision, source)
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load model {source!r}: {' '.join(str(error).split())[:300]}") from None


def _pipeline_class(path: str) -> str:
    """`_class_name` of a folder's or hub id's model_index.json."""
    folder = Path(path)
    if (folder.exists() or folder.is_absolute() or path.startswith(".")) and not (folder / "model_index.json").is_file():
        why = "it has no model_index.json" if folder.is_dir() else "no such folder"
        raise UserError(f"model {path!r} is no diffusers pipeline: {why}; expected toybox, a pipeline's folder or a hub id")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        index: Any = DiffusionPipeline.load_config(path)
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot find model {path!r}: {' '.join(str(error).split())[:200]}") from None


def _family_of(pipeline_class: str, source: str) -> str:
    known = {wrapped: name for name in names("families") for wrapped in sources.constant("families", name, "pipeline_classes") or ()}
    if pipeline_class not in known:
        raise UserError(f"{source} is a {pipeline_class}; known pipelines: {', '.join(sorted(known))}")
    return known[pipeline_class]


# --- rewards -----------------------------------------------------------------------------------------------------------


def load_reward(name: str, **options: Any) -> Reward:
    """A reward by name with its options; the `of` of a reward of rewards may hold {use: NAME, …}, or {alias: weight or {use: NAME, …}}.

    Raises:
        UserError: no such reward, an unknown option, or a value it refuses.
    """
    return _built(name, options, f"reward {name}")


def _built(name: str, options: dict[str, Any], where: str) -> Reward:
    kind = load("rewards", name)
    parts = members(kind, options, where)
    rewards = {path: (_built(part.use, part.options, path), part.weight) for path, part in parts.items()}
    single = rewards.get(f"{where}.of")
    of = single[0] if single else {path.removeprefix(f"{where}.of."): reward for path, reward in rewards.items()}
    return kind(**checked(kind, options | ({"of": of} if parts else {}), where))


def members(kind: type[Any], options: dict[str, Any], where: str) -> dict[str, RewardSection]:
    """What the `of` of a reward of rewards holds: `WHERE.of` -> the one, or `WHERE.of.ALIAS` -> each; nothing where it is no mapping."""
    of, where = options.get("of"), f"{where}.of"
    if not isinstance(of, dict):
        return {}
    wanted = _hints(kind).get("of")
    if wanted is Reward or (wanted != Members and "use" in of):
        found = {where: of}
    else:
        found = {f"{where}.{alias}": section for alias, section in expand_rewards(of, where).items()}
    sections = {path: validate(RewardSection, section, path) for path, section in found.items()}
    for path, section in sections.items():
        if section.device:
            raise UserError(f"{path}.device: a member is on the device of what it is a member of; give that one a device")
        try:
            load("rewards", section.use)
        except UserError as error:
            raise UserError(f"{path}.use: {error}") from None
    return sections


def check_rewards(rewards: dict[str, RewardSection], where: str = "rewards") -> None:
    """Refuse unknown rewards and wrong options, at any depth, before any weights are loaded; messages name the key."""
    _check({f"{where}.{alias}": section for alias, section in rewards.items()})


def _check(sections: dict[str, RewardSection]) -> None:
    for path, section in sections.items():
        kind = load("rewards", section.use)
        parts = members(kind, section.options, path)
        _check(parts)
        checked(kind, section.options, path, built=("of",) if parts else ())


def without_gradient(rewards: dict[str, RewardSection], where: str = "rewards") -> str | None:
    """The first reward with a weight, at any depth, known to have no gradient before anything is loaded, as `WHERE.ALIAS (NAME)`."""
    for path, section in {f"{where}.{alias}": section for alias, section in rewards.items() if section.weight}.items():
        kind = load("rewards", section.use)
        if kind.gradient_with(section.options) is False:
            return f"{path} ({section.use})"
        inner = {p.removeprefix(f"{path}."): part for p, part in members(kind, section.options, path).items()}
        if found := without_gradient(inner, path):
            return found
    return None


def resolved(rewards: dict[str, RewardSection], model: str | None) -> dict[str, RewardSection]:
    """Rewards, at any depth, with `checkpoint: auto` (or none given) replaced by what it means.

    That is the toybox's part when the policy is the toybox, or when there is no policy (`model` None) and the hub can't be reached;
    otherwise the reward's documented hub id. A choice for the toybox is printed.
    """
    found: dict[str, RewardSection] = {}
    for alias, section in rewards.items():
        options, kind = section.options, load("rewards", section.use)
        if parts := resolved(members(kind, options, alias), model):
            plain = {path: part.model_dump(exclude={"device"}) for path, part in parts.items()}
            options["of"] = plain.get(f"{alias}.of") or {path.removeprefix(f"{alias}.of."): part for path, part in plain.items()}
        if section.use in TOYBOX_CHECKPOINTS and options.get("checkpoint", "auto") == "auto":
            hub_id = kind.spec.model_id
            toybox = model.startswith("toybox") if model is not None else not hub_has(hub_id)
            options["checkpoint"] = TOYBOX_CHECKPOINTS[section.use] if toybox else hub_id
            if model is None and toybox:
                print(f"visalign: {alias}: the hub can't be reached for {hub_id}; scoring with {options['checkpoint']}", file=sys.stderr)
        found[alias] = RewardSection.model_validate(section.model_dump(include={"use", "weight", "device"}) | options)
    return found


def hub_has(model_id: str) -> bool:
    """Whether a hub model is in the local cache or the hub answers at all."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model_id, "config.json"), str):
        return True
    try:
        with socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=3):
            return not constants.HF_HUB_OFFLINE
    except OSError:
        return False


def build_panel(rewards: dict[str, RewardSection], model: str | None, device: torch.device | str = "cpu", learning: bool = False) -> Panel:
    """Rewards of a recipe, each on its own `device` or this one; `model` is what the policy was loaded from, None without one.

    Raises UserError if a reward that learns has learned nothing, and it isn't `learning` either.
    """
    from visalign.distributed import pick_device  # lists of plug-ins need no accelerate

    sections = resolved(rewards, model)
    places = {a: pick_device(s.device, f"rewards.{a}.device") if s.device else device for a, s in sections.items()}
    panel = Panel({a: (load_reward(s.use, **s.options).to(places[a]), s.weight) for a, s in sections.items()})
    for alias, reward in panel.rewards.items():
        if reward.spec.trainable and reward.spec.version == "0" and not learning:
            raise UserError(f"reward {alias} has learned nothing and would score at random; load what a run has trained (its option head)")
    return panel
