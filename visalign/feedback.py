"""AI feedback: pairs drawn from a policy, and labels that a panel of rewards gives them.

As in VisionPrefer (arXiv 2404.15100) every judge's scores are kept beside the preference, aspect by aspect: a panel's aliases are the
aspects, its weights say how much each counts, and one of weight 0 is recorded without a say. Its four are four `vlm_rating` rewards:

    rewards: {following: {use: vlm_rating}, aesthetic: {use: vlm_rating, aspects: [aesthetic]}, fidelity: …, harmlessness: …}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from visalign import pictures, preferences, registry, sampling
from visalign.config import AtLeastZero, Config, Fraction, Positive, Section
from visalign.distributed import Processes
from visalign.errors import UserError
from visalign.loop import Session
from visalign.policy import Policy
from visalign.preferences import Label, Pair
from visalign.prompts import PromptSet
from visalign.scoring import Panel, RewardInput

CHUNK = 64  # pairs that are labelled at a time; what a kill loses at most
ENOUGH = 500  # pairs drawn, of which hardly any has a better one, until making more is given up


class Source(Section):
    """Where the pairs of a recipe come from."""

    pairs: Path | None = None  # a pairs file (see visalign.preferences); null: drawn from policy.model and labelled by the rewards
    make: Positive = 2000  # how many to draw
    label: bool = False  # let the rewards label those rows of `pairs` that have no label
    margin: AtLeastZero = 0.0  # difference of the weighted scores up to which two pictures tie
    held_out: Fraction = 0.2  # share of the prompts that is judged and never trained on


def obtain(config: Config, source: Source, processes: Processes, session: Callable[[], Session]) -> list[Pair]:
    """The labelled pairs of a recipe: read, or made once and kept in the run folder."""
    folder = config.run.path / "pairs"
    origin: dict[str, Any] = {"rewards": {alias: section.model_dump() for alias, section in config.rewards.items()}}
    if source.pairs is None:
        parts, policy = session(), config.policy
        origin |= {"model": policy.model, "prompts": config.prompts.model_dump(exclude={"test"})}
        how = {"steps": policy.steps, "guidance": policy.guidance, "seed": config.run.seed, "margin": source.margin}
        common = {"batch": config.eval.batch, "balance": config.prompts.balance, "origin": origin, "processes": processes}
        return make(parts.policy, parts.train_prompts, parts.rewards, folder, source.make, **how, **common)
    pairs = preferences.read(source.pairs)
    unsaid = next((n for n, pair in enumerate(pairs, 1) if pair.better is None), None)
    if unsaid is None:
        return pairs
    if not source.label:
        raise UserError(f'{source.pairs}, row {unsaid}: no label; say which is "better", or set trainer.label=true to ask the rewards')
    if not config.rewards:
        raise UserError("trainer.label=true asks the recipe's rewards, and there are none; name one, such as rewards.vlm_yes=1.0")
    panel = registry.build_panel(config.rewards, config.policy.model, processes.device)
    return label(pairs, panel, folder, margin=source.margin, origin=origin | {"pairs": str(source.pairs)}, processes=processes)


def make(
    policy: Policy,
    prompts: PromptSet,
    panel: Panel,
    folder: Path,
    count: int,
    *,
    steps: int,
    processes: Processes,
    guidance: float = 1.0,
    seed: int = 0,
    margin: float = 0.0,
    batch: int = 64,
    balance: str | None = None,
    origin: dict[str, Any] | None = None,
) -> list[Pair]:
    """Draw two pictures of every prompt by the noise-free sampler until `count` pairs have a better one; ties are thrown away.

    Args:
        folder: gets pairs.jsonl and the pictures. What is there and was made alike is gone on from.
        batch: pictures per forward.
        margin: see `Source`.
        origin: what else the pairs depend on, to know whether those in the folder were made alike.

    Raises:
        UserError: the folder holds pairs of another origin, or hardly any two pictures differ.
    """
    made_by = {"steps": steps, "guidance": guidance, "seed": seed, "margin": margin} | (origin or {})
    kept = _kept(folder, made_by, processes)
    chunk = max(1, batch // 2) * processes.count
    number = -(-(int(kept[-1].images[0].stem.partition("_")[0]) + 1) // chunk) if kept else 0  # the first that was not drawn in whole
    with tqdm(total=count, initial=len(kept), desc="pairs", unit="pair", disable=not processes.main) as bar:
        while len(kept) < count:
            both = prompts.draw(chunk, 2, seed, number, balance=balance)
            names = [f"{number * chunk + n // 2:06d}_{n % 2}" for n in range(2 * chunk)]
            own = processes.shard(2 * chunk, "pairs")
            images = sampling.pictures(policy, both.take(own), steps=steps, seed=seed, batch=batch, guidance=guidance)
            pictures.save(images, folder, names[own])
            processes.wait()
            files = [folder / f"{name}.png" for name in names]
            fresh = [Pair(both.texts[n], (files[n], files[n + 1]), metadata=both.metadata[n]) for n in range(0, 2 * chunk, 2)]
            said = judged(fresh, panel, margin, processes)
            kept += [pair for pair in said if pair.better in (0, 1)]
            number += 1
            if processes.main:
                _drop([path for pair in said if pair.better not in (0, 1) for path in pair.images])
                preferences.write(folder / "pairs.jsonl", kept)
            bar.update(min(count, len(kept)) - bar.n)
            if number * chunk > ENOUGH and 50 * len(kept) < number * chunk:
                few = f"only {len(kept)} of {number * chunk} pairs differ by more than {margin:g}"
                raise UserError(f"{few}; label them by a finer reward, or lower trainer.margin")
    return kept[:count]


def label(
    pairs: Sequence[Pair], panel: Panel, folder: Path, *, processes: Processes, margin: float = 0.0, origin: dict[str, Any] | None = None
) -> list[Pair]:
    """The pairs with labels where they had none, also as `folder`/pairs.jsonl; None stays where a reward failed.

    Args, Raises: as in `make`.
    """
    done = _kept(folder, {"margin": margin} | (origin or {}), processes)
    for n in tqdm(range(len(done), len(pairs), CHUNK), "label", unit=f"{CHUNK} pairs", disable=not processes.main):
        rows = list(pairs[n : n + CHUNK])
        said = iter(judged([pair for pair in rows if pair.better is None], panel, margin, processes))
        done += [next(said) if pair.better is None else pair for pair in rows]
        if processes.main:
            preferences.write(folder / "pairs.jsonl", done)
    return done


@torch.no_grad()
def judged(pairs: Sequence[Pair], panel: Panel, margin: float, processes: Processes) -> list[Pair]:
    """What a panel says of pairs; processes share the work and all get the whole result."""
    if not pairs:
        return []
    names = [*panel.rewards, "total"]
    said = processes.gather(_scores(processes.share(pairs), panel, names, processes.device))[: len(pairs)].cpu()
    found: list[Pair] = []
    for pair, table in zip(pairs, said, strict=True):
        scores = {name: (a, b) for name, (a, b) in zip(names, table.tolist(), strict=True) if name != "total"}
        found.append(replace(pair, better=_verdict(table[-1].tolist(), margin), scores=pair.scores | scores))
    return found


def _scores(pairs: Sequence[Pair], panel: Panel, names: Sequence[str], device: torch.device) -> Tensor:
    """(P, names, 2) scores of the files, those of one size in one batch."""
    shown = [picture for pair in pairs for picture in pair.load()]
    found = torch.full((len(shown), len(names)), torch.nan, device=device)
    for shape in dict.fromkeys(picture.shape for picture in shown):
        rows = torch.tensor([n for n, picture in enumerate(shown) if picture.shape == shape])
        owners = [pairs[n // 2] for n in rows.tolist()]
        images = torch.stack([shown[n] for n in rows.tolist()]).to(device)
        batch = RewardInput(images, [p.prompt for p in owners], [p.metadata for p in owners], groups=rows // 2)
        scores = panel.score(batch).by_name()
        found[rows.to(device)] = torch.stack([scores[name].to(device) for name in names], 1)
    return found.unflatten(0, (-1, 2)).transpose(1, 2)


def _verdict(total: Sequence[float], margin: float) -> Label | None:
    difference = total[1] - total[0]
    if difference != difference:
        return None
    return "tie" if abs(difference) <= margin else 1 if difference > 0 else 0


def _kept(folder: Path, made_by: dict[str, Any], processes: Processes) -> list[Pair]:
    """The pairs that a folder holds already; none in a new one, which is told how its pairs are made."""
    note, made_by = folder / "made_by.json", json.loads(json.dumps(made_by))
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if other := sorted(key for key in {*before, *made_by} if before.get(key) != made_by.get(key)):
            raise UserError(f"{folder} holds pairs that were made with other {', '.join(other)}; delete it, or choose another run.path")
    processes.wait()
    if processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
    file = folder / "pairs.jsonl"
    return preferences.read(file) if file.is_file() and file.stat().st_size else []


def _drop(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
