"""What a search finds for every picture, on disk: one set of files per picture, so that a run that was cut off goes on where it stopped.

    RUN/found/00012.safetensors   `noise` as drawn and `best`, the latents to start from
    RUN/found/00012.png           the best picture; before/00012.png the plain sample
    RUN/found/00012.json          prompt, scores before and after, the trace, and what it cost; written last, so that it says "done"

Unlike a training run's, the rows of metrics.jsonl are not steps but iterations of the search, averaged over all pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from visalign import pictures, report, tracking
from visalign.config import Config
from visalign.errors import UserError

Row = dict[str, float]


@dataclass(frozen=True)
class Record:
    """A picture's search.

    Attributes:
        prompt, metadata: what was drawn.
        recipe: digest of all that the result depends on.
        best_iteration: when it was found.
        before, after: judge -> score of the plain sample and of the best picture; None where the judge failed.
        rewards: name -> score of the best picture.
        trace: name -> one number per iteration.
        seconds, nfe, nfe_backward, reward_calls: of the whole search.
    """

    prompt: str
    metadata: dict[str, Any]
    recipe: str
    best_iteration: int
    before: dict[str, float | None]
    after: dict[str, float | None]
    rewards: dict[str, float | None]
    trace: dict[str, list[float | None]]
    seconds: float
    nfe: float
    nfe_backward: float
    reward_calls: float


def plain(value: float | Tensor) -> float | None:
    """A number as JSON can hold it."""
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None


def digest(config: Config) -> str:
    """Equal for recipes whose results are the same: of everything but where they go and how many there are."""
    whole = config.model_dump(mode="json", exclude={"run", "log", "optimizer"})
    whole["eval"] = whole["eval"]["rewards"]
    return hashlib.sha256(json.dumps([whole, config.run.seed], sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The results in a run folder.

    Args:
        run: the folder.
        recipe: of what is going to be found.
        resume: `run.resume`; "never" refuses a folder that has results.

    Raises:
        UserError: the folder holds results, and they are another recipe's or not to be gone on from.
    """

    def __init__(self, run: Path, recipe: str, resume: str):
        self.run, self.folder, self.recipe = run, run / "found", recipe
        there = sorted(self.folder.glob("*.json"))
        if there and resume == "never":
            raise UserError(f"{run} already holds {len(there)} results; choose another run.path, or run.resume=auto to go on")
        if there and self.read(int(there[0].stem)).recipe != recipe:
            raise UserError(f"{run} holds results of another recipe; choose another run.path, or delete {self.folder}")

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05d}.{suffix}"

    def has(self, number: int) -> bool:
        return self._file(number, "json").is_file()

    def read(self, number: int) -> Record:
        try:
            return Record(**json.loads(self._file(number, "json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self._file(number, 'json')} can't be read ({error}); delete it to have it made again") from None

    def write(self, number: int, record: Record, tensors: Mapping[str, Tensor], before: Tensor, best: Tensor) -> None:
        """A picture's results: latents by name (...), the plain sample and the best picture (3, H, W)."""
        name = f"{number:05d}"
        pictures.save(before[None], self.folder / "before", [name])
        pictures.save(best[None], self.folder, [name])
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, self._file(number, "safetensors"))
        new = self._file(number, "new")
        new.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        new.replace(self._file(number, "json"))

    def summarise(self, count: int, config: Config) -> None:
        """metrics.jsonl, the grid of before and after, and report.html, of results 0 to `count` - 1."""
        records = [self.read(number) for number in range(count)]
        tracker = tracking.Tracker(self.run, config.log, config.model_dump(mode="json"))
        found = rows(records)
        for step, row in enumerate(found):
            tracker.log(step, row)
        shown = range(min(count, config.eval.grid))
        before, after = (pictures.shown([f / f"{n:05d}.png" for n in shown]) for f in (self.folder / "before", self.folder))
        grid = self.run / "samples" / f"step_{len(found) - 1:05d}.png"
        grid.parent.mkdir(parents=True, exist_ok=True)
        pictures.before_after(before, after, [records[n].prompt for n in shown], _verdicts(records[: len(shown)])).save(grid)
        tracker.image(len(found) - 1, "before/after", grid)
        tracker.close()
        report.write(self.run)


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per iteration: means over pictures of the trace, `images` and their costs; judges stand in the first and the last row."""
    length = len(next(iter(records[0].trace.values())))
    cost = {key: statistics.fmean(getattr(r, key) for r in records) / length for key in ("nfe", "nfe_backward", "reward_calls")}
    seconds = sum(r.seconds for r in records) / length
    found = [
        {"seconds": seconds, "images": len(records)} | cost | {name: mean([r.trace[name][n] for r in records]) for name in records[0].trace}
        for n in range(length)
    ]
    if length > 1:
        found[-1] |= {f"eval/{name}": mean([r.after[name] for r in records]) for name in records[0].after}
    found[0] |= {f"eval/{name}": mean([r.before[name] for r in records]) for name in records[0].before}
    return found


def mean(values: Sequence[float | None]) -> float:
    """Of those that are there; NaN if none is."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else math.nan


def _verdicts(records: Sequence[Record]) -> list[tuple[bool, bool]] | None:
    """Whether each is right before and after, if the first judge says right or wrong and not how much."""
    judge = next(iter(records[0].before))
    said = [(record.before[judge], record.after[judge]) for record in records]
    verdict = all(value in (0.0, 1.0) for pair in said for value in pair)
    return [(before == 1.0, after == 1.0) for before, after in said] if verdict else None
