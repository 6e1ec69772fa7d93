"""From a recipe to a trainer that is ready to `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from visalign import attention, base_pictures, checkpoint, embeddings, frugal, prompts, registry, rewarding
from visalign.config import Config, PolicySection, RewardSection, load, validate
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.loop import Job, Session
from visalign.policy import PRECISIONS, Policy
from visalign.scoring import Panel, RewardSpec
from visalign.shifted_noise import ShiftedNoise
from visalign.trainer import Trainer


def algorithm(config: Config) -> type[Trainer]:
    """The class that trains a recipe's policy. Raises UserError if it trains something else, which has no rollout and no policy."""
    kind = registry.load("trainers", config.trainer.name)
    if not issubclass(kind, Trainer):
        raise UserError(f"{config.trainer.name} trains no policy: nothing to check, evaluate or export; `visalign train` runs its recipe")
    return kind


def trainer(config: Config) -> Trainer:
    """`loop` for a recipe that trains a policy."""
    algorithm(config)
    built = loop(config)
    assert isinstance(built, Trainer)
    return built


def loop(config: Config) -> Job:
    """Load everything a recipe names, and write the run folder's config.yaml.

    Raises:
        UserError: whatever the user can mend, before anything is trained.
    """
    kind = registry.load("trainers", config.trainer.name)
    config = completed(config, kind.defaults)
    # what costs nothing to refuse, before weights are loaded
    settings = validate(kind.Config, config.trainer.options, "trainer")
    registry.check_rewards(config.rewards)
    registry.check_rewards(config.eval.rewards, "eval.rewards")
    if kind.climbs(settings):
        check_gradients({f"rewards.{alias}": section for alias, section in config.rewards.items()}, config.trainer.name)
    checkpoint.to_resume(config.run.path, config.run.resume)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    config = config.model_copy(update={"rewards": registry.resolved(config.rewards, config.policy.model)})
    judged = registry.resolved(config.eval.rewards or config.rewards, config.policy.model)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"rewards": judged})})
    processes = Processes(config.run.device, config.policy.precision)
    config = config.model_copy(update={"policy": settled(config.policy, processes.device)})
    built = kind.of(config, processes, partial(session, config, processes))
    if processes.main:
        write_config(config)
    processes.wait()
    return built


def check_gradients(rewards: Mapping[str, RewardSection], trainer: str) -> None:
    """Refuse rewards with a weight, at any depth, whose class says that they have no gradient. Raises UserError, which names the key."""
    for path, section in rewards.items():
        kind = registry.load("rewards", section.use)
        spec = getattr(kind, "spec", None)  # of a class: what it is at best
        if section.weight and isinstance(spec, RewardSpec) and not spec.differentiable:
            raise UserError(
                f"{path}: {section.use} has no gradient, which {trainer} follows; use one that has, such as clip_score, or weight 0"
            )
        if section.weight:
            check_gradients(registry.members(kind, section.options, path), trainer)


def session(config: Config, processes: Processes) -> Session:
    """A recipe's policy, rewards and prompts, on this process's device."""
    if not config.rewards:
        raise UserError("rewards: none given; name at least one, such as rewards.toybox=1.0")
    train_prompts, test_prompts = prompts.load(config.prompts.train), prompts.load(config.prompts.test)
    learner = policy(config, processes.device)
    rewards = registry.build_panel(config.rewards, config.policy.model, processes.device, learning=True)
    for alias, reward in rewards.rewards.items():
        if getattr(reward, "held_out_only", False):
            raise UserError(
                f"rewards.{alias}: {reward.spec.name} judges only; a judge that is trained on judges nothing (use it in eval.rewards)"
            )
    judges = registry.build_panel(config.eval.rewards, config.policy.model, processes.device, learning=True)
    for panel in (rewards, judges):
        panel.expects(learner.family.moving)
    rewarding.share(judges, config.eval.rewards, rewards, config.rewards)
    base_pictures.calibrate(config, learner, {"rewards": rewards, "eval.rewards": judges}, train_prompts, processes)
    return Session(config, processes, learner, rewards, judges, train_prompts, test_prompts)


def judges(config: Config, sections: dict[str, RewardSection], policy: Policy, processes: Processes, run: Path | None) -> Panel:
    """The rewards of these sections, to judge what a run has trained as its own rewards know it, or, without one, the model itself.

    Raises:
        UserError: a reward that can't be loaded, or that has learned nothing.
    """
    panel = registry.build_panel(sections, config.policy.model, processes.device, learning=run is not None)
    if run:
        rewarding.restore(panel, sections, run, config.rewards)
        base_pictures.restore(panel, sections, run, config)
    else:
        known = prompts.load(config.prompts.train)
        base_pictures.calibrate(config, policy, {"eval.rewards": panel}, known, processes, keep=False)
    return panel


def completed(config: Config, defaults: Mapping[str, Mapping[str, Any]]) -> Config:
    """The recipe with an algorithm's own defaults (section -> key -> value) where the recipe says nothing."""
    sections: dict[str, Any] = {}
    for name, values in defaults.items():
        given = getattr(config, name).model_dump(exclude_unset=True)
        sections[name] = validate(type(getattr(config, name)), {**values, **given}, name)
    return config.model_copy(update=sections)


def policy(config: Config, device: torch.device) -> Policy:
    """The recipe's policy on a device, with its adapter or its whole network set to learn."""
    section = config.policy
    options = dict(section.options) | ({"resolution": section.resolution} if section.resolution else {})
    loaded = registry.load_policy(section.model, section.family, section.precision, section.dtype, **options)
    if registry.load("trainers", config.trainer.name).moves_noise:
        if not section.lora:
            raise UserError(f"policy.lora: {config.trainer.name} trains an adapter that predicts noise; give it one, such as rank 32")
        loaded = ShiftedNoise(loaded.family, loaded.precision, loaded.name)
    torch.manual_seed(config.run.seed)  # the adapter's first weights
    adapted(loaded, section)
    if section.gradient_checkpointing:
        loaded.enable_gradient_checkpointing()
    return equipped(loaded, section, device)


def adapted(loaded: Policy, section: PolicySection) -> Policy:
    """The policy with its adapter, or what is trained of its network, set to learn."""
    if section.lora and section.train:
        raise UserError("policy.train is for full fine-tuning: set policy.lora=null, or choose the adapter's layers by policy.lora.targets")
    if section.lora:
        if not hasattr(loaded.family.network, "add_adapter"):
            raise UserError(f"policy.lora: {section.model} can't hold an adapter; use policy.lora=null to train all its weights")
        try:
            loaded.add_lora(section.lora.rank, section.lora.alpha, section.lora.targets)
        except ValueError as error:
            raise UserError(f"policy.lora.targets: {' '.join(str(error).split())[:200]}") from None
    else:
        try:
            loaded.train_weights(section.train)
        except ValueError as error:
            raise UserError(f"policy.train: {error}") from None
    return loaded


def settled(section: PolicySection, device: torch.device) -> PolicySection:
    """The section with the attention that can be had on a device; what can't is printed."""
    precision = section.precision if section.precision != "fp32" else section.dtype
    return section.model_copy(update={"attention": attention.settled(section.attention, device, PRECISIONS[precision])})


def equipped(learner: Policy, section: PolicySection, device: torch.device) -> Policy:
    """The policy on its device, as fast and as frugal as its section asks for."""
    learner.attend_by(settled(section, device).attention)
    if section.quantise:
        frugal.quantise(learner, section.quantise)
    if section.compile:
        learner.compile()
    if section.rest:
        frugal.rest(learner)
    if section.embeddings:
        known: Any = embeddings.Remembered(learner, section.embeddings, section.options | {"resolution": section.resolution})
        learner.family.encode = known
    return learner.to(device)


def write_config(config: Config) -> None:
    """The resolved recipe as config.yaml in the run folder."""
    folder = Path(config.run.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise UserError(f"run.path: cannot write to {folder} ({error.strerror}); choose another folder") from None


def restore(run: Path, device: torch.device, reference: bool = False, whole: bool = False) -> Policy:
    """The policy of a run with the averaged weights (or the trained ones, without an average) of its best checkpoint, where the recipe
    keeps that (`eval.keep_best`), else of its newest.

    Args:
        reference: keep what it was before training, for `Policy.reference`.
        whole: with the frozen weights in full, not in four bits, so that an adapter can be merged into them.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    recipe = load(run / "config.yaml")
    algorithm(recipe)
    saved = checkpoint.found(run / "checkpoints")
    if not saved:
        raise UserError(f"{run} has no checkpoint yet; let it run to its first one (run.checkpoint_every={recipe.run.checkpoint_every})")
    stem = "trainable" if recipe.policy.ema is None else "average"
    chosen = checkpoint.newest(run / "best", int(saved[-1].name[5:])) if recipe.eval.keep_best else None
    values = checkpoint.load(chosen or saved[-1], [stem])[0][stem]
    if whole:
        recipe = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"quantise": None})})
    loaded = policy(recipe, device)
    if reference:
        loaded.keep_reference()
    with torch.no_grad():
        for name, parameter in loaded.named_trainable().items():
            parameter.copy_(values[name])
    return loaded


def export(policy: Policy, folder: Path, merge: bool = False) -> str:
    """Write a policy as stock diffusers weights; says which kind: "adapter" or "pipeline".

    Args:
        merge: write the whole pipeline with the adapter merged into it.

    Raises:
        UserError: no such format, a folder that can't be written to, or an adapter that isn't one of the weights.
    """
    network: Any = policy.family.network
    if isinstance(policy, ShiftedNoise):
        raise UserError("export: this adapter predicts noise, which stock pipelines can't make use of; `visalign evaluate RUN` can")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from None
    try:
        if policy.lora and not merge:
            from peft import get_peft_model_state_dict

            policy.family.save_adapter(folder, get_peft_model_state_dict(network))
            return "adapter"
        policy.merge()
        policy.family.save(folder)
        return "pipeline"
    except NotImplementedError as reason:
        raise UserError(f"export: {reason}") from None
