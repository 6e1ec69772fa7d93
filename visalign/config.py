"""Recipes: one complete YAML per file, checked against typed sections; an unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from visalign.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class RunSection(Section):
    steps: Positive = 100  # training steps; one step = one rollout of trainer.prompts × trainer.group_size pictures
    path: Path = Path("runs/run")  # run folder
    seed: int = 0  # every random number is a function of (seed, rank, step)
    resume: str = "auto"  # auto: the newest checkpoint of run.path; never: refuse a folder that has one; or a checkpoint's path
    checkpoint_every: Positive = 50  # steps
    keep_checkpoints: Positive = 2  # older ones are deleted
    device: str = "auto"  # auto: cuda, else mps, else cpu
    threads: int | None = None  # CPU threads; None leaves torch's choice


class LoraSection(Section):
    rank: Positive = 32
    alpha: float = 64.0
    targets: list[str] = []  # names of linear layers; empty: the family's attention layers


class PolicySection(Section):
    model: str = "toybox"  # toybox, toybox/PART, a folder, a hub id
    family: str | None = None  # None: recognised by the pipeline's model_index.json
    lora: LoraSection | None = LoraSection()  # null: full fine-tuning
    ema: Fraction | None = 0.9  # decay per update of the averaged weights, which evaluation and export use; null: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast of every denoiser forward
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the frozen weights
    steps: Positive = 10  # denoising steps of a rollout
    guidance: float = 1.0  # classifier-free guidance in rollout and training; 1 is none
    resolution: Positive | None = None  # pixels per side; null: the model's own
    gradient_checkpointing: bool = False
    options: dict[str, Any] = {}  # further arguments of the family


class PromptsSection(Section):
    train: str = "toybox/prompts_train.jsonl"  # .txt (a prompt a line) or .jsonl; a path, or one of the packaged assets
    test: str = "toybox/prompts_test.jsonl"  # for evaluation; never trained on
    balance: str | None = None  # metadata key whose values get equal shares


class RewardSection(BaseModel):
    """`alias: {use: NAME, weight: 1.0, …options of the reward}`; `alias: 1.0` is short for `{use: alias, weight: 1.0}`."""

    model_config = ConfigDict(extra="allow")
    use: str
    weight: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EvalSection(Section):
    rewards: dict[str, RewardSection] = {}  # held out: judged, never trained on
    images: Positive = 512  # per evaluation, on prompts.test, same seeds each time
    every: Positive = 50  # training steps
    steps: Positive | None = None  # denoising steps; null: policy.steps
    guidance: float | None = None  # null: policy.guidance
    scan: list[float] = []  # guidance scales at which the base is judged once, to know its best
    batch: Positive = 64  # pictures per forward
    grid: int = 16  # pictures in the before/after grid


class ExplorationSection(Section):
    kind: Literal["all", "window"] = "all"  # which steps are stochastic, recorded and trained
    size: Positive = 2  # of the window
    range: tuple[int, int] | None = None  # the window lies in [low, high); null: the first half
    shared_noise: bool = False  # one initial noise per group: members differ by exploration alone


class TransitionSection(Section):
    kind: Literal["flow_sde", "dance_sde", "cps", "ddim", "dpm_sde"] = "flow_sde"
    level: Annotated[float, Field(gt=0)] = 0.7  # noise level: a, η of the transition


class CreditSection(Section):
    kind: Literal["terminal"] = "terminal"
    std: Literal["group", "global", "none"] = "global"  # by which spread advantages are divided
    aggregation: Literal["sum", "gdpo"] = "sum"  # several rewards: weighted sum, or normalised one by one
    epsilon: float = 1e-4
    clip: float = 5.0  # advantages are cut to ± clip


class RatioSection(Section):
    kind: Literal["plain"] = "plain"
    clip: float | tuple[float, float] = 1e-4  # of the ratio p^(1/D): log-probabilities are means over latent elements

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high): the ratio is cut to [1 - low, 1 + high]."""
        return self.clip if isinstance(self.clip, tuple) else (self.clip, self.clip)


class OptimizerSection(Section):
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warm_up: int = 0  # steps of linear warm-up
    decay_steps: int | None = None  # linear decay to final_lr at this absolute step (not run.steps: a resumed run must not change course)
    final_lr: float = 0.0


class TrainerSection(BaseModel):
    """`name` picks the trainer; the other keys are its own Config."""

    model_config = ConfigDict(extra="allow")
    name: str = "flow_grpo"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Config(Section):
    """A complete recipe."""

    run: RunSection = RunSection()
    policy: PolicySection = PolicySection()
    prompts: PromptsSection = PromptsSection()
    rewards: dict[str, RewardSection] = {}
    eval: EvalSection = EvalSection()
    trainer: TrainerSection = TrainerSection()
    exploration: ExplorationSection = ExplorationSection()
    transition: TransitionSection = TransitionSection()
    credit: CreditSection = CreditSection()
    ratio: RatioSection = RatioSection()
    optimizer: OptimizerSection = OptimizerSection()
    log: list[Literal["tensorboard", "wandb", "trackio"]] = []  # besides metrics.jsonl

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if "rewards" in data:
                data["rewards"] = expand_rewards(data["rewards"], "rewards")
            if isinstance(data.get("eval"), dict) and "rewards" in data["eval"]:
                data["eval"] = data["eval"] | {"rewards": expand_rewards(data["eval"]["rewards"], "eval.rewards")}
        return data


def expand_rewards(rewards: Any, where: str) -> dict[str, Any]:
    """The short forms written out: `clip_score: 1.0` → `clip_score: {use: clip_score, weight: 1.0}`."""
    if not isinstance(rewards, dict):
        raise UserError(f"{where}: expected a mapping of alias: weight or alias: {{use: NAME, …}}, got {rewards!r}")
    expanded: dict[str, Any] = {}
    for alias, value in rewards.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = {"weight": value}
        if not isinstance(value, dict):
            raise UserError(f"{where}.{alias}: expected a weight or {{use: NAME, weight: 1.0, …}}, got {value!r}")
        expanded[alias] = {"use": alias, **value}
    return expanded


# --- reading -----------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] | dict[str, Any] = ()) -> Config:
    """A recipe with overrides applied.

    Args:
        path: a YAML file: as given, else among the packaged recipes ("toybox" = "configs/toybox.yaml").
        overrides: `key.sub=value` strings (values are YAML), or the same as a dict.

    Raises:
        UserError: missing or broken file, unknown key, wrong type.
    """
    data = _read(find(path))
    pairs = overrides.items() if isinstance(overrides, dict) else [_split(item) for item in overrides]
    for key, value in pairs:
        _set(data, key, value)
    return parse(data)


def parse(data: dict[str, Any]) -> Config:
    """A recipe from a plain mapping; the trainer's own section is checked by the trainer."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, Config)) from None


def find(path: str | Path) -> Path:
    """The file of a recipe: as given, else among the packaged ones."""
    given = Path(path)
    if given.is_file():
        return given
    folder = Path(str(files("visalign.configs")))
    name = given.name if given.suffix else f"{given.name}.yaml"
    if (folder / name).is_file():
        return folder / name
    near = difflib.get_close_matches(name, [p.name for p in folder.glob("*.yaml")], 1)
    raise UserError(f"no config {str(path)!r}, neither as a file nor among the packaged recipes" + (f"; did you mean {near[0]}?" if near else ""))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections such as `run:` and `policy:`, got {type(data).__name__}")
    return data


def _split(item: str) -> tuple[str, Any]:
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise UserError(f"override {item!r}: expected key.sub=value, such as run.steps=20")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: {value!r} is not valid YAML") from None


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for n, name in enumerate(parents):
        inner = data.get(name)
        if isinstance(inner, int | float) and parents[:n] and parents[n - 1] == "rewards" or (parents[0] == "rewards" and n == 1):
            inner = inner if isinstance(inner, dict) else {} if inner is None else {"weight": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {key}: {'.'.join(parents[: n + 1])} is {inner!r}, which has no keys")
        data[name] = inner
        data = inner
    data[last] = value


# --- explaining --------------------------------------------------------------------------------------------------------


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for the first error: which key, what was expected, what was given, and the nearest known key."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in ("tuple[float,float]", "float", "function-after")]
    key = ".".join([prefix, *location] if prefix else location)
    if first["type"] == "extra_forbidden":
        return f"{key} is unknown{nearest(location[-1], _keys(model, location[:-1]))}"
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}: expected {message}, got {first.get('input')!r}"


def nearest(word: str, known: Sequence[str]) -> str:
    """"; did you mean X?", or the list of what is known."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def _keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for name in location:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Config.model_json_schema()


def packaged() -> list[str]:
    """Stems of the packaged recipes."""
    return sorted(p.stem for p in Path(str(files("visalign.configs"))).glob("*.yaml"))


def purpose(name: str) -> str:
    """First comment line of a packaged recipe."""
    first = find(name).read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""
