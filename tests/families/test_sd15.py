"""The SD15 family against the stock pipeline under DDIM, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from tests import tiny_models
from tests.families.conformance import Conformance, scramble
from visalign import api, build, config, registry
from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.paths import VariancePreserving
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import Dynamics, pictures, rollout, transition
from visalign.schedules import all_steps

Conditions = list[dict[str, Any]]

TEXTS = ["two red circles", "a star left of a ring", "two red circles"]


@pytest.fixture
def policy(tiny_sd15: Path) -> Policy:
    return registry.load_policy(str(tiny_sd15))


def stock(folder: Path, **scheduler: Any) -> Any:
    """The stock pipeline under DDIM, without visalign."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, policy: Policy, prompts: Prompts, steps: int, guidance: float, **options: Any) -> Tensor:
    """Pictures of a stock pipeline from the noise that `pictures` starts from at seed 3."""
    noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
    options |= {"num_inference_steps": steps, "guidance_scale": guidance, "latents": noise, "output_type": "pt"}
    return pipeline(prompt=prompts.texts, **options).images


class TestSD15(Conformance):
    build = staticmethod(tiny_models.sd15)
    part = "mid_block"

    def stock(self, folder: Path) -> Any:
        return stock(folder)


@pytest.mark.parametrize(
    ("scheduler", "steps", "times"),
    [
        ({}, 4, [751, 501, 251, 1, 0]),
        ({"set_alpha_to_one": True}, 3, [667, 334, 1, -1]),
        ({"timestep_spacing": "trailing"}, 4, [999, 749, 499, 249, 0]),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 2, [999, 499, 0]),
        ({"prediction_type": "v_prediction", "beta_schedule": "linear"}, 7, [853, 711, 569, 427, 285, 143, 1, 0]),
        ({}, 1, [1, 0]),
    ],
)
def test_every_schedule_of_ddim(tmp_path: Path, scheduler: dict[str, Any], steps: int, times: list[int]) -> None:
    policy, prompts = registry.load_policy(str(tiny_models.sd15(tmp_path, **scheduler))), Prompts.of(TEXTS)
    assert policy.family.grid(steps).tolist() == times
    theirs = drawn(stock(tmp_path), policy, prompts, steps, 3.0)
    assert (pictures(policy, prompts, steps=steps, seed=3, guidance=3.0) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_are_replaced_by_ddim(tiny_sd15: Path, tmp_path: Path, kind: Any) -> None:
    pipeline = stock(tiny_sd15)
    pipeline.scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipeline.save_pretrained(tmp_path)
    policy, prompts = registry.load_policy(str(tmp_path)), Prompts.of(TEXTS)
    theirs = drawn(stock(tiny_sd15), policy, prompts, 4, 1.0)
    assert (pictures(policy, prompts, steps=4, seed=3) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        ({"thresholding": True}, 4, "the model's scheduler has thresholding, so that its steps are not Gaussian; set it to false"),
        ({"prediction_type": "sample"}, 4, "the model predicts 'sample'; known: epsilon, v_prediction"),
        ({"timestep_spacing": "trailing"}, 7, "policy.steps=7: DDIM with timestep_spacing=trailing would step to other times"),
        ({"timestep_spacing": "linspace"}, 5, "use a number of steps that divides 1000, or timestep_spacing leading"),
    ],
)
def test_a_schedule_without_a_chain_of_gaussians_is_one_line(tmp_path: Path, scheduler: dict[str, Any], steps: int, message: str) -> None:
    tiny_models.sd15(tmp_path, **scheduler)
    with pytest.raises(UserError, match=message) as error:
        registry.load_policy(str(tmp_path)).family.grid(steps)
    assert "\n" not in str(error.value)


def test_guidance_leads_away_from_the_negative_prompt(tiny_sd15: Path) -> None:
    policy, prompts = registry.load_policy(str(tiny_sd15), negative_prompt="a blue cross"), Prompts.of(TEXTS)
    ours = pictures(policy, prompts, steps=3, seed=3, guidance=4.0)
    theirs = drawn(stock(tiny_sd15), policy, prompts, 3, 4.0, negative_prompt=["a blue cross"] * 3)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - drawn(stock(tiny_sd15), policy, prompts, 3, 4.0)).abs().max() > 1e-4


def test_replay_of_ddims_noise_has_a_ratio_of_one_and_the_published_std(policy: Policy) -> None:
    prompts, dynamics = Prompts.of(TEXTS), Dynamics("ddim", 1.0)
    condition = policy.family.encode(prompts.texts)
    chain = rollout(policy, prompts, condition, steps=5, seed=0, batch=3, guidance=2.0, plan=all_steps(5), dynamics=dynamics)
    scheduler: Any = policy.family.pipeline.scheduler  # pyright: ignore[reportAttributeAccessIssue]
    for k in range(4):
        now, after = (chain.sigmas[j].expand(3) for j in (k, k + 1))
        with torch.no_grad():
            law, _ = transition(policy, chain.latents[:, k], now, after, condition, 2.0, dynamics)
        assert torch.equal(law.log_prob(chain.latents[:, k + 1]), chain.log_probs[:, k])
        assert float(law.std.flatten()[0]) == pytest.approx(float(scheduler._get_variance(int(now[0]), int(after[0]))) ** 0.5, rel=1e-4)
    assert chain.log_probs.exp().isfinite().all()


# --- algorithms --------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "flow_grpo": ["trainer.kl=0.01", "ratio.weight=inverse_gap"],
    "flow_grpo_fast": [],
    "dance_grpo": [],
    "mix_grpo": ["exploration.finish=0.5"],
    "branch_grpo": ["exploration.branches=[0,2]"],
    "dense_grpo": ["trainer.rounds=1"],
    "vgpo": [],
    "grpo_guard": ["ratio.weight=equal_gain"],
    "tempflow_grpo": ["trainer.group_size=4", "exploration.seeds=1", "exploration.range=[0,2]"],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_takes_a_step(name: str, tiny_sd15: Path, tmp_path: Path) -> None:
    words = [f"policy.model={tiny_sd15}", f"trainer.name={name}", f"run.path={tmp_path}", "run.device=cpu", "transition.level=1.0"]
    words += ["policy.steps=5", "policy.guidance=2", "trainer.prompts=1", "trainer.group_size=4", "trainer.micro_batch=4"]
    words += ["transition.kind=ddim", "exploration={}", "credit={}", "ratio={}", "policy.train=[]", *JUDGED, *ALGORITHMS[name]]
    recipe = config.load("toybox", words)
    trainer = build.trainer(recipe)
    before = [p.detach().clone() for p in trainer.parameters]
    row = trainer.step(1)
    assert row["ratio/max_deviation"] < 1e-6
    assert 0 < row["grad_norm"] < float("inf")
    assert any((a != b).any() for a, b in zip(before, trainer.parameters, strict=True))


JUDGED = ["rewards={jpeg: 1.0}", "eval.rewards={jpeg: 1.0}", "prompts.balance=null"]


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_a_flows_transition_is_refused_before_anything_is_drawn(kind: str, tiny_sd15: Path, tmp_path: Path) -> None:
    words = [f"policy.model={tiny_sd15}", f"run.path={tmp_path}", f"transition.kind={kind}", "policy.train=[]", *JUDGED]
    with pytest.raises(UserError, match=f"transition.kind={kind}: .* not for VariancePreserving; use ddim"):
        build.trainer(config.load("toybox", [*words, "run.device=cpu"]))


# --- ControlNet --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.controlnet(tmp_path_factory.mktemp("control"), tiny_sd15)


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    rng = torch.Generator().manual_seed(5)
    return [{"condition": torch.rand(3, 32, 32, generator=rng)} for _ in TEXTS]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_controlled_sample_equals_stock_diffusers(tiny_sd15: Path, control: Path, conditions: Conditions, guidance: float) -> None:
    policy, prompts = registry.load_policy(str(tiny_sd15), controlnet=str(control)), Prompts.of(TEXTS, conditions)
    ours = pictures(policy, prompts, steps=3, seed=3, guidance=guidance)
    parts = stock(tiny_sd15).components | {"controlnet": ControlNetModel.from_pretrained(control)}
    plain: Any = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    theirs = drawn(plain, policy, prompts, 3, guidance, image=torch.stack([record["condition"] for record in conditions]))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - pictures(policy, Prompts.of(TEXTS, conditions[::-1]), steps=3, seed=3, guidance=guidance)).abs().max() > 1e-3
    assert len(policy.family.encode(TEXTS, [conditions[0]] * 3).tensors["control"]) == 2


def test_a_saved_controlled_pipeline_loads_by_its_index(tiny_sd15: Path, control: Path, conditions: Conditions, tmp_path: Path) -> None:
    first = registry.load_policy(str(tiny_sd15), controlnet=str(control), learn="controlnet")
    assert first.network is first.family.modules()["controlnet"]
    first.train_weights()
    scramble(first, 0.01)
    prompts = Prompts.of(TEXTS, conditions)
    ours = pictures(first, prompts, steps=2, seed=0)
    policy = registry.load_policy(str(tiny_sd15), controlnet=str(control), learn="controlnet")
    policy.add_lora(2, 4)
    with pytest.raises(UserError, match="export: stock pipelines read no adapter of a ControlNet; use --merge"):
        build.export(policy, tmp_path / "adapter")
    assert build.export(first, tmp_path / "whole") == "pipeline"
    again = api.load(str(tmp_path / "whole"), device="cpu")
    assert (pictures(again, prompts, steps=2, seed=0) - ours).abs().max() < 1e-5


def test_what_a_controlnet_lacks_is_one_line(tiny_sd15: Path, control: Path) -> None:
    with pytest.raises(UserError, match="prompt 'two red circles' has no picture: this model needs `condition`"):
        registry.load_policy(str(tiny_sd15), controlnet=str(control)).family.encode(TEXTS)
    with pytest.raises(UserError, match="learn=controlnet: this pipeline has none"):
        registry.load_policy(str(tiny_sd15), learn="controlnet")


# --- VariancePreserving ------------------------------------------------------------------------------------------------


def test_the_path_is_the_schedulers_own_table(policy: Policy) -> None:
    assert isinstance(policy.family.path, VariancePreserving)
    table = policy.family.pipeline.scheduler.alphas_cumprod  # pyright: ignore[reportAttributeAccessIssue]
    alpha, sigma = policy.family.path.coefficients(torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64))
    assert torch.allclose(alpha.square().float(), table[[0, 500, 999]])
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(3, dtype=torch.float64))
