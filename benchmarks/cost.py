"""`python -m benchmarks.cost [--rounds 3] [--only-table]`: seconds and forwards of a training step of every algorithm.

Beside DanceGRPO with the same number of denoising steps, all but the last of them trained: the same engine, model, reward and number of
pictures for both, no guidance. Steps of the two are timed in turn and compared pair by pair, so that a machine whose speed drifts slows
both. Forwards are counted by the policy and stand beside the formulas of `benchmarks.cost_cases`. Needs a quiet machine. Writes
benchmarks/results/cost.json and benchmarks/cost.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.cost_cases import CASES, Case, Cost
from benchmarks.machine import describe
from visalign import build, config
from visalign.trainer import Trainer

FILE, PAGE = records.RESULTS / "cost.json", Path(__file__).parent / "cost.md"
PICTURES = 48  # per step and per forward
REWARDS = {"toybox": 1.0, "shade": {"use": "benchmarks.cost_cases:Shade", "weight": 0.1}}


def trainer(case: Case, folder: Path) -> Trainer:
    """The case's trainer on the toybox, all weights of the network learning."""
    geometry = {"prompts": PICTURES // case.group, "group_size": case.group, "micro_batch": PICTURES}
    recipe: dict[str, Any] = {
        "run": {"path": str(folder), "resume": "never"},
        "policy": {"model": "toybox", "lora": None, "steps": case.steps},
        "rewards": REWARDS,
        "trainer": {"name": case.trainer, **geometry, **case.options},
    }
    return build.trainer(config.parse(recipe | case.sections))


def weights(learner: Trainer, rounds: int) -> dict[str, float]:
    """Milliseconds per picture of a forward and of a forward with its backward; their ratio is β/α of the cost model."""
    prompts, policy = learner.draw(1), learner.policy
    condition = policy.family.encode(prompts.texts)
    x, t = torch.randn(len(prompts), *policy.family.latent_shape, device=policy.device), torch.full((len(prompts),), 0.5)
    t = t.to(policy.device)

    def forward() -> None:
        with torch.no_grad():
            policy.predict(x, t, condition)

    def replay() -> None:
        policy.predict(x, t, condition).square().mean().backward()
        learner.optimizer.zero_grad()

    times = [[timed(call) for call in (forward, replay)] for _ in range(3 * rounds + 1)][1:]
    alpha, beta = (1000 * statistics.median(column) / len(prompts) for column in zip(*times, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in times)
    return {"forward_ms": records.rounded(alpha), "replay_ms": records.rounded(beta), "ratio": records.rounded(ratio)}


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def counted(row: dict[str, float]) -> list[float]:
    """Forwards per picture of rollout, credit and replay, and pictures scored."""
    return [records.rounded(row[key]) for key in ("nfe", "nfe_credit", "nfe_train", "reward_calls")]


def measure(names: list[str], rounds: int) -> dict[str, Any]:
    """All cases, each in turn with the one that it is compared with."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        built: dict[str, Trainer] = {}
        for name in names:
            other = CASES[name].against
            for needed in (other, name):
                if needed and needed not in built:
                    built[needed] = trainer(CASES[needed], Path(scratch) / str(len(built)))
                    built[needed].step(1)  # to warm up
            own, beside, rows = built[name], built.get(other or ""), list[dict[str, float]]()
            times: list[tuple[float, float]] = []
            for step in range(2, 2 + (rounds if beside else 1)):
                rows.append(own.step(step))
                times.append((rows[-1]["seconds"], beside.step(step)["seconds"] if beside else rows[-1]["seconds"]))
            seconds, against = ([records.rounded(value) for value in column] for column in zip(*times, strict=True))
            found[name] = {"seconds": seconds, "against": against, "counted": counted(rows[-1])}
            print(f"{name}: {statistics.median(a / b for a, b in times):.2f} of the seconds of {other or 'its own'}")
            if other:
                del built[name]
        dance = built.get("DanceGRPO, T = 10") or next(iter(built.values()))
        return {"pictures": PICTURES, "rounds": rounds, "weights": weights(dance, rounds), "cases": found} | describe()


# --- tables ------------------------------------------------------------------------------------------------------------


def ratios(name: str, found: dict[str, Any]) -> tuple[list[float], float, float]:
    """Of seconds, round by round; of forwards, all of one weight; of forwards with a replay at its measured weight."""
    case, measured = CASES[name], found["cases"][name]
    mine, theirs = (Cost(*found["cases"][key]["counted"][:3]) for key in (name, case.against))
    beta = found["weights"]["ratio"]
    pairs = sorted(a / b for a, b in zip(measured["seconds"], measured["against"], strict=True))
    return pairs, mine.total() / theirs.total(), mine.total(replay=beta) / theirs.total(replay=beta)


def cost_table(found: dict[str, Any]) -> str:
    """Every case beside its own standard."""
    rows: list[list[str]] = []
    for name in found["cases"]:
        case = CASES[name]
        if case.against is None or case.against not in found["cases"]:
            continue
        pairs, plain, weighted = ratios(name, found)
        median, seconds = statistics.median(pairs), statistics.median(found["cases"][name]["seconds"])
        met = "" if case.limit is None else f"seconds {_met(median, case.limit)}, NFE {_met(weighted, case.limit)}"
        span = f"**{median:.2f}** ({pairs[0]:.2f} to {pairs[-1]:.2f})"
        paper, limit = (f"{value:g}" if value is not None else "" for value in (case.paper, case.limit))
        rows.append([name, case.against, f"{seconds:.2f}", span, f"{weighted:.2f}", f"{plain:.2f}", paper, limit, met])
    head = ["algorithm", "beside", "s / step", "seconds", "NFE, weighted", "NFE, plain", "paper's seconds", "wanted ≤", "met"]
    return records.markdown(head, rows)


def _met(value: float, limit: float) -> str:
    return "yes" if value <= limit else "no"


def forward_table(found: dict[str, Any]) -> str:
    """Counted forwards beside the formulas."""
    rows: list[list[str]] = []
    for name, measured in found["cases"].items():
        expected, row = CASES[name].cost, [name]
        wanted = (expected.rollout, expected.credit, expected.replay)
        same = True
        for real, formula in zip(measured["counted"][:3], wanted, strict=True):
            equal = abs(real - formula) < expected.tolerance
            same &= equal
            row.append(f"{real:.4g}" if equal else f"{real:.4g}, formula {formula:.4g}")
        rows.append([*row, "yes" if same else "**no**", expected.why, f"{measured['counted'][3]:.4g}"])
    head = ["algorithm", "rollout", "credit", "replay", "= formula", "formula: rollout; replay", "pictures scored"]
    return records.markdown(head, rows)


TEXT = """# What a training step costs

Written by `python -m benchmarks.cost`; don't edit. {pictures} pictures a step on the toybox, all weights trained, no guidance, {rounds}
pairs of steps timed in turn: the median of their ratios (and its range). {machine}

"NFE, weighted" is the model α·(rollout + credit) + β·replay with β/α = {ratio:.2f}, measured here ({forward_ms:.2f} ms a picture for a
forward, {replay_ms:.2f} ms with its backward); "plain" weighs them alike. Neither counts decoding and scoring, which seconds do. MixGRPO's
window stands at step 7, its mean place in a run of 300 steps; the five pruned depths and Mix's interval of 20 are those that the seconds
in BranchGRPO's table amount to.
"""


def page(found: dict[str, Any]) -> str:
    """The whole of cost.md."""
    machine = "{device}, {threads} threads, torch {torch}, commit {commit}.".format(**found)
    text = TEXT.format(machine=machine, **found, **found["weights"])
    forwards = "Per picture. Credit counts completions beyond the rollout's own forwards; every replayed state has one backward, too."
    return "\n\n".join([text.strip(), cost_table(found), "## Forwards counted, and the formulas", forwards, forward_table(found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description="Seconds and forwards of a training step.")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of steps for each case")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if not given.only_table:
        records.write(FILE, measure(list(CASES), given.rounds))
    PAGE.write_text(page(records.read(FILE)), encoding="utf-8")


if __name__ == "__main__":
    main()
