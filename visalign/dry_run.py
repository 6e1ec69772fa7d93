"""One training step of a recipe in a world where a network costs nothing: how often the real one would be asked, and what is kept.

The plane of `toy:gaussian` takes the model's place, or the one-step toybox where there has to be an adapter, and brightness the rewards';
exploration, credit, updates and groups are the recipe's. So forwards are counted by the algorithm itself, not by a formula beside it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from visalign import build
from visalign.config import Config
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.trainer import Trainer


class Brightness(Reward):
    """Mean of all pixels: differentiable, between 0 and 1, and free."""

    spec = RewardSpec("brightness", differentiable=True, range=(0.0, 1.0))

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(batch.images.flatten(1).mean(1))


@dataclass(frozen=True)
class Count:
    """Of one training step, per picture, classifier-free guidance counting 2.

    Attributes:
        nfe, nfe_credit, nfe_train: forwards of the rollout, of completions, and of the replay.
        nfe_backward: backward passes.
        reward_calls: pictures scored.
        states: latents kept, in numbers of a latent.
        copies: further values of the trainable weights beside the average.
        predictions: what the network said, kept too.
    """

    nfe: float
    nfe_credit: float
    nfe_train: float
    nfe_backward: float
    reward_calls: float
    states: int
    predictions: int
    copies: int


def counted(config: Config) -> Count:
    """The count of a recipe's training step, made on one prompt's group."""
    with tempfile.TemporaryDirectory() as folder:
        return _of(build.trainer(dry(config, folder)), adapter=config.policy.lora is not None)


def _of(trainer: Trainer, adapter: bool) -> Count:
    kept: list[Any] = []
    collect = trainer.collect
    changing: Any = trainer
    changing.collect = lambda *given: kept.append(collect(*given)) or kept[0]
    row = trainer.step(1)
    trajectory = kept[0].trajectory
    copies = len(trainer.copies()) + (trainer.policy.has_reference and not adapter)  # of an adapter the model before is that without it
    predictions = 0 if trajectory.predictions is None else trajectory.predictions.shape[1]
    spent = {name: row.get(name, 0.0) for name in ("nfe", "nfe_credit", "nfe_train", "nfe_backward")}
    return Count(
        **spent, reward_calls=row.get("reward_calls", 1.0), states=1 + trajectory.latents.shape[1], predictions=predictions, copies=copies
    )


def dry(config: Config, folder: str) -> Config:
    """The recipe in that world: one prompt, whole groups, one update."""
    group = config.trainer.options.get("group_size", build.algorithm(config).Config.model_fields["group_size"].default)
    options = config.trainer.options | {"prompts": 1, "micro_batch": group, "updates": 1}
    reward = {"bright": {"use": f"{__name__}:Brightness"}}
    data = config.model_dump(mode="json", exclude_unset=True) | {
        "run": {"path": folder, "device": "cpu", "seed": config.run.seed},
        "rewards": reward,
        "eval": {"images": 1, "rewards": reward},
        "prompts": {},
        "log": [],
        "trainer": {"name": config.trainer.name} | options,
    }
    data["policy"] = {"model": "toy:gaussian", "lora": None, "steps": config.policy.steps, "guidance": config.policy.guidance}
    data["policy"] |= {"options": {"steps": config.policy.steps, "guided": True}}
    if build.algorithm(config).moves_noise:  # by an adapter, which the plane has no place for
        data["policy"] |= {"model": "toybox/turbo", "lora": {"rank": 1, "alpha": 1}, "options": {}}
    return Config.model_validate(data)
