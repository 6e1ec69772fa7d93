"""benchmarks/toybox.md and its plot, from whatever runs `benchmarks.toybox` has written down.

Seeds 0 to 2 are for choosing; all others are new ones on which a choice is confirmed, in a table of their own. A paper's claim counts as
shown where the difference, paired by seed, exceeds twice its standard error; where it does not, the row says so and stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import toybox_gains
from benchmarks.records import markdown, mean_and_std
from benchmarks.toybox_runs import FLOW, WINDOW, Run, at, by_name, change, load, pairs, per_picture, reached, title, windows

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "benchmarks" / "toybox.md", ROOT / "assets" / "pictures" / "toybox_runs.png"
CHOSEN_ON = (0, 1, 2)
COLLAPSED = 0.5  # share of groups without spread, averaged over a window of steps, from which on a group's spread has collapsed


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what would show it here.

    Attributes:
        text: the paper's figures.
        against: the run that must be beaten after equal seconds; None: the base model.
        judge: that has to see it.
    """

    text: str
    against: str | None = None
    judge: str = "strict"


DANCE, DENSE, LONG = "toybox_dance_grpo", "toybox_dense_grpo", "dense_grpo_long"
COLLAPSES = ((FLOW, "toybox_vgpo"), ("strict_flow_grpo", "strict_vgpo"))  # (Flow-GRPO, VGPO) with the same reward
APART = (LONG, *COLLAPSES[1])  # runs that answer one question only, with another time or another reward
CLAIMS = {
    "toybox": Claim("Flow-GRPO: GenEval 0.63 → 0.95"),
    "toybox_dance_grpo": Claim("HPSv2.1 0.31 → 0.36 on FLUX in 300 iterations"),
    "toybox_mix_grpo": Claim("0.51 of DanceGRPO's seconds, HPSv2.1 0.369 against 0.356", DANCE),
    "toybox_mix_grpo_flash": Claim("0.39 of DanceGRPO's seconds, HPSv2.1 0.358 against 0.356", DANCE),
    "toybox_branch_grpo": Claim("0.71 of DanceGRPO's seconds, HPSv2.1 0.363 against 0.360", DANCE),
    "toybox_branch_grpo_mix": Claim("0.21 of DanceGRPO's seconds, HPSv2.1 0.363 against 0.360", DANCE),
    "toybox_dense_grpo": Claim("GenEval 0.97 against Flow-GRPO's 0.95", FLOW),
    "toybox_vgpo": Claim("GenEval 0.96 against Flow-GRPO's 0.95", FLOW),
    "toybox_grpo_guard": Claim("as much reward as Flow-GRPO, less loss in what is not rewarded", FLOW, "second_judge"),
    "toybox_tempflow_grpo": Claim("better than Flow-GRPO in preference and GenEval", FLOW),
    "toybox_nft": Claim("up to 25 times Flow-GRPO's speed, GenEval 0.98 against 0.95", FLOW),
    "toybox_awm": Claim("up to 24 times Flow-GRPO's speed at its GenEval", FLOW),
    "toybox_reward_difference": Claim("as good as DDPO on 45 prompts, HPSv2 0.347 against 0.340; stable on 100,000", FLOW),
    "toybox_raft": Claim("the best of K pictures, learnt from, raise the reward and other metrics of Stable Diffusion"),
    "raft_unselected": Claim("(not a method: RAFT that keeps all of its pictures, to tell what its reward adds)"),
    "toybox_refl": Claim("58.4 % of its pictures preferred over Stable Diffusion 1.4's"),
    "toybox_reward_gradient": Claim("DRaFT: more reward than policy gradients, in a fraction of their steps", FLOW),
    "toybox_preference": Claim("Diffusion-DPO: preferred over SDXL by most raters, from pairs alone"),
    "rpo_scenes": Claim("RPO: DINO 0.652 at CLIP-T 0.314 on DreamBench, by early stopping; a subject is learnt in subject.md"),
    "toybox_cfg_distillation": Claim("quality of guidance without its second forward, and more diverse"),
    "toybox_ctrl_u": Claim("closer to its condition than ControlNet++; measured in condition.md"),
    "toybox_noise_hypernet": Claim("HyperNoise: most of what optimised noise gains, for one forward; measured in noise.md"),
    "toybox_flow_grpo_fast": Claim("two trained steps as good as all of Flow-GRPO's on PickScore", FLOW),
}


def verdict(name: str, groups: dict[str, list[Run]]) -> str:
    """Whether the paper's claim shows after equal seconds."""
    claim = CLAIMS.get(name)
    if claim is None:
        return ""
    own = {run["seed"]: run["curve"] for run in groups[name]}
    if claim.against is None:
        other, beside = {seed: curve[0] for seed, curve in own.items()}, "the base"
    else:
        other, beside = {run["seed"]: run["curve"][-1] for run in groups.get(claim.against, [])}, title(claim.against)
    gaps = [own[seed][-1][claim.judge] - other[seed][claim.judge] for seed in own if seed in other]
    if len(gaps) < 2:
        return f"not known: too few seeds beside {beside}"
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{'yes' if mean > 2 * error else 'no'}: {claim.judge} {mean:+.3f} ± {error:.3f} over {beside}"


def main_table(runs: Sequence[Run]) -> str:
    """One row per algorithm."""
    groups = by_name(runs)
    equal = min(run["curve"][-1]["nfe"] for run in runs)
    head = ["algorithm", "seeds", "steps", "s / step", "NFE: rollout + credit + replay", "strict", "second judge", "diversity"]
    head += [f"strict at {equal / 1000:.0f} k NFE", "the paper says", "does it show"]
    rows: list[list[str]] = []
    for name, some in groups.items():
        nfe = " + ".join(f"{statistics.fmean(per_picture(r, key) for r in some):.1f}" for key in ("nfe", "nfe_credit", "nfe_train"))
        steps, seconds = (statistics.fmean(run[key] for run in some) for key in ("steps", "seconds_per_step"))
        seeds = f"{len(some)}" + (f", {stopped} stopped early" if (stopped := sum(bool(run["stopped"]) for run in some)) else "")
        before = statistics.fmean(run["calibration"]["seconds"] for run in some)
        pace = f"{seconds:.2f}" + (f", after {before:.0f} s of calibration" if before > 1 else "")
        row = [f"`{title(name)}`", seeds, f"{steps:.0f}", pace, nfe]
        row += [change(some, "strict"), change(some, "second_judge"), change(some, "diversity")]
        row += [mean_and_std([at(run, "strict", "nfe", equal) for run in some])]
        claim = CLAIMS.get(name)
        rows.append([*row, claim.text if claim else "", verdict(name, groups)])
    return markdown(head, rows)


def confirmation(runs: Sequence[Run]) -> str:
    """Runs on new seeds."""
    rows = [[f"`{title(n)}`", str(len(some)), change(some, "strict"), change(some, "second_judge")] for n, some in by_name(runs).items()]
    return markdown(["algorithm", "new seeds", "strict", "second judge"], rows)


def dense_table(runs: Sequence[Run]) -> str:
    """Steps that DenseGRPO needs for the final accuracy of terminal credit, between its evaluations by straight lines."""
    rows: list[list[str]] = []
    for flow, name in ((FLOW, DENSE), (FLOW, LONG), (DANCE, DENSE)):
        for terminal, dense in pairs(runs, name, flow):
            row = [f"`{title(flow)}`, {terminal['seconds']:g} s", str(terminal["seed"]), f"{dense['steps']} in {dense['seconds']:g} s"]
            for judge in ("strict", "second_judge"):
                goal, start = terminal["curve"][-1][judge], terminal["curve"][0][judge]
                steps, best = reached(dense["curve"], judge, goal), max(point[judge] for point in dense["curve"])
                said = f"{steps:.1f} = {steps / terminal['steps']:.2f} of {terminal['steps']}" if steps is not None else f"not: {best:.3f}"
                row += [f"{goal:.3f}", said if goal > start else f"no gain to compare with; {best:.3f}"]
            rows.append(row)
    head = ["against", "seed", "DenseGRPO's steps", "its last strict", "reached after", "its last second judge", "reached after"]
    return markdown(head, rows)


def collapse(run: Run) -> int | None:
    """The step at which most groups have had no spread for a window of steps."""
    found = [n for n, share in enumerate(windows(run, "zero_spread/total")) if share >= COLLAPSED]
    return found[0] + WINDOW if found else None


def value_table(runs: Sequence[Run]) -> str:
    """Flow-GRPO and VGPO from the step on at which Flow-GRPO's group spread has collapsed."""
    rows: list[list[str]] = []
    for flow_name, value_name in COLLAPSES:
        reward = "0 or 1" if flow_name.startswith("strict") else "dense"
        for flow, value in pairs(runs, value_name, flow_name):
            step = collapse(flow)
            if step is None:
                most = max(windows(flow, "zero_spread/total"), default=0.0)
                rows.append([reward, str(flow["seed"]), f"never: at most {most:.2f} of the groups", "", "", "", ""])
                continue
            cells = [reward, str(flow["seed"]), str(step)]
            for run in (flow, value):
                rewards = windows(run, "reward/mean")
                start = rewards[min(step - WINDOW, len(rewards) - 1)]
                accuracy = at(run, "strict", "step", step)
                cells += [f"{start:.3f} → {rewards[-1]:.3f}", f"{accuracy:.3f} → {run['curve'][-1]['strict']:.3f}"]
            rows.append(cells)
    head = ["reward", "seed", "collapse at step", "Flow-GRPO: reward", "strict", "VGPO: reward", "strict"]
    return markdown(head, rows)


INTRODUCTION = """# Every algorithm on the toybox

Written by `python -m benchmarks.toybox` from `benchmarks/results/toybox`; don't edit.

Runs of {seconds:g} s of training each, from the same base model; evaluations are not counted, nor is DenseGRPO's calibration, a pre-run
that can be kept. {pictures} held-out prompts with the same noise in every run, averaged weights, the recipe's sampler; "a → b ± std" is
before and after, over seeds.
`strict` is the verifier's verdict, the second judge is never a reward: a gain that only the first sees is hacking. A learning rate that
decays reaches its end with the run: its steps are set from the seconds per step of a few steps timed before.

NFE are denoiser forwards for one latent, per picture: guidance counts two. For "strict at N NFE" they are summed over the run with each
backward as two forwards, and the accuracy is taken from straight lines between the evaluations, at the least total of all runs. A claim
shows where the difference after equal seconds, paired by seed, exceeds twice its standard error (in ± of the last column).

{machine}
"""


def on_one_core(runs: Sequence[Run], seconds: float) -> list[str]:
    """Parts of the page about runs on a single thread."""
    runs = [run for run in runs if run["seconds"] == seconds and run["seed"] in CHOSEN_ON]
    if not runs:
        return []
    text = (
        f"Again {seconds:g} s each, but on one thread, with Flow-GRPO beside the others. Days differ in speed by up to a third, as runs of "
    )
    text += f"one recipe tell; at equal NFE that doesn't matter. {made_on(runs)}"
    gains = ["Raised for sure, by the same tests:", toybox_gains.gains_table(runs)]
    speeds = ["Seconds to the accuracy with which Flow-GRPO ends there:", toybox_gains.speed_table(runs)]
    return ["## On one core", text, main_table(runs), *gains, *speeds]


def made_on(runs: Sequence[Run]) -> str:
    """The machines and commits."""
    found = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    return "Made on: " + "; ".join(found) + "."


def page(runs: Sequence[Run], alone: Sequence[Run], seconds: float) -> str:
    """The whole of toybox.md, of runs on all cores and of those on one, `alone`."""
    everything = list(runs)
    runs = [run for run in runs if run["seconds"] == seconds and run["name"] not in APART]
    chosen, fresh = ([run for run in runs if (run["seed"] in CHOSEN_ON) == first] for first in (True, False))
    if not chosen:
        return f"# Every algorithm on the toybox\n\nNo run of {seconds:g} s with one of the seeds {CHOSEN_ON} yet.\n"
    parts = [INTRODUCTION.format(seconds=seconds, pictures=runs[0]["pictures"], machine=made_on(runs))]
    parts += [main_table(chosen), "![accuracy, training reward and spread over time](../assets/pictures/toybox_runs.png)"]
    parts += toybox_gains.section(chosen) + on_one_core(alone, seconds)
    if fresh:
        parts += ["## Confirmed on new seeds", "What was chosen above, on seeds that had no part in it.", confirmation(fresh)]
    if pairs(everything, DENSE):
        text = "The paper's curves need fewer. Wanted: 0.6 of them. Flow-GRPO's own job trains one step of each path; "
        parts += ["## DenseGRPO: iterations to the final accuracy of terminal credit", text + "dance_grpo trains all, as DenseGRPO does."]
        parts += [dense_table(everything)]
    if any(pairs(everything, value, flow) for flow, value in COLLAPSES):
        text = f"Collapsed: at least {COLLAPSED:g} of the groups have no spread, on average over {WINDOW} steps. From there to the end:"
        parts += ["## VGPO: after Flow-GRPO's group spread has collapsed", text, value_table(everything)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Held-out accuracy, training reward and the share of groups without spread over training seconds, averaged over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    for number, (name, some) in enumerate(by_name(runs).items()):
        colour, label = colormaps["tab20"](number % 20), title(name)
        points = list(zip(*(run["curve"] for run in some), strict=False))  # of all seeds, one evaluation after another
        x, y = ([statistics.fmean(p[key] for p in point) for point in points] for key in ("seconds", "strict"))
        panels[0].plot(x, y, "o-", color=colour, label=label, markersize=4)
        for panel, key in ((panels[1], "reward/mean"), (panels[2], "zero_spread/total")):
            clocks, curves = zip(*((windows(run, "seconds"), windows(run, key)) for run in some), strict=True)
            steps = min(map(len, curves))
            mean = [statistics.fmean(curve[n] for curve in curves) for n in range(steps)]
            pace = statistics.fmean(statistics.fmean(clock) for clock in clocks) if steps else 0.0
            panel.plot([(n + WINDOW) * pace for n in range(steps)], mean, color=colour, linewidth=1.3)
    for panel, text in zip(panels, ("strict, held out", f"training reward, {WINDOW} steps", "groups without spread"), strict=True):
        panel.set(title=text, xlabel="seconds of training")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path)


def write(folder: Path, one_core: Path, seconds: float, target: Path = PAGE, picture: Path = PLOT) -> None:
    """toybox.md and the plot, from the runs in two folders."""
    runs = load(folder)
    target.write_text(page(runs, load(one_core), seconds), encoding="utf-8")
    shown = [run for run in runs if run["seconds"] == seconds and run["seed"] in CHOSEN_ON and run["steps"] and run["name"] not in APART]
    if shown:
        plot(shown, picture)
