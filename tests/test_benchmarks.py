"""Tables of the benchmarks, made from hand-made results; nothing is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cost, distillation, guidance, guidance_page, prdp, records, toybox, toybox_gains, toybox_runs, toybox_table
from benchmarks.cost_cases import CASES, chain, completed, one_branch, tree, window
from visalign.drawing import Result

MACHINE = {"device": "abacus", "threads": 2, "torch": "2.15", "commit": "abc1234"}


def run(name: str, seed: int, end: float, spread: float = 0.0, total: float = 1000.0, **changes: Any) -> dict[str, Any]:
    """Ten steps from 0.5 to `end` by straight lines; `spread` is the share of groups without one, from the first step on."""
    judged = {"second_judge": 0.4, "diversity": 0.2}
    curve = [{"step": 5 * n, "nfe": total / 2 * n, "seconds": 45.0 * n, "strict": 0.5 + (end - 0.5) * n / 2} | judged for n in range(3)]
    rows = {"seconds": [9.0] * 10, "reward/mean": [0.1 * n for n in range(10)], "zero_spread/total": [spread] * 10}
    rows |= {"nfe": [7.0] * 10, "nfe_credit": [0.0] * 10, "nfe_train": [2.0] * 10}
    head = {"name": name, "seed": seed, "seconds": 90.0, "recipe": "-", "pictures": 516, "steps": 10, "seconds_per_step": 9.0}
    return head | MACHINE | {"calibration": {"seconds": 0.0}, "stopped": "", "curve": curve, "rows": rows} | changes


def row_of(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_which_claims_show_and_which_do_not(tmp_path: Path) -> None:
    runs = [run("toybox", seed, 0.60 + 0.01 * seed) for seed in range(3)]
    runs += [run("toybox_dense_grpo", seed, 0.70 + 0.012 * seed, total=2000.0) for seed in range(3)]
    runs += [run("toybox_vgpo", seed, 0.60) for seed in range(3)]
    runs += [run("toybox_mine", 0, 0.9, seconds=10.0), run("toybox_dense_grpo", 7, 0.8)]
    for one in runs:
        records.write(tmp_path / f"{one['name']}-{one['seed']}.json", one)
    records.write(tmp_path / "base.json", {"key": {"strict": 0.5}})
    assert toybox_table.load(tmp_path) == sorted(runs, key=lambda one: (one["name"], one["seed"]))
    text = toybox_table.page(toybox_table.load(tmp_path), runs[:2], 90.0)
    flow, dense, value = (row_of(text, f"`{name}") for name in ("flow_grpo (toybox)`", "dense_grpo`", "vgpo`"))
    assert flow[:6] == ["`flow_grpo (toybox)`", "3", "10", "9.00", "7.0 + 0.0 + 2.0", "0.500 → 0.610 ± 0.010"]
    assert flow[-1].startswith("yes: strict +0.110")
    assert dense[-1].startswith("yes: strict +0.102")
    assert value[-1].startswith("no: strict -0.010")
    assert dense[8] == "0.606 ± 0.006", "half of its way, where the others end"
    assert text.index("`dense_grpo`") < text.index("`flow_grpo") < text.index("`vgpo`"), "best first"
    assert "mine" not in text, "another budget"
    assert row_of(text.partition("## On one core")[2], "`flow_grpo")[1] == "2"
    assert row_of(text.partition("## Confirmed")[2], "`dense_grpo`")[1:3] == ["1", "0.500 → 0.800"]


def test_iterations_to_the_others_accuracy() -> None:
    flow, dense = run("toybox", 0, 0.6), run("toybox_dense_grpo", 0, 0.7)
    table = toybox_table.dense_table([flow, dense, run("toybox", 1, 0.6), run("toybox_dance_grpo", 0, 0.55)])
    assert row_of(table, "`flow_grpo (toybox)`")[3:5] == ["0.600", "5.0 = 0.50 of 10"]
    assert row_of(table, "`dance_grpo`")[3:5] == ["0.550", "2.5 = 0.25 of 10"]
    lost = toybox_table.dense_table([run("toybox", 0, 0.4), dense])
    assert row_of(lost, "`flow_grpo")[4] == "no gain to compare with; 0.700"
    never = toybox_table.dense_table([flow, run("dense_grpo_long", 0, 0.55, seconds=260.0)])
    assert row_of(never, "`flow_grpo")[2:5] == ["10 in 260 s", "0.600", "not: 0.550"]


def test_after_the_spread_has_collapsed() -> None:
    table = toybox_table.value_table([run("toybox", 0, 0.5, spread=0.6), run("toybox_vgpo", 0, 0.6)])
    assert row_of(table, "dense") == ["dense", "0", "5", "0.200 → 0.700", "0.500 → 0.500", "0.200 → 0.700", "0.550 → 0.600"]
    held = toybox_table.value_table([run("strict_flow_grpo", 0, 0.5, spread=0.2), run("strict_vgpo", 0, 0.6)])
    assert row_of(held, "0 or 1")[2] == "never: at most 0.20 of the groups"


def test_a_gain_is_sure_where_seeds_and_prompts_and_both_judges_agree() -> None:
    """Four prompts, of 1, 1, 2 and 4 pictures."""

    def judged(name: str, gains: tuple[float, ...], after: list[int], second: list[int]) -> list[dict[str, Any]]:
        before = [0, 0, 1, 1]
        right = {"pictures": [[1, 1, 2, 4]] * 2, "strict": [before, after], "second_judge": [before, second]}
        found = [run(name, seed, 0.5 + gain, right=right) for seed, gain in enumerate(gains)]
        for one, gain in zip(found, gains, strict=True):
            one["curve"][-1]["second_judge"] += gain
        return found

    assert toybox_gains.over_seeds([0.1, 0.2, 0.3]) == pytest.approx(0.0371, abs=1e-4), "t = 3.464, two degrees of freedom"
    assert toybox_gains.over_seeds([0.1]) is None
    even = judged("even", (0.10, 0.11, 0.12), [1, 1, 2, 4], [1, 1, 2, 4])
    # differences 1, 1, 1, 3 of 1, 1, 2, 4 pictures: mean 3/4, residuals 1/4, 1/4, -1/2, 0, error sqrt(4/3 · 3/8) / 8
    t = 0.75 / ((4 / 3 * 0.375) ** 0.5 / 8)
    assert toybox_gains.over_prompts(even, "strict") == pytest.approx(toybox_gains.stats.t.sf(t, 3))
    runs = (
        even
        + judged("hacked", (0.10, 0.11, 0.12), [1, 1, 2, 4], [0, 0, 1, 1])
        + judged("wild", (0.3, 0.0, -0.1), [1, 1, 2, 4], [1, 1, 2, 4])
    )
    table = toybox_gains.gains_table([*runs, run("old", 0, 0.6)])
    assert row_of(table, "`even`")[2:4] == ["+0.110", "0.0014"]
    assert row_of(table, "`even`")[-1] == "yes"
    assert row_of(table, "`hacked`")[-1] == "no: only the verifier says so"
    assert row_of(table, "`wild`")[-1] == "no"
    assert row_of(table, "`old`")[-1] == "not known"


def test_seconds_to_flow_grpos_accuracy() -> None:
    runs = [run("toybox", seed, 0.6) for seed in range(2)] + [run("toybox_nft", seed, 0.7) for seed in range(2)]
    runs[-1]["curve"] = runs[-1]["curve"][::2]  # a run with fewer evaluations
    assert toybox_runs.mean_curve(runs[2:], "strict", "seconds")[1] == {"seconds": 45.0, "strict": pytest.approx(0.6)}
    table = toybox_gains.speed_table(runs)
    assert row_of(table, "`nft`")[1:4] == ["2", "2", "45 s, 2.0 times as fast"]
    assert row_of(table, "`nft`")[4] == "no gain to compare with", "the second judge sees none of Flow-GRPO's"
    assert toybox_gains.speed_table([run("toybox_nft", 0, 0.7)]) == ""
    assert row_of(toybox_gains.speed_table([*runs[:2], run("slow", 0, 0.55)]), "`slow`")[3] == "not: at best 0.550"


def test_no_run_yet_and_the_plot(tmp_path: Path) -> None:
    assert "No run" in toybox_table.page([], [], 90.0)
    toybox_table.plot([run("toybox", seed, 0.6) for seed in range(2)], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_every_recipe_of_the_toybox_is_compared_and_a_run_is_known_by_its_recipe() -> None:
    assert "toybox" in toybox.names()
    assert "toybox_full" not in toybox.names()
    recipe = toybox.load("toybox", 0)
    elsewhere = recipe.model_copy(update={"run": recipe.run.model_copy(update={"path": Path("elsewhere"), "steps": 7})})
    assert toybox.fingerprint(recipe, 90) == toybox.fingerprint(elsewhere, 90)
    assert len({toybox.fingerprint(recipe, 90), toybox.fingerprint(recipe, 60), toybox.fingerprint(toybox.load("toybox", 1), 90)}) == 3


def test_what_a_run_has_measured_is_kept_without_what_json_cannot_hold() -> None:
    rows = [{"loss": float("nan"), "ratio/mean": 1.0, "ratio/mean/3": 1.0}, {"loss": 0.12345678, "new": 2.0}]
    assert toybox.columns(rows) == {"loss": [None, 0.123457], "ratio/mean": [1.0, None], "new": [None, 2.0]}


def test_formulas_by_hand() -> None:
    assert (chain(10).rollout, chain(10).replay) == (10, 9)
    assert (tree(20, (0, 3, 6, 9), 16).rollout, tree(20, (0, 3, 6, 9), 16).replay) == (203 / 16, 187 / 16)
    assert tree(4, (0,), 2, stochastic=(0,)).replay == 1 / 2
    assert (chain(10, group=5).rollout, window(25, 7, 4, 16).replay) == (9.2, 3 + 1 / 16)
    assert (window(25, 7, 4, 16).rollout, window(25, 7, 4, 16, 0.4).rollout) == (8 / 16 + 17, 8 / 16 + 3 + 6)
    assert one_branch(4, (0, 1), 1).rollout == (2 + 3 + 2) / 2
    assert completed(chain(10), range(10), 10, 1).credit == 45
    assert completed(chain(10), range(10), 10, 16, last_known=True).credit == 36 + 9 / 16
    assert completed(chain(10), range(10), 10, 16, 1).credit == 0


def test_the_cost_page(tmp_path: Path) -> None:
    times = {"seconds": [1.0, 1.2, 0.8], "against": [2.0, 2.0, 2.0]}
    found = {name: times | {"counted": [case.cost.rollout, case.cost.credit, case.cost.replay, 1.0]} for name, case in CASES.items()}
    found["GRPO-Guard"]["counted"][2] = 8.0
    weights = {"forward_ms": 1.0, "replay_ms": 3.0, "ratio": 3.0}
    records.write(tmp_path / "cost.json", {"pictures": 48, "rounds": 3, "weights": weights, "cases": found} | MACHINE)
    text = cost.page(records.read(tmp_path / "cost.json"))
    branch, mix = row_of(text, "BranchGRPO |"), row_of(text, "BranchGRPO-Mix |")
    assert branch[3] == "**0.50** (0.40 to 0.60)"
    assert float(branch[4]) == pytest.approx((203 + 3 * 187) / 16 / (19 + 1 / 16 + 3 * (18 + 1 / 16)), abs=0.005)
    assert branch[-1] == "seconds yes, NFE yes"
    assert mix[-1].startswith("seconds no"), "0.5 is more than the 0.3 that is wanted"
    forwards = text.partition("## Forwards")[2]
    assert row_of(forwards, "BranchGRPO |")[4] == "yes"
    assert row_of(forwards, "GRPO-Guard |")[3:5] == ["8, formula 9", "**no**"]


def test_the_page_of_students(tmp_path: Path) -> None:
    def judged(strict: float, nfe: float) -> dict[str, float]:
        return {"strict": strict, "second_judge": 0.5, "clip_score": 0.6, "diversity": 0.3, "places": 0.2, "nfe": nfe}

    students = {"quality": {"steps": 100}, "diverse": {"steps": 80}}
    runs = [
        {"seed": seed, "seconds": 90.0, "pictures": 516, **MACHINE, **students}
        | {"rows": [{"name": "base"} | judged(0.3, 5.0), {"name": "base, guidance 3"} | judged(0.5, 10.0)]}
        | {"curve": [{"share": share} | judged(0.5 - 0.1 * share + 0.02 * seed, 5.0) for share in (0.0, 0.5, 1.0)]}
        for seed in range(2)
    ]
    text = distillation.page(runs)
    assert row_of(text, "base, guidance 3") == [
        "base, guidance 3", "10", "0.500 ± 0.000", "0.500 ± 0.000", "0.600 ± 0.000", "0.300 ± 0.000", "0.200 ± 0.000",
    ]  # fmt: skip
    assert row_of(text, "student, quality")[:3] == ["student, quality", "5", "0.510 ± 0.014"]
    assert row_of(text, "0.5 of the way")[2] == "0.460 ± 0.014"
    assert "(100, 80 steps" in text
    assert "* strict over the guided teacher's: the student for quality 0.010 ± 0.014, the student for diversity -0.090 ± 0.014, " in text
    assert "so the reward adds -0.100 ± 0.000." in text
    distillation.plot(runs, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_a_run_without_groups_has_no_spread_to_plot(tmp_path: Path) -> None:
    one = run("toybox_reward_gradient", 0, 0.6)
    del one["rows"]["zero_spread/total"]
    toybox_table.plot([one], tmp_path / "runs.png")
    assert "reward_gradient" in toybox_table.page([one], [], 90.0)


def test_prdp_on_few_and_on_many_prompts(tmp_path: Path) -> None:
    assert list(prdp.cases()) == ["flow_grpo_few", "prdp_few", "flow_grpo_many", "prdp_many"]
    ends = {"flow_grpo_few": 0.6, "prdp_few": 0.6, "flow_grpo_many": 0.5, "prdp_many": 0.7}
    runs = [run(name, seed, end + 0.001 * seed * (name == "prdp_many")) for name, end in ends.items() for seed in range(3)]
    runs[0]["curve"][1]["strict"] = 0.75
    text = prdp.page(runs)
    assert row_of(text, "`flow_grpo_few`")[3:6] == ["0.200 → 0.700 → 0.700", "0.500 → 0.600 ± 0.000", "0.050 ± 0.087"]
    assert "few prompts, strict: no difference that shows, +0.000 ± 0.000" in text
    assert "many prompts, strict: PRDP is ahead, +0.201 ± 0.001" in text
    prdp.write(tmp_path, tmp_path / "none.md", tmp_path / "none.png")
    assert not (tmp_path / "none.md").exists()
    for one in runs[:7]:
        records.write(tmp_path / f"{one['name']}-{one['seed']}.json", one)
    prdp.write(tmp_path, tmp_path / "prdp.md", tmp_path / "prdp.png")
    assert "many prompts, second_judge: not known, 0 seeds of both" in (tmp_path / "prdp.md").read_text()
    assert (tmp_path / "prdp.png").stat().st_size > 1000


def guided(name: str, multiple: int, seed: int, strict: float, kind: str = "nfe") -> dict[str, Any]:
    """A run of guided sampling."""
    judged = {"strict": strict + 0.01 * seed, "second_judge": 0.5, "reward": 0.6, "diversity": 0.2, "reward_options": guidance.REWARD}
    costs = {"nfe": 10.0 * multiple, "nfe_backward": 0.0, "reward_calls": 1.0 * multiple, "seconds": 2.0 * multiple}
    return (
        {"name": name, "kind": kind, "multiple": multiple, "seed": seed, "prompts": 66, "pictures": 2, "steps": 10}
        | judged
        | costs
        | MACHINE
    )


def test_the_guidance_page_says_who_wins_and_where_best_of_n_does(tmp_path: Path) -> None:
    runs = [guided("plain", 1, seed, 0.4) for seed in range(3)]
    for multiple, best, svdd in ((4, 0.60, 0.50), (32, 0.70, 0.80)):
        runs += [guided("best_of_n", multiple, seed, best) for seed in range(3)]
        runs += [guided("svdd", multiple, seed, svdd) for seed in range(3)]
    runs += [guided("best_of_n", 4, seed, 0.6, "seconds") for seed in range(3)]
    for run in runs:
        records.write(tmp_path / f"{run['name']}-{run['kind']}-{run['multiple']}-{run['seed']}.json", run)
    guidance_page.write(tmp_path, tmp_path / "page.md", tmp_path / "plot.png")
    text = (tmp_path / "page.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "`svdd`: +0.400 ± 0.000, reached" in text
    nfe = text.partition("## 32 times plain NFE")[2]
    svdd = row_of(nfe, "`svdd`")
    assert svdd[1:3] == ["3", "0.810 ± 0.025"], "mean of 0.80, 0.81, 0.82 and t = 4.303 times 0.01/√3"
    assert svdd[6:] == ["+0.100 ± 0.000", "320", "32", "64"]
    assert nfe.index("`svdd`") < nfe.index("`best_of_n`") < nfe.index("`plain`"), "best first"
    assert "Over best of N it gains +0.100 ± 0.000: more than what seeds differ by." in nfe
    assert "4 ×: Best: `best_of_n`, strict +0.200 ± 0.000 over plain" in text
    assert "**Best of N wins**" in text.partition("4 ×: ")[2].partition("\n")[0]
    assert row_of(text.partition("## Accuracy over budgets")[2], "`svdd`")[1:] == ["", "0.510 ± 0.025", "0.810 ± 0.025"]
    assert "## 4 times the plain sampler's seconds" in text
    assert "No run yet" in guidance_page.page([])


def test_a_guided_run_is_made_once_and_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    scores = {name: torch.tensor([0.25, 0.75]) for name in ("vlm_yes", "total")}
    found = Result(torch.zeros(2, 3, 8, 8), scores, {"strict": torch.tensor([0.0, 1.0])}, nfe=10.0, reward_calls=8, seconds=1.5)
    monkeypatch.setattr(guidance.api, "panel", lambda rewards: rewards)
    monkeypatch.setattr(guidance.Bench, "draw", lambda self, *given: drawn.append(given) or found)
    bench = guidance.Bench(tmp_path, 6)
    first = bench.run("svdd", "seconds", 4, seed=1)
    assert first == bench.run("svdd", "seconds", 4, seed=1)
    plain = ("plain", {"nfe": guidance.STEPS}, 1)
    assert [given[:3] for given in drawn] == [plain, ("svdd", {"seconds": 6.0}, 1)], "of the plain run's seconds"
    assert (first["reward"], first["strict"], first["reward_calls"], first["limit"]) == (0.5, 0.5, 4, 6.0)
    guidance.Bench(tmp_path, 12).run("svdd", "seconds", 4, seed=1)
    assert len(drawn) == 4
    assert len(guidance.jobs(["best_of_n", "plain", "svdd"], [0, 1], None)) == 2 * (
        1 + 3 + 2 * (len(guidance.NFE) - 1 + len(guidance.SECONDS))
    )
