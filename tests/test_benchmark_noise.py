"""The page of the noise benchmark, from hand-made results, and what it says of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import noise, records
from visalign.noise import gaussian


def result(method: str, seed: int, strict: float, second: float, **more: Any) -> dict[str, Any]:
    machine = {"device": "abacus", "threads": 2, "torch": "2.15", "commit": "abc1234"}
    head = {
        "name": method,
        "seed": seed,
        "policy": "toybox/turbo",
        "steps": 1,
        "images": 96,
        "iterations": 50,
        "optimised": {"clip_score": 1},
    }
    cost = {"seconds": 1.5, "nfe": 50.0, "nfe_backward": 49.0, "reward_calls": 50.0}
    said = {"rewards": {"total": 2.0}, "judges": {"strict": strict, "second_judge": second}, "noise": {"length": [0.25, 0.01 * seed]}}
    return head | machine | cost | said | more


def test_the_page_says_which_claims_show_and_which_do_not(tmp_path: Path) -> None:
    runs = [result("none", seed, 0.3, 0.4) for seed in range(2)] + [result("langevin", seed, 0.5 + 0.02 * seed, 0.38) for seed in range(2)]
    runs += [result("best of n", 0, 0.45, 0.5, n=33.4), result("hypernoise", 0, 0.4, 0.45, trained_seconds=180.0)]
    for run in runs:
        records.write(tmp_path / "found" / f"{run['name']}-{run['seed']}.json", run)
    noise.write(tmp_path / "found", tmp_path / "noise.md")
    text = (tmp_path / "noise.md").read_text()
    assert "| langevin | 2 | 2.000 ± 0.000 | 0.510 ± 0.014 | 0.380 ± 0.000 | 1.500 | 50.0 + 49.0 | 50.0 |  |" in text
    assert "| best of n, n = 33 | 1 |" in text
    assert "| hypernoise | 1 | 2.000 | 0.400 | 0.450 | 1.500 | 50.0 + 49.0 | 50.0 | 180 |" in text
    assert "* Langevin steps draw better than the plain sampler? strict 0.210 ± 0.014, yes (p = 0.015); second_judge -0.020" in text
    assert "* how much of their gain does the hypernetwork keep? strict +0.100 of +0.210; second_judge +0.050 of -0.020; at 1.0" in text
    assert "* and better than best-of-N in equal seconds? strict 0.050, one seed; second_judge -0.120, one seed." in text
    assert "direct" not in text.partition("## ")[2], "no run of it, no line about it"
    assert "| langevin | 0.25 (0 %) |" in text


def test_fresh_noise_is_inside_the_band_and_stretched_noise_is_not() -> None:
    fresh = gaussian((4, 16, 16), 1, torch.arange(200), "fresh")
    assert all(outside <= 0.03 for _, outside in noise.noise_figures(fresh).values())
    mean, outside = noise.noise_figures(1.2 * fresh)["length"]
    assert mean > 5
    assert outside == 1


def test_a_run_is_known_by_all_that_matters() -> None:
    given = noise.Given("toybox", 2, 4, 5, 1.0, {"clip_score": 1.0})
    other = noise.Given("toybox", 2, 4, 6, 1.0, {"clip_score": 1.0})
    longer = noise.Given("toybox", 2, 4, 5, 9.0, {"clip_score": 1.0})
    assert noise.key_of(given, "reno") != noise.key_of(other, "reno")
    assert noise.key_of(given, "reno") == noise.key_of(longer, "reno"), "which trains nothing"
    assert noise.key_of(given, "hypernoise") != noise.key_of(longer, "hypernoise")
    assert len({noise.key_of(given, method) for method in noise.SEARCHES}) == len(noise.SEARCHES)
