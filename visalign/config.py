"""Recipes: one complete YAML per file, checked against typed sections; an unknown key is an error that names the nearest one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from visalign.errors import UserError
from visalign.explain import explain, nearest
from visalign.overrides import is_number, put, read, split

Positive = Annotated[int, Field(ge=1)]
Above = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    steps: Positive = 100  # training steps; one step = one rollout of trainer.prompts × trainer.group_size pictures
    path: Path = Path("runs/run")  # run folder
    seed: int = 0  # every random number is a function of (seed, rank, step)
    resume: str = "auto"  # auto: the newest checkpoint of run.path; never: refuse a folder that has one; or a checkpoint's path
    checkpoint_every: Positive = 50  # steps
    keep_checkpoints: Positive = 2  # older ones are deleted
    device: str = "auto"  # auto: cuda, else mps, else cpu
    threads: Positive | None = None  # CPU threads; None leaves torch's choice


class LoraSection(Section):
    rank: Positive = 32
    alpha: Above = 64.0
    targets: list[str] = []  # names of linear layers; empty: the family's attention layers


class PolicySection(Section):
    model: str = "toybox"  # toybox, toybox/PART, a folder, a hub id
    family: str | None = None  # None: recognised by the pipeline's model_index.json
    lora: LoraSection | None = LoraSection()  # null: full fine-tuning
    train: list[str] = []  # full fine-tuning: only weights whose names contain one of these; empty: all
    ema: Fraction | None = 0.9  # decay per update of the averaged weights, which evaluation and export use; null: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast of every denoiser forward
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the frozen weights
    steps: Positive = 10  # denoising steps of a rollout
    guidance: float = 1.0  # classifier-free guidance in rollout and training; 1 is none
    resolution: Positive | None = None  # pixels per side; null: the model's own
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass: less memory, a third more time
    attention: Literal["native", "xformers", "flash", "flash_hub", "sage", "flex"] = "native"  # native where it can't be had
    compile: bool = False  # torch.compile of the network's repeated blocks
    quantise: Literal["nf4", "fp4"] | None = None  # four bits for the frozen layers under an adapter; needs the extra `small`
    rest: bool = False  # text encoders and VAE stay on the CPU while they are idle
    embeddings: Path | None = None  # folder in which prompt embeddings are kept, for this run and others; null: none
    options: dict[str, Any] = {}  # further arguments of the family


class PromptsSection(Section):
    train: str = "toybox/prompts_train.jsonl"  # .txt (a prompt a line) or .jsonl; a path, or one of the packaged assets
    test: str = "toybox/prompts_test.jsonl"  # for evaluation; never trained on
    balance: str | None = None  # metadata key whose values get equal shares


class RewardSection(BaseModel):
    """`alias: {use: NAME, weight: 1.0, …options of the reward}`; `alias: 1.0` is short for `{use: alias, weight: 1.0}`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    use: str
    weight: float = 1.0
    device: str | None = None  # such as cuda:1 or cpu; null: the policy's

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
    keep_best: str | None = None  # a judge: the checkpoint at which it was highest stays as RUN/best, which evaluate and export take
    batch: Positive = 64  # pictures per forward
    grid: Positive = 16  # pictures in the before/after grid


class PruneSection(Section):
    """Edges of a tree that are drawn but not trained (BranchGRPO)."""

    depth: list[int] = []  # steps to skip
    every: Positive | None = None  # training steps after which these move one step towards noise; null: never
    stop: Annotated[int, Field(ge=0)] = 0  # the earliest step they move to
    width: Literal["none", "branch", "extremes"] = "none"  # branch: the best leaves of each last split; extremes: best and worst of a tree
    share: Fraction = 0.5  # of the leaves that width keeps


class ExplorationSection(Section):
    kind: Literal["all", "window", "tree", "one_branch"] = "all"  # which steps are stochastic, recorded and trained
    shared_noise: bool = False  # one initial noise per group: members differ by exploration alone
    size: Positive = 2  # window, tree with an interval: stochastic steps in a row
    range: tuple[int, int] | None = None  # window, one_branch: within [low, high); null: the first half
    rule: Literal["random", "fixed", "progressive", "exp_decay"] = "random"  # window: how its start moves over training
    every: Positive = 25  # window, progressive and exp_decay: training steps at one start
    stride: Positive = 1  # window, progressive: steps that the start moves
    finish: Fraction | None = None  # DPM-Solver++ 2M after the last stochastic step, with this share of the steps left; null: Euler
    branches: list[int] = [0]  # tree: steps at which every node splits
    width: Annotated[int, Field(ge=2)] = 2  # tree: children of a split
    spread: AtLeastZero = 4.0  # tree: siblings' noise is correlated by 1/(1 + spread²)
    interval: Positive | None = None  # tree: `size` stochastic steps from every multiple of this on; null: all steps but the last
    prune: PruneSection = PruneSection()
    seeds: Positive = 1  # one_branch: different initial noises in a group


class TransitionSection(Section):
    kind: Literal["flow_sde", "dance_sde", "cps", "ddim", "dpm_sde"] = "flow_sde"
    level: Above = 0.7  # noise level: a, η of the transition
    calibration: str | None = None  # calibration.json of a DenseGRPO run: the level of every step; null: `level` for all


class CreditSection(Section):
    kind: Literal["terminal", "gain", "residual", "value", "tree", "own_branch"] = "terminal"  # which reward a step answers for
    std: Literal["group", "global", "none"] = "global"  # by which spread advantages are divided
    aggregation: Literal["sum", "gdpo"] = "sum"  # several rewards: weighted sum, or normalised one by one
    noise_floor: dict[str, AtLeastZero] = {}  # gdpo: alias: spread below which differences are noise; else the reward's own
    epsilon: AtLeastZero = 1e-4
    clip: Above = 5.0  # advantages are cut to ± clip
    floor: AtLeastZero = 0.0  # gain, residual: the least spread of a step's credit that is blown up to 1
    completion: Positive | None = None  # gain, residual: solver steps of a completion; null: all that are left
    solver: Literal["euler", "dpm2m"] = "euler"  # gain, residual: of completions
    discount: Fraction = 0.9  # value: γ
    anchor: AtLeastZero = 0.1  # value: weight of the absolute term
    anchor_steps: Annotated[int, Field(ge=0)] = 5  # value: denoising steps that have it, from the first on
    keep: tuple[Positive, Positive] | None = None  # train the best and the worst so many of each group alone (DanceGRPO)


class RatioSection(Section):
    kind: Literal["plain", "guard", "cps"] = "plain"  # guard: de-biased and scaled; cps: times 2ς²
    clip: Above | tuple[Above, Above] = 1e-4  # of the ratio p^(1/D): log-probabilities are means over latent elements
    clip_steps: dict[int, Above] = {}  # another clip at single denoising steps
    weight: Literal["none", "inverse_gap", "noise", "equal_gain"] = "none"  # of a step's loss: 1/Δ, ς/mean ς, 1/its gradient's gain, mean 1

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high): the ratio is cut to [1 - low, 1 + high]."""
        return self.clip if isinstance(self.clip, tuple) else (self.clip, self.clip)


class OptimizerSection(Section):
    kind: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: its two moments in a byte each; needs the extra `small`
    lr: AtLeastZero = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: AtLeastZero = 1e-4
    max_grad_norm: Above = 1.0
    warm_up: Annotated[int, Field(ge=0)] = 0  # steps of linear warm-up
    decay_steps: Positive | None = None  # linear decay to final_lr at this step (absolute, so that a resumed run keeps its course)
    final_lr: AtLeastZero = 0.0


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
        if is_number(value):
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
    data = read(find(path))
    pairs = overrides.items() if isinstance(overrides, dict) else [split(item) for item in overrides]
    for key, value in pairs:
        put(data, key.split("."), value)
    return parse(data)


def parse(data: dict[str, Any]) -> Config:
    """A recipe from a plain mapping; the trainer's own section is checked by the trainer."""
    return validate(Config, data)


def validate(model: type[Model], data: Any, where: str = "") -> Model:
    """A checked section from plain values; `where` is its key, for messages."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, model, where)) from None


def find(path: str | Path) -> Path:
    """The file of a recipe: as given, else among the packaged ones."""
    given = Path(path)
    if given.is_file():
        return given
    name = given.name.removesuffix(".yaml")
    if str(given.parent) in (".", "configs") and name in packaged():
        return Path(str(files("visalign.configs"))) / f"{name}.yaml"
    if given.is_dir():
        raise UserError(f"{path} is a folder: expected a YAML file, or the name of a packaged recipe")
    raise UserError(f"no config {str(path)!r}, neither as a file nor among the packaged recipes{nearest(name, packaged())}")


# --- what there is ---------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; configs/schema.json is this."""
    found = Config.model_json_schema()
    reward = found["$defs"]["RewardSection"]
    reward["required"] = []  # `use` is the alias if it isn't given
    for section in (found, found["$defs"]["EvalSection"]):
        section["properties"]["rewards"]["additionalProperties"] = {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/RewardSection"}]}
    return found


def packaged() -> list[str]:
    """Stems of the packaged recipes."""
    return sorted(p.stem for p in Path(str(files("visalign.configs"))).glob("*.yaml"))


def purpose(name: str) -> str:
    """First comment line of a packaged recipe."""
    first = find(name).read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""
