"""The toybox's student and its U-Net: they train, resume, and what they save loads in stock diffusers and as policies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from visalign import registry
from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.rollout import Prompts
from visalign.sampling import pictures
from visalign.toybox import build_sd3, build_sd15, build_turbo, pretrain

CPU = torch.device("cpu")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with a teacher of the toybox's own size, untrained."""
    torch.manual_seed(0)
    build_sd3.assemble(build_sd3.small_vae()).save_pretrained(tmp_path / "out" / "sd3")
    return tmp_path / "out"


def test_the_student_trains_resumes_and_draws_in_one_step(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"PICTURES": 24, "PAIRS": 12, "CHUNK": 6, "TEACHER_STEPS": 2, "STEPS": 3, "ADVERSARIAL_FROM": 1}
    small |= {"ROWS": (2, 2, 2), "WARM_ROWS": (4, 0, 2)}
    for name, value in small.items():
        monkeypatch.setattr(build_turbo, name, value)
    monkeypatch.setattr(build_turbo, "MEASURED", ((1, 1.0),))
    monkeypatch.setattr(build_turbo, "compiled", lambda module: None)
    monkeypatch.setattr(build_turbo, "measure", lambda *given, **options: {"strict": 0.0})
    for _ in range(2):  # the second time there is nothing left to train
        build_turbo.build(out, tmp_path / "work", CPU)
    assert json.loads((out / "turbo" / "quality.json").read_text()) == {"strict": 0.0, "strict_stock_tokens": 0.0}
    plain = StableDiffusion3Pipeline.from_pretrained(out / "turbo")
    assert plain("two red circles", num_inference_steps=1, guidance_scale=1.0, output_type="pt").images.shape == (1, 3, 64, 64)
    policy = registry.load_policy(str(out / "turbo"), max_sequence_length=10)
    assert policy.family.step_distilled
    assert not registry.load_policy(str(out / "turbo"), max_sequence_length=10, step_distilled=False).family.step_distilled
    assert policy.family.grid(1).tolist() == [1, 0]
    teacher = registry.load_policy(str(out / "sd3"), max_sequence_length=10)
    assert not teacher.family.step_distilled
    with pytest.raises(UserError, match=r"policy\.steps=1: this scheduler's shift_terminal"):
        teacher.family.grid(1)
    prompts = Prompts.of(["two red circles"])
    assert pictures(policy, prompts, steps=1, seed=0).shape == (1, 3, 64, 64)


def test_the_adversarial_gradient_is_a_fixed_share_of_the_absolute_errors() -> None:
    torch.manual_seed(0)
    pipeline = build_sd3.assemble(build_sd3.small_vae())
    prompts = ["two red circles", "a star left of a ring", "a blue cross"]
    critic, texts = build_turbo.Critic(pipeline.transformer.requires_grad_(False)), build_turbo.Texts(pipeline, prompts, CPU)
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-2)
    start = {name: value.clone() for name, value in critic.state_dict().items()}
    assert not any("transformer_blocks" in name for name in start)
    real = torch.randn(5, 4, 16, 16)
    data = build_turbo.Data(real, real, prompts, real, [prompts[n % 3] for n in range(5)])
    drawn = torch.randn(4, 4, 16, 16, requires_grad=True)
    push, note = build_turbo.adversarial(critic, optimizer, drawn.detach(), texts, [*prompts, prompts[0]], data)
    (of_error,) = torch.autograd.grad(drawn.abs().mean((1, 2, 3)).sum() / len(drawn), drawn)
    norms = [value.flatten(1).norm(dim=1).mean().item() for value in (push, of_error)]
    assert norms[0] == pytest.approx(build_turbo.ADVERSARIAL * norms[1], rel=1e-4)
    assert all(math.isfinite(value) for value in note.values())
    assert any(not torch.equal(value, start[name]) for name, value in critic.state_dict().items())


def test_a_batch_knows_the_ends_of_its_pairs_and_scenes() -> None:
    noise, drawn, real = torch.randn(3, 7, 4, 16, 16).unbind(0)
    data = build_turbo.Data(noise, drawn, [f"p{n}" for n in range(7)], real, [f"r{n}" for n in range(7)])
    start, sigma, wanted, prompts = build_turbo.batch(data, (2, 3, 4), CPU)
    assert (len(start), len(sigma), len(wanted), len(prompts)) == (9, 9, 6, 9)
    for row in range(2):
        assert torch.equal(start[row], noise[int(prompts[row][1:])])
        assert torch.equal(wanted[row], drawn[int(prompts[row][1:])])
    for row in range(5, 9):
        assert torch.equal(wanted[row - 3], real[int(prompts[row][1:])])
        assert build_turbo.LEAST_NOISE <= sigma[row] <= 1
    assert (sigma[:5] == 1).all()


def test_the_unet_trains_resumes_and_loads(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PICTURES": 24, "STEPS": 2, "BATCH": 4}.items():
        monkeypatch.setattr(build_sd15, name, value)
    monkeypatch.setattr(build_sd15, "compiled", lambda module: None)
    monkeypatch.setattr(build_sd15, "measure", lambda *given: {"strict": 0.0})
    for _ in range(2):
        build_sd15.build(out, tmp_path / "work", CPU)
    plain = StableDiffusionPipeline.from_pretrained(out / "sd15")
    plain.set_progress_bar_config(disable=True)
    policy, prompts = registry.load_policy(str(out / "sd15")), Prompts.of(["two red circles", "a ring"])
    assert sum(p.numel() for p in policy.network.parameters()) < 6_000_000
    assert policy.family.grid(10).tolist() == [*range(999, 0, -100), -1]
    ours = pictures(policy, prompts, steps=5, seed=0, guidance=3.0)
    noise = gaussian((4, 16, 16), 0, prompts.noise_ids, 0)
    theirs = plain(prompt=prompts.texts, num_inference_steps=5, guidance_scale=3.0, latents=noise, output_type="pt").images
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("part", ["turbo", "sd15"])
def test_a_part_without_weights_says_how_to_make_them(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert part in pretrain.PARTS
    monkeypatch.setattr(registry, "asset", lambda name: tmp_path / name)
    with pytest.raises(UserError, match=rf"toybox/{part}: .* not here yet; make .* `python -m visalign\.toybox\.pretrain {part} --out"):
        registry.load_policy(f"toybox/{part}")
