"""A folder of sampled pictures with their scores: one record per prompt, so that a command that was cut off goes on where it stopped.

OUT/sample.json     the settings that all pictures of the folder share
OUT/00012-0.png     the first picture of prompt 12, …
OUT/00012.json      its prompt, scores, costs and trace; written last and at once, so that it says "done"
OUT/scores.json     all records without their traces, and their means; OUT/sheet.png, sheet-2.png, …: contact sheets
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from visalign import api, drawing, pictures
from visalign.errors import UserError
from visalign.prompts import PromptSet

SHEET = 64  # pictures on one, at most


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn for every prompt; the fields are those of `drawing.sample_stream`, and the pictures depend on all of them."""

    model: str
    rewards: dict[str, Any]
    judges: dict[str, Any]
    method: str
    options: dict[str, Any]
    budget: dict[str, Any]
    n: int
    steps: int
    guidance: float
    seed: int


def fill(folder: Path, prompts: PromptSet, wanted: Wanted, device: str = "auto", batch: int = 16) -> str:
    """Draw what the folder does not have yet; what there is to say at the end.

    Prompts are drawn one by one, each with the noise that it has in the whole list, and with a budget of its own.

    Raises:
        UserError: settings that can't be, before anything is loaded; a folder of other settings or prompts.
    """
    rewards, judges = wanted.rewards or None, wanted.judges or None
    drawing.plan(wanted.method, wanted.options, wanted.budget, rewards, judges)
    drawing.listed(prompts.texts, wanted.n)
    if min(wanted.n, wanted.steps, batch) < 1:
        raise UserError(f"--n {wanted.n} --steps {wanted.steps} --batch {batch}: expected 1 or more of each")
    _claim(folder, wanted)
    missing = [number for number, text in enumerate(prompts.texts) if not _done(folder, number, text)]
    if missing:
        policy = api.load(wanted.model, device)
        panels = [None if one is None else api.panel(one, policy.name, policy.device) for one in (rewards, judges)]
        fixed: dict[str, Any] = {"method": wanted.method, "n": wanted.n, "steps": wanted.steps, "guidance": wanted.guidance}
        fixed |= {"batch": batch, "seed": wanted.seed, "budget": wanted.budget, "reward": panels[0], "judges": panels[1]} | wanted.options
        for number in tqdm(missing, desc=wanted.method, unit="prompt", initial=len(prompts) - len(missing), total=len(prompts)):
            text, known = prompts.texts[number], prompts.metadata[number]
            result = drawing.sample(policy, text, metadata=[known], first_id=number * wanted.n, **fixed)
            _write(folder, number, text, result)
    return _finish(folder, prompts)


def _claim(folder: Path, wanted: Wanted) -> None:
    """The folder, made if missing, is one of these settings from now on."""
    file, own = folder / "sample.json", json.loads(json.dumps(asdict(wanted)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            _save(file, own)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from None
    there = _read(file)
    for key, value in own.items():
        if there.get(key) != value:
            raise UserError(f"--out {folder} has pictures of other settings: {key} is {there.get(key)!r} there and {value!r} here")


def _done(folder: Path, number: int, text: str) -> bool:
    """Whether a prompt has its record."""
    file = folder / f"{number:05d}.json"
    if not file.is_file():
        return False
    if (there := _read(file).get("prompt")) != text:
        raise UserError(f"--out {folder} has pictures of other prompts: number {number} is {there!r} there and {text!r} here")
    return True


def _write(folder: Path, number: int, text: str, result: drawing.Result) -> None:
    names = [f"{number:05d}-{k}" for k in range(len(result.images))]
    pictures.save(result.images, folder, names)
    scores = {name: _plain(values) for name, values in result.scores.items()}
    held_out = {name: _plain(values) for name, values in result.held_out.items()}
    costs = {"nfe": result.nfe, "nfe_backward": result.nfe_backward, "reward_calls": result.reward_calls, "seconds": result.seconds}
    record = {"prompt": text, "pictures": [f"{name}.png" for name in names], "scores": scores, "held_out": held_out}
    trace = [{key: _number(value) for key, value in row.items()} for row in result.trace]
    _save(folder / f"{number:05d}.json", record | costs | {"trace": trace})


def _finish(folder: Path, prompts: PromptSet) -> str:
    """Write scores and sheets of the whole list; the means, for the terminal."""
    records = [_read(folder / f"{number:05d}.json") for number in range(len(prompts))]
    for record in records:
        record.pop("trace", None)
    means = {f"{kind}/{name}": _mean(records, kind, name) for kind in ("scores", "held_out") for name in records[0][kind]}
    _save(folder / "scores.json", {"means": means, "prompts": records})
    shown = [(name, _caption(record, k)) for record in records for k, name in enumerate(record["pictures"])]
    for first in range(0, len(shown), SHEET):
        page = shown[first : first + SHEET]
        images = pictures.shown([folder / name for name, _ in page])
        sheet = pictures.grid(images, columns=8, captions=[caption for _, caption in page])
        sheet.save(folder / ("sheet.png" if first == 0 else f"sheet-{first // SHEET + 1}.png"))
    lines = [f"{name:<28} {'none valid' if value is None else f'{value:.4g}'}" for name, value in means.items()]
    cost = {key: statistics.fmean(record[key] for record in records) for key in ("nfe", "nfe_backward", "seconds")}
    spent = f"{cost['nfe']:.0f} NFE and {cost['nfe_backward']:.0f} backwards a picture, {cost['seconds']:.2g} s a prompt"
    return "\n".join([*lines, f"{len(shown)} pictures of {len(records)} prompts, {spent}: {folder / 'sheet.png'}"])


def _caption(record: dict[str, Any], k: int) -> str:
    total = record["scores"].get("total", [None] * (k + 1))[k]
    return record["prompt"] if total is None else f"{total:.3f}  {record['prompt']}"


def _mean(records: list[dict[str, Any]], kind: str, name: str) -> float | None:
    """Of the valid scores."""
    values = [value for record in records for value in record[kind].get(name, []) if value is not None]
    return statistics.fmean(values) if values else None


def _plain(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """As JSON can hold it."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}); delete it to have it made again") from None


def _save(file: Path, content: dict[str, Any]) -> None:
    """At once, or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(file)
