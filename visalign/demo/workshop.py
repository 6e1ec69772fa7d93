"""What all visitors of the demo share: loaded models and rewards, and one worker that serves them in turn.

Nothing of a visitor is kept here. A single thread does all the work of models: states of several searches interleave in the order in
which they are asked for, and no two of them fight over cores.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from visalign import api, checkpoint, registry
from visalign.config import RewardSection, validate
from visalign.distributed import pick_device
from visalign.errors import UserError
from visalign.explain import nearest
from visalign.policy import Policy
from visalign.scoring import Panel, Reward

OFFERED: dict[str, dict[str, Any]] = {  # on the toybox; the two with references know what a prompt looks like, and give maps
    "toybox": {},
    "clip_score": {},
    "vlm_yes": {},
    "dino": {"references": "toybox"},
    "condition": {"kind": "colours", "references": "toybox"},
    "jpeg": {},
}
OFFERED_ELSEWHERE = ("clip_score", "pickscore", "aesthetic", "jpeg")
JUDGES = ("visalign.toybox.judge:SecondJudge",)  # on the toybox; never searched by
DEPTH = 3  # folders below the root in which runs are looked for
RUNS = 200  # most that are listed
KEPT = 3  # loaded runs
RUN = "run: "  # before the name of a run among the models

Answer = TypeVar("Answer")


class Workshop:
    """Models, rewards and run folders that visitors may choose from; they are named, never given as paths.

    Args:
        models: as `visalign.load` takes them; the first is the default, and says which rewards are offered if none are named.
        rewards, judges: names, offered and held out.
        runs: the root below which run folders are shown, and offered as models.
        device: of models and rewards.

    Raises:
        UserError: an unknown reward, one that a single picture can't be scored by, or a device that isn't there.
    """

    def __init__(
        self,
        models: Sequence[str] = ("toybox",),
        rewards: Sequence[str] = (),
        judges: Sequence[str] = (),
        runs: Path = Path("runs"),
        device: str = "auto",
    ):
        self.given, self.root, self.device = list(models), runs, pick_device(device)
        toybox = models[0].startswith("toybox")
        offered = {name: {} for name in rewards or OFFERED_ELSEWHERE} if rewards or not toybox else OFFERED
        self.offered = {name: validate(RewardSection, {"use": name, **options}, name) for name, options in offered.items()}
        held_out = judges or (JUDGES if toybox else ())
        self.held_out = {registry.load("rewards", name).spec.name: RewardSection(use=name) for name in held_out}
        registry.check_rewards(self.offered | self.held_out)
        for name, section in self.offered.items():
            spec = getattr(registry.load("rewards", section.use), "spec", None)
            if spec is not None and (spec.scope != "point" or spec.modality != "image"):
                kind = "compares pictures" if spec.modality == "image" else f"scores a {spec.modality}"
                raise UserError(f"--reward {name}: it {kind}; the demo scores one by one")
        self._policies: dict[str, Policy] = {}
        self._rewards: dict[tuple[str, str], Reward] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="workshop")

    # --- work ----------------------------------------------------------------------------------------------------------

    def turn(self, work: Callable[[], Answer]) -> Answer:
        """Wait for the worker's turn and let it do a piece of work."""
        return self._worker.submit(work).result()

    def turns(self, states: Callable[[], Generator[Answer]]) -> Iterator[Answer]:
        """An iterator of which every element is a turn."""
        iterator = self.turn(states)
        try:
            while (found := self.turn(lambda: next(iterator, None))) is not None:
                yield found
        finally:
            try:
                self._worker.submit(iterator.close)
            except RuntimeError:  # the workshop is closed, and nothing else runs
                iterator.close()

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    # --- what there is -------------------------------------------------------------------------------------------------

    def runs(self) -> dict[str, Path]:
        """Name -> folder of the runs below the root, by name; links that lead out of it are left out."""
        root = self.root.resolve()
        levels = ("/".join("*" * depth) for depth in range(1, DEPTH + 1))
        files = sorted(file for level in levels for file in root.glob(f"{level}/metrics.jsonl") if file.resolve().is_relative_to(root))
        return {file.parent.relative_to(root).as_posix(): file.parent for file in files[:RUNS]}

    def run(self, name: Any) -> Path:
        """The folder of a run.

        Raises:
            UserError: no such run below the root.
        """
        return _chosen(name, self.runs(), "run", "reload the page for the newest list")

    def models(self) -> list[str]:
        """What can be drawn from: the given models, and runs that have a checkpoint."""
        return [*self.given, *(f"{RUN}{name}" for name, folder in self.runs().items() if checkpoint.found(folder / "checkpoints"))]

    def method(self, name: Any) -> str:
        """A method of sampling by its file's name; not a visitor's own. Raises UserError: there is none."""
        return _chosen(name, {known: known for known in registry.names("steering")}, "method", "choose from the list")

    def policy(self, name: Any) -> Policy:
        """A model, loaded when it is first asked for; on the worker. Raises UserError: not offered, or it can't be loaded."""
        source = _chosen(name, {known: known for known in self.models()}, "model", "reload the page for the newest list")
        if source not in self._policies:
            is_run = source not in self.given
            loaded = api.load(self.run(source.removeprefix(RUN)) if is_run else source, str(self.device))
            kept = [known for known in self._policies if known not in self.given]
            if is_run and len(kept) >= KEPT:
                del self._policies[kept[0]]
            self._policies[source] = loaded
        return self._policies[source]

    def sections(self, weights: Mapping[str, float]) -> dict[str, RewardSection]:
        """Rewards with weights as sections. Raises UserError: one isn't offered."""
        chosen = {name: _chosen(name, self.offered, "reward", "choose from the list") for name in weights}
        return {name: section.model_copy(update={"weight": weights[name]}) for name, section in chosen.items()}

    def ranges(self, names: Iterable[str]) -> dict[str, tuple[float, float]]:
        """The scores that loaded rewards promise, lowest and highest."""
        loaded = {name: reward for (_, name), reward in self._rewards.items()}
        return {name: loaded[name].spec.range for name in names}

    def warm(self) -> None:
        """Load the default model and what is offered with it, so that the first visitor doesn't wait for it."""

        def load() -> None:
            model = self.policy(self.given[0]).name
            self.panel(self.offered | self.held_out, model)

        self.turn(load)

    def panel(self, sections: Mapping[str, RewardSection], model: str) -> Panel | None:
        """Rewards, loaded when they are first asked for, with their weights; on the worker. None without any."""
        for name, section in sections.items():
            if (model, name) not in self._rewards:
                self._rewards[model, name] = registry.build_panel({name: section}, model, self.device).rewards[name]
        members = {name: (self._rewards[model, name], section.weight) for name, section in sections.items()}
        return Panel(members) if members else None


def _chosen(name: Any, known: Mapping[str, Answer], what: str, advice: str) -> Answer:
    """What a visitor has chosen by name. Raises UserError: there is no such thing."""
    if not isinstance(name, str) or name not in known:
        shown = repr(name)[:60] if name else "none"
        raise UserError(f"no {what} is named {shown}{nearest(str(name)[:60], list(known))}; {advice}")
    return known[name]
