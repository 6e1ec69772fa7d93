"""Patience with rewards that fail: a step with too few valid scores teaches nothing, several in a row end the run, with nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.rollout import Rollout
from visalign.scoring import Panel


class Patience:
    """Counts the steps in a row with too few valid scores, alike on all processes.

    Args:
        panel: the rewards.
        processes: of the run.
        least: share of the pictures that must have a valid total.
        steps: how many steps in a row may lack it, the last of which ends the run.
    """

    def __init__(self, panel: Panel, processes: Processes, least: float, steps: int):
        self.panel, self.processes, self.least, self.steps = panel, processes, least, steps
        self.waited = 0

    def lost(self, rollout: Rollout, step: int, run: Path, save: Callable[[int], None]) -> bool:
        """Whether this step must be skipped.

        Args:
            run: the run folder.
            save: writes a checkpoint of a step.

        Raises:
            UserError: patience has run out. A checkpoint of the last step that learned has been written.
        """
        aliases = ["total", *(alias for alias, weight in self.panel.weights.items() if weight)]
        failed = torch.stack([(~rollout.rewards[alias].isfinite()).sum().to(self.processes.device) for alias in aliases])
        counts = dict(zip(aliases, self.processes.sum(failed).tolist(), strict=True))
        total = len(rollout.prompts) * self.processes.count
        self.waited = self.waited + 1 if total - counts.pop("total") < self.least * total else 0
        if self.waited < self.steps:
            return self.waited > 0
        worst = max(counts, key=counts.__getitem__)
        said, learned = rollout.errors.get(worst), step - self.waited
        if learned:
            save(learned)
        raise UserError(
            f"rewards.{worst}: {counts[worst]} of {total} scores failed in step {step}, the {_ordinal(self.waited)} in a row with less "
            f"than trainer.min_valid={self.least:g} of them valid"
            + (f"; it said: {' '.join(said[0].split())[:200]}" if said else "")
            + (f"; mend it and start again to go on from step {learned} ({run})" if learned else "; nothing was learned yet")
        )


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
