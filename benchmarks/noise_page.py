"""The page of `benchmarks.noise`: tables of what was gained and of the noise, and the claims."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import records
from benchmarks.records import mean_and_std
from benchmarks.toybox_gains import LEVEL, over_seeds

Groups = Mapping[str, Sequence[dict[str, Any]]]  # method -> its runs


def page(runs: Sequence[dict[str, Any]], text: str, methods: Sequence[str]) -> str:
    """The tables in Markdown, a pair for every policy, and which claims show.

    Args:
        text: what this is.
        methods: in the order of the rows.
    """
    parts = ["# What the initial noise is worth", "Written by `python -m benchmarks.noise`; don't edit.", text]
    for policy, steps in dict.fromkeys((run["policy"], run["steps"]) for run in runs):
        some = [run for run in runs if (run["policy"], run["steps"]) == (policy, steps)]
        groups = {method: own for method in methods if (own := [run for run in some if run["name"] == method])}
        first = some[0]
        asked = ", ".join(f"`{name}`" for name in first["optimised"])
        plural = "s" if steps > 1 else ""
        parts += [
            f"## `{policy}`, {steps} step{plural}",
            f"Optimised: {asked}. {first['images']} held-out prompts a seed, {first['iterations']} iterations; mean ± std over seeds.",
            gains(groups),
            noise_table(groups),
            claims(groups),
        ]
    made_on = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}" for r in runs})
    return "\n\n".join([*parts, "Made on: " + "; ".join(made_on) + "."]) + "\n"


def gains(groups: Groups) -> str:
    """What the rewards and the judges say, and what it cost."""
    rows: list[list[str]] = []
    for method, own in groups.items():
        of = lambda kind, name, own=own: mean_and_std([run[kind][name] for run in own])  # noqa: E731
        mean = lambda key, own=own: statistics.fmean(run[key] for run in own)  # noqa: E731
        name = f"{method}, n = {mean('n'):.0f}" if method == "best of n" else method
        once = f"{mean('trained_seconds'):.0f}" if "trained_seconds" in own[0] else ""
        said = [of("rewards", "total"), of("judges", "strict"), of("judges", "second_judge")]
        cost = [f"{mean('seconds'):.3f}", f"{mean('nfe'):.1f} + {mean('nfe_backward'):.1f}", f"{mean('reward_calls'):.1f}"]
        rows.append([name, str(len(own)), *said, *cost, once])
    costs = ["seconds a picture", "forwards + backwards", "reward calls", "seconds of training"]
    return records.markdown(["method", "seeds", "rewards", "verifier, strict", "second judge", *costs], rows)


def noise_table(groups: Groups) -> str:
    """Every figure's mean, and the share of noises outside the band."""
    figures = list(next(iter(groups.values()))[0]["noise"])
    rows: list[list[str]] = []
    for method, own in groups.items():
        cells = [[statistics.fmean(run["noise"][name][part] for run in own) for part in (0, 1)] for name in figures]
        rows.append([method, *(f"{value:.2f} ({100 * outside:.0f} %)" for value, outside in cells)])
    return records.markdown(["noise: mean (outside the band)", *figures], rows)


def claims(groups: Groups) -> str:
    """ReNO's and HyperNoise's, paired by seed, as lines that say yes, no, or that it isn't sure."""
    lines: list[str] = []
    for better, worse, what in (
        ("reno", "none", "ReNO draws better than the plain sampler"),
        ("langevin", "none", "Langevin steps draw better than the plain sampler"),
        ("langevin", "best of n", "and better than best-of-N in equal seconds"),
        ("hypernoise", "none", "a noise hypernetwork draws better than the plain sampler"),
        ("hypernoise", "direct", "and better than the same rewards on the weights, trained for equal seconds"),
    ):
        if better in groups and worse in groups:
            found = []
            for judge in ("strict", "second_judge"):
                one, two = ({run["seed"]: run["judges"][judge] for run in groups[name]} for name in (better, worse))
                gaps = [value - two[seed] for seed, value in one.items() if seed in two]
                found.append(f"{judge} {mean_and_std(gaps)}, {verdict(over_seeds(gaps))}" if gaps else f"{judge}: no seed has both")
            lines.append(f"* {what}? " + "; ".join(found) + ".")
    if {"none", "langevin", "hypernoise"} <= set(groups):
        lines.append(f"* how much of their gain does the hypernetwork keep? {kept(groups)}.")
    return "\n".join(lines)


def verdict(chance: float | None) -> str:
    """What a p of a gain above 0 says."""
    return "one seed" if chance is None else f"{'yes' if chance < LEVEL else 'not for sure' if chance < 0.5 else 'no'} (p = {chance:.3f})"


def kept(groups: Groups) -> str:
    """The share of the optimised noise's gain that the amortised one has, and its seconds over the plain sampler's."""
    mean = lambda method, part: statistics.fmean(part(run) for run in groups[method])  # noqa: E731
    said: list[str] = []
    for judge in ("strict", "second_judge"):
        none, found, hyper = (mean(method, lambda run, judge=judge: run["judges"][judge]) for method in ("none", "langevin", "hypernoise"))
        said.append(f"{judge} {hyper - none:+.3f} of {found - none:+.3f}")
    times = mean("hypernoise", lambda run: run["seconds"]) / mean("none", lambda run: run["seconds"])
    return f"{'; '.join(said)}; at {times:.1f} times the plain sampler's seconds"
