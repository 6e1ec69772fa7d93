"""Rewards that learn while the policy does: one update per training step, the same on every process.

Unlike gradient averaging, every process trains on the pictures of all, and the main one's result is taken over: a head is small, and equal
heads matter more than the forwards that are saved. It happens after the policy's update, so that all pictures of a step, and everything
that credit asks about them, are scored by one version.
"""

from __future__ import annotations

from visalign.config import RewardSection
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.rollout import Rollout
from visalign.scoring import Panel, RewardInput


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


def share(judges: Panel, judged: dict[str, RewardSection], rewards: Panel, trained: dict[str, RewardSection]) -> None:
    """Let judges that are trainable be the rewards that are trained: a second copy would stay untrained.

    Raises:
        UserError: a trainable judge that is none of the training rewards.
    """
    for alias, section in judged.items():
        if not judges.rewards[alias].spec.trainable:
            continue
        same = [name for name, other in trained.items() if (other.use, other.options) == (section.use, section.options)]
        if not same:
            raise UserError(
                f"eval.rewards.{alias}: {section.use} learns during training and judges nothing without it; give it the options of the "
                "training reward, or leave it out"
            )
        judges.rewards[alias] = rewards.rewards[same[0]]
