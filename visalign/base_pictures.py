"""Pictures of the untrained model, drawn once before training, for rewards that are measured against them.

What the rewards learn of them is kept in the run folder, beside what it was learned for, so that a resumed run measures with the same
scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visalign.config import Config, RewardSection
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.prompts import PromptSet
from visalign.sampling import pictures
from visalign.scoring import Panel, Reward, RewardInput

FILE = "base_rewards.safetensors"

Sections = Mapping[str, RewardSection]


def calibrate(
    config: Config, policy: Policy, panels: Mapping[str, Panel], prompts: PromptSet, processes: Processes, keep: bool = True
) -> None:
    """Calibrate every reward that asks for it (`Reward.base_pictures`) before the policy learns anything.

    All see the same pictures, of the training prompts and with the noise-free sampler, and on all processes, so that they learn the same.

    Args:
        panels: section of the recipe -> its rewards.
        keep: write down what they learned, in the run folder.

    Raises:
        UserError: a reward can't learn from these pictures.
    """
    waiting = {f"{section}/{a}": r for section, panel in panels.items() for a, r in panel.rewards.items() if r.base_pictures}
    file, purpose = config.run.path / FILE, _purpose(config)
    if not waiting or _restore(file, purpose, waiting):
        return
    count = -(-max(reward.base_pictures for reward in waiting.values()) // processes.count) * processes.count
    drawn = prompts.evaluation(count, config.prompts.balance)
    own, section = drawn.take(processes.shard(count, "pictures")), config.policy
    images = processes.gather(pictures(policy, own, steps=section.steps, seed=config.run.seed, guidance=section.guidance))
    base = RewardInput(images, drawn.texts, drawn.metadata, groups=drawn.groups)
    for reward in waiting.values():
        reward.calibrate(base)
    if keep and processes.main:
        state = {f"{name}/{key}": value for name, reward in waiting.items() for key, value in reward.state_dict().items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, file, {"made_for": purpose})
        except OSError as error:
            raise UserError(f"run.path: cannot write {file} ({error.strerror}); choose another folder") from None


def restore(judges: Panel, judged: Sections, run: Path, trained: Config) -> None:
    """Give judges what the rewards of a run that have the same options learned of its model before training; others stay as they are.

    Raises:
        UserError: what was learned can't be read.
    """
    known = {f"eval.rewards/{a}": s for a, s in trained.eval.rewards.items()} | {f"rewards/{a}": s for a, s in trained.rewards.items()}
    waiting: dict[str, Reward] = {}
    for alias, reward in judges.rewards.items():
        section = judged[alias]
        same = [name for name, other in known.items() if (other.use, other.options) == (section.use, section.options)]
        if reward.base_pictures and same:
            waiting[same[0]] = reward
    if waiting and not _restore(run / FILE, None, waiting):
        raise UserError(f"{run / FILE} can't be read; `visalign train` on the run's config.yaml measures its rewards anew")


def _purpose(config: Config) -> str:
    """What a calibration depends on; another value of any of it needs another."""
    section = config.policy
    drawn = {"seed": config.run.seed, "prompts": config.prompts.train, "balance": config.prompts.balance}
    drawn |= {"model": section.model, "steps": section.steps, "guidance": section.guidance, "resolution": section.resolution}
    rewards = {"rewards": config.rewards, "eval.rewards": config.eval.rewards}
    return json.dumps(
        drawn | {name: {a: s.model_dump(mode="json") for a, s in part.items()} for name, part in rewards.items()}, sort_keys=True
    )


def _restore(file: Path, purpose: str | None, waiting: Mapping[str, Reward]) -> bool:
    """Whether the rewards could go on with what they learned before, for the same purpose; None: for any."""
    try:
        with safe_open(file, "pt") as content:
            if purpose not in (None, (content.metadata() or {}).get("made_for")):
                return False
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # none yet, or cut off by a kill
        return False
    for name, reward in waiting.items():
        reward.load_state_dict({key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")})
    return True
