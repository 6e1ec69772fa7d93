"""What `visalign plan` says: a page of text on what a recipe needs, whether a GPU has it, and what to change if it hasn't."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from visalign import build, dry_run, registry
from visalign.config import Config, validate
from visalign.dry_run import Count
from visalign.errors import UserError
from visalign.planning import GB, GPU, USABLE, UTILISATION, Line, Needs, Subject, gpu, needs, pictures

WORLDS = (1, 2, 4, 8, 16, 32, 64)  # numbers of GPUs for which a geometry is shown
SAVINGS: tuple[tuple[str, str, Any], ...] = (  # section, key, value: tried in this order until the recipe fits
    ("policy", "gradient_checkpointing", True),
    ("policy", "dtype", "bf16"),
    ("policy", "precision", "bf16"),
    ("policy", "rest", True),
    ("optimizer", "kind", "adamw8bit"),
    ("policy", "quantise", "nf4"),
)
REWARDS = {  # hub id -> weights, of the rewards' default checkpoints
    "openai/clip-vit-large-patch14": 428e6,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986e6,
}


@dataclass(frozen=True)
class Plan:
    """A recipe with what it costs.

    Attributes:
        recipe: complete, with the trainer's defaults.
        subject: its networks.
        lines: with and without gradient checkpointing, the memory of a forward and its backward pass.
        rewards: bytes of the rewards whose size is known.
    """

    recipe: Config
    subject: Subject
    lines: Mapping[bool, Line]
    rewards: float

    @property
    def count(self) -> Count:
        return self.subject.count

    @property
    def options(self) -> dict[str, Any]:
        return self.recipe.trainer.options

    def needs(self, gpus: int = 1, recipe: Config | None = None, micro_batch: int | None = None) -> Needs:
        """On each of some GPUs."""
        wanted = recipe or self.recipe
        batch = micro_batch or min(wanted.trainer.options["micro_batch"], pictures(wanted.trainer.options, gpus))
        return needs(self.subject, wanted, gpus, batch, self.lines, self.rewards)

    def flops(self) -> dict[str, float]:
        """Of one training step over all GPUs, by what they are spent on."""
        count, forward, backward = self.count, self.subject.forward, self.subject.backward
        total = self.options["prompts"] * self.options["group_size"]
        again = forward * self.recipe.policy.gradient_checkpointing
        silent = count.nfe_train - count.nfe_backward  # forwards of the replay that nothing flows back through
        training = silent * forward + count.nfe_backward * (backward + again)
        rollout, decoding = (count.nfe + count.nfe_credit) * forward, self.subject.decoding_flops
        return {"rollout": total * rollout, "training": total * training, "decoding": total * decoding}

    def seconds(self, card: GPU, gpus: int = 1) -> float:
        """Of one training step, rewards and evaluation left out."""
        return sum(self.flops().values()) / (card.tflops * 1e12 * UTILISATION * gpus)

    def fits(self, card: GPU, gpus: int = 1, recipe: Config | None = None, micro_batch: int | None = None) -> bool:
        return self.needs(gpus, recipe, micro_batch).peak <= card.memory * GB * USABLE

    def micro_batch(self, card: GPU, gpus: int, recipe: Config | None = None) -> int | None:
        """The largest that fits and divides a process's pictures; None where not even one picture does."""
        own = pictures(self.options, gpus) // self.options["updates"]
        sizes = [n for n in range(1, own + 1) if own % n == 0]
        return next((n for n in reversed(sizes) if self.fits(card, gpus, recipe, n)), None)

    def savings(self, card: GPU) -> tuple[Config, list[str]]:
        """The recipe changed step by step until it fits, and the changes; the last is the micro-batch. It may still not fit."""
        recipe, changes = self.recipe, list[str]()
        for section, key, value in SAVINGS:
            if self.fits(card, recipe=recipe):
                return recipe, changes
            if key == "quantise" and self.micro_batch(card, 1, recipe):
                break  # smaller batches cost less than four bits
            part = getattr(recipe, section)
            learns_all = key in ("dtype", "quantise") and recipe.policy.lora is None  # what learns stays in fp32
            if getattr(part, key) == value or learns_all:
                continue
            recipe = recipe.model_copy(update={section: part.model_copy(update={key: value})})
            changes.append(f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}")
        if not self.fits(card, recipe=recipe) and (size := self.micro_batch(card, 1, recipe)):
            options = self.options | {"micro_batch": size}
            trainer = type(recipe.trainer).model_validate({"name": recipe.trainer.name} | options)
            recipe = recipe.model_copy(update={"trainer": trainer})
            changes.append(f"trainer.micro_batch={size}")
        return recipe, changes

    def largest_group(self, card: GPU, recipe: Config) -> int:
        """Pictures that one such GPU can hold the rollout of, at the recipe's micro-batch."""
        found = self.needs(1, recipe)
        each = found.storage / pictures(self.options, 1)
        return max(0, int((card.memory * GB * USABLE - found.peak + found.storage) / each))


def plan(config: Config) -> Plan:
    """Count a recipe's step in a toy world and its networks on the meta device; no weights are read.

    Raises:
        UserError: a recipe that trains no policy, or a model whose configuration can't be had.
    """
    kind = build.algorithm(config)
    whole = build.completed(config, kind.defaults)
    settings = validate(kind.Config, config.trainer.options, "trainer")
    trainer = type(config.trainer).model_validate({"name": config.trainer.name} | settings.model_dump())
    registry.check_rewards(config.rewards)
    count = dry_run.counted(config)
    whole = whole.model_copy(update={"trainer": trainer})
    subject = Subject(whole, count)
    lines = {checkpointing: subject.learning(checkpointing) for checkpointing in (True, False)}
    return Plan(whole, subject, lines, sum(size or 0.0 for size in rewards(whole).values()))


def rewards(config: Config) -> dict[str, float | None]:
    """Model of a reward -> its bytes in fp32, each model once; None where nobody knows."""
    found: dict[str, float | None] = {}
    for section in registry.resolved(config.rewards, config.policy.model).values():
        spec = getattr(registry.load("rewards", section.use), "spec", None)
        name = str(section.options.get("checkpoint") or getattr(spec, "model_id", ""))
        files = list(registry.asset(name).glob("*.safetensors")) if name.startswith("toybox/") else []
        if name:
            found[name] = float(sum(file.stat().st_size for file in files)) if files else REWARDS[name] * 4 if name in REWARDS else None
    return found


# --- text ----------------------------------------------------------------------------------------------------------------


def text(config: Config, card: str, gpus: int = 1) -> str:
    """The page for a recipe on so many GPUs of a kind."""
    wanted = gpu(card)
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: expected 1 or more")
    found = plan(config)
    return "\n".join([*_model(found), *_work(found, wanted, card, gpus), *_memory(found, gpus), *_fit(found, wanted, card, gpus)])


def _model(found: Plan) -> Iterator[str]:
    subject, section = found.subject, found.recipe.policy
    yield f"model      {section.model}, after {subject.skeleton.source}; no weights were read"
    yield f"network    {_many(subject.frozen + subject.trainable)} weights, {_many(subject.trainable)} of them learn"
    yield f"           latents {tuple(subject.policy.family.latent_shape)}, {section.dtype} weights, {section.precision} arithmetic"
    yield "encoders   " + ", ".join(f"{name} {_many(size)}" for name, size in subject.skeleton.encoders.items())
    if unknown := sorted(name for name, size in rewards(found.recipe).items() if size is None):
        yield f"rewards    not counted, as their size is not known: {', '.join(unknown)}"


def _work(found: Plan, card: GPU, name: str, gpus: int) -> Iterator[str]:
    count, options = found.count, found.options
    total = options["prompts"] * options["group_size"]
    yield f"step       {options['prompts']} groups × {options['group_size']} = {total} pictures"
    yield (
        f"forwards   per picture: rollout {count.nfe:g}, completions {count.nfe_credit:g}, replay {count.nfe_train:g}, backward passes "
        f"{count.nfe_backward:g}; {count.reward_calls:g} pictures scored"
    )
    flops = found.flops()
    yield f"FLOPs      {sum(flops.values()):.3g} a step: " + ", ".join(f"{part} {value:.3g}" for part, value in flops.items())
    seconds = found.seconds(card, gpus)
    yield (
        f"time       {seconds:.3g} s a step on {gpus} × {name} ({card.tflops:g} TFLOPS bf16, of which {UTILISATION:.0%} are assumed to be "
        "used), without rewards, evaluation and text encoders"
    )


def _memory(found: Plan, gpus: int) -> Iterator[str]:
    need = found.needs(gpus)
    yield f"memory     of each of {gpus}, in GB:"
    for part in ("weights", "encoders", "gradients", "optimiser", "copies", "storage", "rewards"):
        yield f"  {part:<12} {getattr(need, part) / GB:9.3f}  {LABELS[part]}"
    for part, value in need.phases.items():
        yield f"  {part:<12} {value / GB:9.3f}  at most at once"
    for on in (False, True):
        section = found.recipe.policy.model_copy(update={"gradient_checkpointing": on})
        other = found.needs(gpus, found.recipe.model_copy(update={"policy": section}))
        yield f"  activations  {other.learning / GB:8.3f}  of training, {'with' if on else 'without'} gradient checkpointing"
    yield f"  peak         {need.peak / GB:8.3f}"


LABELS = {
    "weights": "network, with what learns in fp32",
    "encoders": "text encoders and VAE",
    "gradients": "of what learns",
    "optimiser": "two moments",
    "copies": "the average, and what else the algorithm keeps",
    "storage": "a rollout's latents, pictures and prompts",
    "rewards": "whose size is known",
}


def _fit(found: Plan, card: GPU, name: str, gpus: int) -> Iterator[str]:
    limit = f"{card.memory:g} GB, of which {USABLE:.0%} are counted on"
    if found.fits(card, gpus):
        yield f"fits       {name} ({limit}); largest rollout: {found.largest_group(card, found.recipe)} pictures"
        recipe = found.recipe
    else:
        recipe, changes = found.savings(card)
        need = found.needs(1, recipe).peak / GB
        fits = found.fits(card, recipe=recipe)
        verdict = "which fits" if fits else "still too much: share weights over several GPUs (configs/accelerate/fsdp2.yaml)"
        yield f"too large  for {name} ({limit})"
        yield f"change     {' '.join(changes)} → {need:.3g} GB, {verdict}; largest rollout: {found.largest_group(card, recipe)} pictures"
    yield f"geometry   {found.options['prompts']} groups × {found.options['group_size']} pictures, whatever the number of GPUs:"
    for world in sorted({*WORLDS, gpus}):
        yield f"  {world:3} GPUs  {_geometry(found, card, world, recipe)}"


def _geometry(found: Plan, card: GPU, world: int, recipe: Config) -> str:
    prompts = found.options["prompts"]
    if prompts % world:
        near = f"{prompts - prompts % world} or " if prompts > world else ""
        return f"groups can't be shared out whole; {near}{prompts - prompts % world + world} groups could"
    batch = found.micro_batch(card, world, recipe)
    if batch is None:
        return f"{prompts // world} groups each: one picture is too much"
    rounds = pictures(found.options, world) // batch
    seconds = found.seconds(card, world)
    return f"{prompts // world} groups each, trainer.micro_batch={batch}, {rounds} forwards a denoising step; {seconds:.3g} s a step"


def _many(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"
