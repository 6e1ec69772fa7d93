"""`python -m benchmarks.reward_model [--pairs 2500] [--steps 300]`: rewards trained on the toybox, by labels, kind and size.

Pairs of pictures are made once by the toybox's model on its training prompts and scored by the verifier, for which they differ by more
than 0.2, and by the larger vision-language model; four fifths of the prompts are trained, the rest is held out. Every reward learns from
either's labels and is held against the verifier: on held-out prompts, on pictures drawn at guidance 4, and on scenes of another renderer
with one attribute changed in one of the two. The last rows learn from as many pairs of drawn scenes, of which again the verifier prefers
one, and are held out on such: what is asked there is only to read a scene, not to judge how well it is drawn.

RewardDance (arXiv 2509.08826) finds that a judge's size shows outside its training distribution, and in the spread of its scores.
Writes results/reward_model.json and reward_model.md; a reward that is there and was trained alike is not trained again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.machine import describe
from visalign import build, config, feedback, pictures, preferences
from visalign.config import Config
from visalign.distributed import Processes
from visalign.preferences import Pair
from visalign.toybox import scenes
from visalign.toybox.build_judge import as_scene, render_smooth
from visalign.trainers.reward_model import RewardModel, quality

PAGE = Path(__file__).parent / "reward_model.md"
FILE = records.RESULTS / "reward_model.json"
MODELS = {  # name -> what differs in the recipe
    "vlm": {"trainer.kind": "yes_token", "trainer.checkpoint": "toybox/vlm"},
    "vlm_small": {"trainer.kind": "yes_token", "trainer.checkpoint": "toybox/vlm_small"},
    "head": {"trainer.kind": "head", "trainer.checkpoint": "toybox/clip", "optimizer.lr": 1e-3},
}
LABELS = ("verifier", "vlm")  # aliases of the rewards that label
WHERE = ("held out", "guidance 4", "other renderer")
ELSEWHERE = 500  # pairs of every other distribution
DRAWN = ("vlm_small", "head")  # that learn from drawn scenes too


def recipe(folder: Path, changes: dict[str, Any]) -> Config:
    """The packaged recipe with both judges as labellers."""
    rewards = {"verifier": {"use": "toybox"}, "vlm": {"use": "vlm_yes", "checkpoint": "toybox/vlm", "form": "log_odds", "weight": 0}}
    return config.load("toybox_reward_model", {"run.path": str(folder), "rewards": rewards, "eval.rewards": rewards} | changes)


# --- pairs -------------------------------------------------------------------------------------------------------------


def distributions(folder: Path, count: int, elsewhere: int, changes: dict[str, Any]) -> dict[str, list[Pair]]:
    """Pairs to train and hold out, "guidance 4" and "other renderer"; and others to train and hold out, "drawn"."""
    given = recipe(folder, changes)
    session = build.session(given, Processes(given.run.device))
    draw: Callable[..., list[Pair]] = lambda name, prompts, many, **more: feedback.make(  # noqa: E731
        session.policy,
        prompts,
        session.rewards,
        folder / name,
        many,
        processes=session.processes,
        batch=given.eval.batch,
        balance=given.prompts.balance,
        margin=given.trainer.options["margin"],
        **more,
    )
    steps = given.policy.steps
    return {
        "held out": draw("pairs", session.train_prompts, count, steps=steps),
        "guidance 4": draw("guidance", session.test_prompts, elsewhere, steps=steps, guidance=4.0),
        "other renderer": rendered(folder / "rendered", elsewhere, test=True),
        "drawn": rendered(folder / "drawn", count, test=False),
    }


def rendered(folder: Path, count: int, *, test: bool) -> list[Pair]:
    """Compositions by the judge's renderer; the worse picture shows another shape, colour, number or relation."""
    rng, noise, found = random.Random(3), torch.Generator().manual_seed(3), list[Pair]()
    by_kind = scenes.prompts(test)
    while len(found) < count:
        record = rng.choice(by_kind[scenes.KINDS[len(found) % len(scenes.KINDS)]])
        other = scenes.alter(record, rng)[1]
        if sum(clause["count"] for clause in other["include"]) > max(scenes.NUMBERS):
            continue
        layouts = [scenes.lay_out(asked, rng) for asked in (record, other)]
        if scenes.meets(layouts[1], record)[0]:
            continue
        better = rng.randrange(2)
        images = render_smooth(as_scene(layouts if better == 0 else layouts[::-1]), noise)
        files = pictures.save(images, folder, [f"{len(found):04d}_{n}" for n in range(2)])
        verdict = (float(better == 0), float(better == 1))
        found.append(Pair(scenes.describe(record), (files[0], files[1]), better, {"verifier": verdict}, record))
    return found


def relabelled(pairs: Sequence[Pair], judge: str) -> list[Pair]:
    """The pairs as one of their judges labels them; those that it finds equal are left out."""
    return [replace(pair, better=int(b > a)) for pair in pairs for a, b in [pair.scores[judge]] if a != b]


# --- rewards -----------------------------------------------------------------------------------------------------------


def train(name: str, label: str, pairs: dict[str, list[Pair]], folder: Path, changes: dict[str, Any], source: str) -> dict[str, Any]:
    """One reward: before and after on held-out pairs of its source by the verifier's labels, elsewhere, its spread and its cost."""
    given = recipe(folder / f"{name}-{label}-{source.replace(' ', '_')}", MODELS[name] | changes)
    trainer = RewardModel(given, Processes(given.run.device), relabelled(pairs[source], label))
    true = {"held out": relabelled(preferences.split(pairs[source], trainer.settings.held_out)[1], "verifier")}
    true |= {other: relabelled(pairs[other], "verifier") for other in WHERE[1:]}
    before = {where: judged(trainer, rows) for where, rows in true.items()}
    rows = [trainer.step(step) for step in range(1, given.run.steps + 1)]
    with trainer.averaged():
        after = {where: judged(trainer, asked) for where, asked in true.items()}
    own = trainer.judge(given.run.steps)
    spent = {"seconds": records.rounded(sum(row["seconds"] for row in rows)), "parameters": sum(p.numel() for p in trainer.parameters)}
    head = {"name": name, "label": label, "source": source, "steps": given.run.steps, "pairs": len(trainer.train_pairs)}
    return head | {"before": before, "after": after, "own_labels": own["eval/accuracy"], "loss": rows[-1]["loss"]} | spent | describe()


@torch.no_grad()
def judged(trainer: RewardModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """`accuracy`, `error`, `spread` against the verifier."""
    scores = torch.cat([trainer.scorer(pairs[n : n + 32]) for n in range(0, len(pairs), 32)])
    found = quality(pairs, scores.cpu())
    return {key: records.rounded(found[key]) for key in ("accuracy", "error", "spread")} | {"pairs": len(pairs)}


def page(found: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    rows = [
        [
            f"`{run['name']}`",
            f"{run['parameters'] / 1e3:,.0f}k",
            run["label"] + (", drawn scenes" if run["source"] == "drawn" else ""),
            *(
                f"{run['before'][at]['accuracy']:.3f} → {run['after'][at]['accuracy']:.3f} ± {run['after'][at]['error']:.3f}"
                for at in WHERE
            ),
            f"{run['own_labels']:.3f}",
            f"{run['before']['held out']['spread']:.3f} → {run['after']['held out']['spread']:.3f}",
            f"{run['seconds']:.0f}",
        ]
        for run in found.values()
    ]
    head = ["reward", "weights", "labels", *(f"accuracy, {at}" for at in WHERE), "accuracy on its labels", "spread of P(yes)", "seconds"]
    text = (__doc__ or "").split("\n\n", 1)[1].split("\nWrites")[0]
    note = "Accuracy is against the verifier, before → after training, ± one standard error."
    return f"# Rewards trained on pairs\n\n{text}\n\n{note}\n\n{records.markdown(head, rows)}\n"


def study(folder: Path, count: int, elsewhere: int, changes: dict[str, Any], file: Path = FILE, sheet: Path = PAGE) -> None:
    """Every reward by either's labels; writes after each."""
    pairs = distributions(folder, count, elsewhere, changes)
    found: dict[str, dict[str, Any]] = records.read(file) if file.exists() else {}
    jobs = [(name, label, "held out") for label in LABELS for name in MODELS if name != label]  # a judge learns nothing from its own labels
    for name, label, source in jobs + [(name, LABELS[0], "drawn") for name in DRAWN]:
        key, wanted = f"{name}-{label}-{source}", {"asked": [count, elsewhere, sorted(map(str, changes.items()))]}
        if found.get(key, {}).get("asked") == wanted["asked"]:
            continue
        found[key] = train(name, label, pairs, folder, changes, source) | wanted
        records.write(file, found)
        sheet.write_text(page(found), encoding="utf-8")
        print(sheet.read_text(encoding="utf-8").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_model", description="Rewards trained on toybox pairs.")
    parser.add_argument("--pairs", type=int, default=2500, help="drawn; a fifth of their prompts is held out")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("runs/reward_model"), help="for pairs, kept between calls")
    given = parser.parse_args()
    study(given.folder, given.pairs, ELSEWHERE, {"run.steps": given.steps, "optimizer.decay_steps": given.steps})


if __name__ == "__main__":
    main()
