"""What trainers on the forward process share: times, noise, mixtures, the older policy, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_recipes import credited, forward
from visalign.errors import UserError
from visalign.forward_process import OldSection, Units, draw
from visalign.noise import gaussian
from visalign.paths import mix
from visalign.policy import Family
from visalign.sampling import rollout


def test_pictures_are_those_of_the_plain_sampler(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "raft")
    prompts, policy = trainer.draw(1), trainer.policy
    condition = policy.family.encode(prompts.texts)
    common: dict[str, Any] = {"steps": 8, "seed": 0, "guidance": 1.0}
    found = draw(policy, prompts, condition, batch=7, solver="euler", **common)
    assert torch.equal(found.final, rollout(policy, prompts, condition, batch=64, **common).final)
    assert (found.nfe, len(found)) == (8.0, 64)
    better = draw(policy, prompts, condition, batch=64, solver="dpm2m", **common).final
    assert 0 < (better - found.final).abs().max() < 1


def test_times_cover_the_schedule_evenly_and_belong_to_the_picture(tmp_path: Path) -> None:
    ids = torch.arange(4000)
    trainer = forward(tmp_path, "nft", trainer__timesteps=7)
    times, grid = trainer.times(ids, 3), trainer.policy.family.grid(8)
    assert torch.isin(times, grid[:-1]).all()
    assert all(len(row.unique()) == 7 for row in times[:50]), "seven of eight, none twice"
    counts = torch.stack([(times == t).float().mean() for t in grid[:-1]])
    assert torch.allclose(counts, torch.full((8,), 1 / 8), atol=0.01)
    assert (times[:, 0] == grid[0]).float().mean().item() == pytest.approx(1 / 8, abs=0.03), "in an order of its own"
    assert torch.equal(trainer.times(ids[7:9], 3), times[7:9])
    assert not torch.equal(trainer.times(ids, 4), times)
    narrow = forward(tmp_path, "nft", trainer__timesteps=2, trainer__span=[0.125, 0.5]).times(ids, 1)
    assert set(narrow.unique().tolist()) == set(grid[1:4].tolist())


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_continuous_times_have_their_distribution(tmp_path: Path, kind: str) -> None:
    times = forward(tmp_path, "raft", trainer__times=kind, trainer__timesteps=2).times(torch.arange(4000), 1).flatten().double()
    plain = times if kind == "uniform" else torch.special.ndtr(times.logit())  # the toy's schedule is even
    assert torch.allclose(plain.sort().values, (torch.arange(8000).double() + 0.5) / 8000, atol=0.02)


def test_every_unit_is_mixed_once_at_each_of_its_times(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "nft", trainer__timesteps=3, trainer__micro_batch=10, trainer__updates=2)
    drawn = credited(trainer)
    updates = list(trainer.minibatches(drawn, 1))
    assert [sum(len(batch) for batch in batches) for batches in updates] == [96, 96]
    assert max(len(batch) for batches in updates for batch in batches) == 10
    x, clean, time, target = (torch.cat([getattr(b, name) for bs in updates for b in bs]) for name in ("x", "clean", "time", "target"))
    assert torch.equal(clean, drawn.trajectory.final.repeat(3, 1))
    times = trainer.times(drawn.prompts.ids, 1)
    assert torch.equal(time, times.T.flatten())
    noise = torch.cat([gaussian((2,), 0, drawn.prompts.ids, f"forward/1/{k}") for k in range(3)])
    assert torch.equal(x, mix(trainer.policy.family.path, clean, noise, time))
    assert torch.allclose(target, noise - clean)
    again = [b.x for bs in trainer.minibatches(drawn, 1) for b in bs]
    assert torch.equal(torch.cat(again), x)


def test_a_pair_shares_time_and_noise(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "preference", trainer__timesteps=2)
    drawn = trainer.collect(trainer.draw(1), 1)
    found = Units(torch.tensor([[3, 5], [9, 8]]), torch.tensor([1.0, 0.2]), torch.ones(2))
    batch = trainer.noised(drawn, found, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 1, 1.0)
    noise = batch.target + batch.clean
    assert torch.allclose(noise[:3], noise[3:], atol=1e-6)
    assert not torch.allclose(noise[1], noise[2])
    assert torch.equal(batch.time[:3], batch.time[3:])
    assert torch.equal(batch.clean, drawn.trajectory.final[[3, 9, 9, 5, 8, 8]])
    assert batch.credit.tolist() == pytest.approx([1.0, 0.2, 0.2])


def test_the_mean_counts_every_unit_alike_whatever_the_process(tmp_path: Path) -> None:
    trainer = forward(tmp_path, "raft")
    drawn = credited(trainer)
    trainer.processes.count, trainer.processes.sum = 2, lambda values: values + 24.0  # another process with three times as many
    (batches,) = trainer.minibatches(drawn, 1)
    assert torch.cat([b.weight for b in batches]).tolist() == pytest.approx([2 * 16 / 40] * 16)
    nobody = replace(drawn, advantages=torch.zeros(64, 1))
    ((batch,),) = trainer.minibatches(nobody, 1)
    assert trainer.loss(batch).value == 0, "it takes part with nothing"
    trainer.processes.count, trainer.processes.sum = 1, lambda values: values
    assert list(trainer.minibatches(nobody, 1)) == []
    before = [p.clone() for p in trainer.parameters]
    row = trainer.learn(nobody, 1)
    assert row["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_the_old_policy_follows_by_its_schedule() -> None:
    ramp, late = OldSection(rate=0.001, most=0.5), OldSection(flat=75, rate=0.0075, most=0.999)
    assert [ramp.decay(n) for n in (0, 100, 900)] == pytest.approx([0, 0.1, 0.5])
    assert [late.decay(n) for n in (75, 76, 500)] == pytest.approx([0, 0.0075, 0.999])


@pytest.mark.parametrize("name", ["nft", "awm", "raft", "preference"])
def test_resume_is_exact_to_the_bit_with_the_old_policy(tmp_path: Path, name: str) -> None:
    more: dict[str, Any] = {"run__checkpoint_every": 2, "policy__ema": 0.9, "eval__every": 4, "trainer__old": {"rate": 0.2, "most": 0.7}}
    ends = []
    for folder, lengths in (("once", (4,)), ("twice", (2, 4))):
        for steps in lengths:
            trainer = forward(tmp_path / folder, name, run__steps=steps, trainer__draws="old", optimizer__lr=0.01, **more)
            trainer.fit()
        ends.append([*trainer.parameters, *trainer.old.values])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], ends[0][1]), "the old policy is another one"


def test_the_best_checkpoint_by_a_judge_is_what_evaluation_takes(tmp_path: Path) -> None:
    from visalign import build, checkpoint

    trainer = forward(tmp_path, "raft", eval__keep_best="close", eval__every=1, run__steps=3, optimizer__lr=0.05)
    scores = iter([0.0, 1.0, 3.0, 2.0])
    honest = trainer.examine
    trainer.examine = lambda step, scan: honest(step, scan) | {"eval/close": next(scores)}
    weights = []
    step = trainer.step
    trainer.step = lambda number: (step(number), weights.append(trainer.parameters[0].detach().clone()))[0]
    run = trainer.fit()
    assert [path.name for path in checkpoint.found(run / "best")] == ["step_2"]
    assert torch.equal(build.restore(run, torch.device("cpu")).trainable()[0], weights[1])
    with pytest.raises(UserError, match=r"no figure 'clos'; did you mean close\?"):
        forward(tmp_path / "other", "raft", eval__keep_best="clos").fit()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"exploration.shared_noise": True}, "exploration: nft trains on the forward process"),
        ({"ratio.clip": 0.1}, "ratio: nft trains"),
        ({"credit.kind": "gain"}, r"credit\.kind=gain"),
        ({"trainer.span": [0.5, 0.5]}, r"trainer\.span"),
        ({"trainer.updates": 1000}, r"trainer\.updates=1000"),
    ],
)
def test_what_has_no_meaning_here_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        forward(tmp_path, "nft", **changes)


@pytest.mark.parametrize("name", ["nft", "awm", "raft", "preference", "rpo"])
def test_step_distilled_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("visalign.families.toy.Toy.step_distilled", True)
    with pytest.raises(UserError, match="invalid for the step-distilled toy:gaussian"):
        forward(tmp_path, name)


def test_a_family_that_encodes_no_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Toy has no way from given pictures to latents"):
        Family.encode_images(forward(tmp_path, "raft").policy.family, torch.zeros(1, 3, 16, 16))
