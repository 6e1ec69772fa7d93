"""The planner's sums against networks that were really run, and its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visalign import cli, config, dry_run, plan_report, skeletons
from visalign.attention import within
from visalign.errors import UserError
from visalign.ledger import META, Fused, flops, held
from visalign.planning import GPUS, Line, Needs, gpu
from visalign.registry import load_policy

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def plain(tiny_sd3: Path) -> plan_report.Plan:
    return plan_report.plan(recipe(tiny_sd3))


def recipe(model: Path, **policy: Any) -> config.Config:
    section = {"model": str(model), "steps": 4, "lora": LORA, "options": {"max_sequence_length": 10}} | policy
    trainer = {"prompts": 4, "group_size": 6, "micro_batch": 8}
    exploration = {"kind": "window", "size": 2, "range": [0, 3]}
    return config.parse({"policy": section, "rewards": {"jpeg": 1.0}, "trainer": trainer, "exploration": exploration})


# --- what a computation costs --------------------------------------------------------------------------------------------


def test_a_ledger_by_hand() -> None:
    with META:
        network = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(4)])
        x = torch.empty(5, 10)
    network.requires_grad_(False)
    there = [x, *network.parameters()]
    assert held(lambda: network(x), there) == 2 * 5 * 10 * 4, "one layer's input and its output"
    assert flops(lambda: network(x)) == 4 * 2 * 5 * 10 * 10
    network[0].weight.requires_grad_(True)
    network[0].weight.grad = torch.empty_like(network[0].weight)
    assert flops(lambda: network(x).backward(torch.empty(5, 10, device=META))) == 4 * 1000 + 3 * 1000 + 1000, "none to the input"


def test_attention_is_counted_without_its_table() -> None:
    q = torch.empty(2, 3, 64, 16, device=META)
    attend = within(lambda x: nn.functional.scaled_dot_product_attention(x, x, x), Fused())
    assert flops(lambda: attend(q)) == 2 * 2 * 2 * 3 * 64 * 64 * 16
    assert held(lambda: attend(q), [q]) < 4 * 2 * 3 * 64 * 64, "less than the table of all pairs"


def test_forwards_are_counted_by_the_algorithm(tiny_sd3: Path) -> None:
    count = dry_run.counted(recipe(tiny_sd3, guidance=3.0))
    assert (count.nfe, count.nfe_credit, count.nfe_train, count.nfe_backward) == (8, 0, 4, 2)
    assert (count.states, count.predictions, count.copies) == (4, 0, 0)
    moved = dry_run.counted(config.load("toybox_noise_hypernet"))
    assert (moved.nfe_train, moved.states) == (1, 3), "an adapter is asked once, where there is a place for one"
    old = config.load("toybox_nft", {"trainer.prompts": 1, "policy.guidance": 2.0})
    assert (dry_run.counted(old).copies, dry_run.counted(old).nfe) == (1, 10)


# --- networks without weights --------------------------------------------------------------------------------------------


def test_a_skeleton_has_the_shapes_of_the_model(tiny_sd3: Path) -> None:
    real = load_policy(str(tiny_sd3), max_sequence_length=10)
    bare = skeletons.skeleton(recipe(tiny_sd3).policy)
    assert {n: p.shape for n, p in bare.policy.family.network.named_parameters()} == {
        n: p.shape for n, p in real.family.network.named_parameters()
    }
    assert all(p.device == META for p in bare.policy.family.network.parameters())
    ours, theirs = bare.condition.positive(), real.family.encode(["a plan"]).positive()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964),
        ("stabilityai/stable-diffusion-3.5-medium", 2.24e9),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3.88e9),
        ("Tongyi-MAI/Z-Image", 6.15e9),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1.60e9),
    ],
)
def test_known_models_have_their_published_size(model: str, weights: float) -> None:
    found = skeletons.skeleton(config.parse({"policy": {"model": model}}).policy)
    assert sum(p.numel() for p in found.policy.family.network.parameters()) == pytest.approx(weights, rel=5e-3)
    assert "published configuration" in found.source


def test_the_model_of_every_published_recipe_is_known() -> None:
    published = [config.load(name).policy.model for name in config.packaged() if not name.startswith("toybox")]
    assert set(published) <= skeletons.known().keys()


def test_what_is_read_at_every_forward_has_a_value() -> None:
    found = skeletons.skeleton(config.parse({"policy": {"model": "Tongyi-MAI/Z-Image"}}).policy).condition
    assert found.tensors["length"].tolist() == [512]
    assert found.tensors["text"].device == META
    edited = skeletons.skeleton(config.parse({"policy": {"model": "black-forest-labs/FLUX.1-Kontext-dev", "resolution": 512}}).policy)
    assert edited.condition.tensors["picture"].shape[1:] == edited.policy.family.latent_shape == (16, 64, 64)


def test_what_cannot_be_planned_is_one_line(tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder, and no configuration of it is known; .*FLUX\.1-dev"):
        skeletons.skeleton(config.parse({"policy": {"model": "somebody/something"}}).policy)
    with pytest.raises(UserError, match=r"--gpu h1000: not in the table; did you mean h100\?"):
        gpu("h1000")
    with pytest.raises(UserError, match="trains no policy"):
        plan_report.plan(config.load("toybox_reward_model"))


# --- sums ----------------------------------------------------------------------------------------------------------------


def test_a_line() -> None:
    assert Line(3.0, 2.0)(5) == 13


def test_the_peak_is_the_worst_phase() -> None:
    parts = dict.fromkeys(Needs.__dataclass_fields__, 1.0)
    assert Needs(**parts).peak == 6 + 2, "training has the gradients beside its activations"
    assert Needs(**parts | {"decoding": 5.0}).peak == 6 + 5


def test_memory_is_that_of_the_tensors(plain: plan_report.Plan, tiny_sd3: Path) -> None:
    real = load_policy(str(tiny_sd3), max_sequence_length=10)
    real.family.network.requires_grad_(False)
    real.add_lora(4, 8)
    need = plain.needs()
    held = sum(p.numel() * p.element_size() for p in real.family.network.parameters())
    learning = sum(p.numel() * 4 for p in real.trainable())
    assert need.weights == held
    assert (need.gradients, need.optimiser, need.copies) == (learning, 2 * learning, learning)
    others = (module for module in real.family.modules().values() if module is not real.family.network)
    assert need.encoders == sum(p.numel() * 4 for module in others for p in module.parameters())
    latent = torch.Size(real.family.latent_shape).numel() * 4
    side = real.family.decode(torch.zeros(1, *real.family.latent_shape)).numel() * 4
    prompt = sum(value[0].numel() * 4 for value in real.family.encode(["a plan"]).tensors.values())
    assert need.storage == 24 * (4 * latent + side) + 4 * prompt
    assert plain.needs(gpus=2).storage == need.storage / 2


def test_what_saves_memory_saves_it(plain: plan_report.Plan) -> None:
    base = plain.needs()

    def other(**policy: Any) -> Needs:
        return plain.needs(recipe=plain.recipe.model_copy(update={"policy": plain.recipe.policy.model_copy(update=policy)}))

    assert other(gradient_checkpointing=True).learning < 0.7 * base.learning
    assert other(dtype="bf16", precision="bf16").weights < base.weights
    assert other(rest=True).encoders == 0
    assert other(quantise="nf4").weights < other(dtype="bf16").weights
    assert plain.needs(micro_batch=2).learning < base.learning


def test_flops_and_seconds(plain: plan_report.Plan) -> None:
    flops, subject = plain.flops(), plain.subject
    assert flops["rollout"] == 24 * 4 * subject.forward
    assert flops["training"] == 24 * 2 * subject.backward
    assert 2 < subject.backward / subject.forward < 3.1, "a backward pass through frozen layers costs about a forward"
    assert plain.seconds(GPUS["h100"], 2) == pytest.approx(sum(flops.values()) / (989e12 * 0.4 * 2))


def test_geometry_keeps_groups_whole(plain: plan_report.Plan, capsys: pytest.CaptureFixture[str], tiny_sd3: Path) -> None:
    assert [plain.micro_batch(GPUS["h100"], world) for world in (1, 2, 4)] == [24, 12, 6]
    small = plan_report.GPU(plain.needs(micro_batch=4).peak / 0.9e9 * 1.001, 100)
    assert plain.micro_batch(small, 1) == 4
    recipe_, changes = plain.savings(small)
    assert changes[0] == "policy.gradient_checkpointing=true"
    assert plain.fits(small, recipe=recipe_)
    words = ["policy.options={max_sequence_length: 10}", "policy.train=[]", "rewards={jpeg: 1}"]
    assert cli.main(["plan", "toybox", "--gpu", "rtx4090", f"policy.model={tiny_sd3}", *words]) == 0
    page = capsys.readouterr().out
    assert f"after the configurations in {tiny_sd3}" in page
    assert "  4 GPUs  3 groups each" in page
    assert "  8 GPUs  groups can't be shared out whole; 8 or 16 groups could" in page
