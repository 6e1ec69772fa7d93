"""Rewards that learn while the policy does: one update per training step, the same on every process.

Unlike gradient averaging, every process trains on the pictures of all, and the main one's result is taken over: a head is small, and equal
heads matter more than the forwards that are saved. It happens after the policy's update, so that all pictures of a step, and everything
that credit asks about them, are scored by one version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from visalign import checkpoint
from visalign.config import RewardSection
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.rollout import Rollout
from visalign.scoring import Panel, RewardInput

Sections = Mapping[str, RewardSection]


def update(panel: Panel, rollout: Rollout, processes: Processes) -> dict[str, float]:
    """Update every trainable reward on a step's pictures, as 8 bits; their metrics as reward_update/ALIAS/NAME."""
    learners = {alias: reward for alias, reward in panel.rewards.items() if reward.spec.trainable}
    if not learners:
        return {}
    prompts = rollout.prompts
    images = processes.gather((rollout.images.detach().clamp(0, 1) * 255).round().byte()).float() / 255
    groups = processes.gather(prompts.groups.to(images.device))
    fake = RewardInput(images, processes.gather_list(prompts.texts), processes.gather_list(prompts.metadata), groups=groups)
    metrics: dict[str, float] = {}
    for alias, reward in learners.items():
        found = reward.update(reward.real(fake), fake)
        if processes.count > 1:
            reward.load_state_dict(processes.broadcast(reward.state_dict()))
        metrics |= {f"reward_update/{alias}/{name}": value for name, value in found.items()}
    return metrics


def share(judges: Panel, judged: Sections, rewards: Panel, trained: Sections) -> None:
    """Let judges that learn be the rewards that are trained: a second copy would stay as it is.

    Raises:
        UserError: a judge that has learned nothing, and is none of the training rewards.
    """
    for alias, twin in _twins(judges, judged, trained).items():
        judges.rewards[alias] = rewards.rewards[twin]


def restore(judges: Panel, judged: Sections, run: Path, trained: Sections) -> None:
    """Give judges that learn what the newest checkpoint of a run has of them.

    Raises:
        UserError: as above, or a checkpoint that can't be read.
    """
    twins = _twins(judges, judged, trained)
    state = checkpoint.load(checkpoint.found(run / "checkpoints")[-1], ["rewards"])[0]["rewards"] if twins else {}
    for alias, twin in twins.items():
        judges.rewards[alias].load_state_dict({n.removeprefix(f"{twin}/"): v for n, v in state.items() if n.startswith(f"{twin}/")})


def _twins(judges: Panel, judged: Sections, trained: Sections) -> dict[str, str]:
    """Judge -> the training reward that it is, options and all, for judges that learn."""
    found: dict[str, str] = {}
    for alias, section in judged.items():
        spec = judges.rewards[alias].spec
        same = [name for name, other in trained.items() if (other.use, other.options) == (section.use, section.options)]
        if spec.trainable and same:
            found[alias] = same[0]
        elif spec.trainable and spec.version == "0":
            raise UserError(
                f"eval.rewards.{alias}: {section.use} has learned nothing and judges nothing; give it all options of the training reward, "
                "or what a run has trained"
            )
    return found
