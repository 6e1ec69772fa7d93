"""What every family of a diffusers pipeline promises, as tests that its own test file inherits.

    class TestSD3(Conformance):
        build = staticmethod(tiny.sd3)

A subclass says how its tiny pipeline is saved and how the stock pipeline, without visalign, is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from visalign import build, config, registry
from visalign.noise import gaussian
from visalign.paths import Flow
from visalign.pictures import save
from visalign.pipeline_family import PipelineFamily
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import Dynamics, pictures, rollout, transition
from visalign.schedules import all_steps

TEXTS = ["two red circles", "a star left of a ring", "two red circles"]
TRAINERS = {  # recipe -> what differs; the last trains some of the network's own weights, the others an adapter
    "toybox": ["trainer.kl=0.01", "exploration={kind: all}"],
    "toybox_nft": ["trainer.timesteps=2"],
    "toybox_reward_difference": ["exploration={kind: all}", "policy.lora=null"],
}


def scramble(policy: Policy, scale: float) -> None:
    """Move what learns away from its start, where an adapter does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.add_(scale * torch.randn_like(parameter))


def weights(policy: Policy) -> dict[str, Tensor]:
    """Copies of all weights of all of the pipeline's modules, by name."""
    modules = policy.family.modules().items()
    return {f"{part}.{name}": p.detach().clone() for part, module in modules for name, p in module.named_parameters()}


class Conformance:
    """Attributes:
    build: saves a tiny random pipeline in a folder.
    part: words in the names of weights that learn where there is no adapter.
    family: `package.module:Class` of one that isn't in visalign/families; None: recognised.
    options: of the family, for the tiny pipeline.
    sides: of the pictures in pixels, two.
    guidances: without and with guidance, where the model has it.
    steps: of the grid.
    pictured: whether each prompt needs a condition picture.
    rewards: for the training steps.
    scale: of what the adapter's weights are moved by.
    """

    build: ClassVar[Callable[[Path], object]]
    part: ClassVar[str]
    family: ClassVar[str | None] = None
    options: ClassVar[dict[str, Any]] = {}
    sides: ClassVar[tuple[int, int]] = (32, 48)
    guidances: ClassVar[tuple[float, ...]] = (1.0, 4.0)
    steps: ClassVar[int] = 3
    pictured: ClassVar[bool] = False
    rewards: ClassVar[str] = "{jpeg: 1.0}"
    scale: ClassVar[float] = 0.2

    # --- what a family may do otherwise --------------------------------------------------------------------------------

    def stock(self, folder: Path) -> Any:
        """The stock pipeline, its scheduler replaced by the first-order equivalent where it isn't."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder)

    def packed(self, noise: Tensor) -> Tensor:
        """Noise (N, ...) in the layout of the stock pipeline."""
        return noise

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        """What else the stock pipeline is called with."""
        return {"guidance_scale": guidance}

    def media(self, count: int, side: int) -> tuple[int, ...]:
        """Shape of `count` decoded pictures or videos."""
        return (count, 3, side, side)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "guidance" in metafunc.fixturenames:
            metafunc.parametrize("guidance", self.guidances)

    # --- fixtures ------------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("pipeline")
        torch.manual_seed(0)
        type(self).build(folder)
        return folder

    @pytest.fixture(scope="class")
    def plain(self, folder: Path) -> Any:
        pipeline = self.stock(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @pytest.fixture(scope="class")
    def policies(self, folder: Path) -> list[Policy]:
        """One for each side; they share nothing with `plain`, and nobody trains them."""
        return [self.load(folder, resolution=side) for side in self.sides]

    @pytest.fixture
    def learner(self, folder: Path) -> Policy:
        policy = self.load(folder, resolution=self.sides[0])
        policy.add_lora(4, 8)
        scramble(policy, self.scale)
        return policy

    @classmethod
    def load(cls, folder: Path, **options: Any) -> Policy:
        return registry.load_policy(str(folder), cls.family, **(cls.options | options))

    def prompts(self, count: int) -> Prompts:
        rng = torch.Generator().manual_seed(5)
        shown = [{"condition": torch.rand(3, *self.sides, generator=rng)} if self.pictured else {} for _ in TEXTS[:count]]
        return Prompts.of(TEXTS[:count], shown)

    def drawn(self, pipeline: Any, policy: Policy, prompts: Prompts, guidance: float, side: int) -> Tensor:
        """What a stock pipeline makes of the noise that `pictures` starts from at seed 3."""
        noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
        options = {"height": side, "width": side, "num_inference_steps": self.steps, "output_type": "pt"}
        return pipeline(prompt=list(prompts.texts), latents=self.packed(noise), **options, **self.arguments(prompts, guidance))[0]

    # --- promises ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1], ids=["small", "large"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_noise_free_sample_equals_the_stock_pipeline(
        self, plain: Any, policies: list[Policy], size: int, guidance: float, count: int
    ) -> None:
        policy, prompts, side = policies[size], self.prompts(count), self.sides[size]
        ours = pictures(policy, prompts, steps=self.steps, seed=3, guidance=guidance)
        theirs = self.drawn(plain, policy, prompts, guidance, side)
        assert ours.shape == self.media(count, side)
        assert (ours - theirs).abs().max() <= 1e-5
        assert ours.std() > 0.01
        noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
        again = policy.family.stock(prompts.texts, noise, self.steps, guidance, prompts.metadata)
        assert (again - theirs).abs().max() <= 1e-5, "what `visalign check` compares with"

    def test_replay_at_the_rollouts_shape_has_a_ratio_of_one(self, policies: list[Policy]) -> None:
        policy, prompts = policies[0], self.prompts(3)
        guidance, condition = self.guidances[-1], policy.family.encode(prompts.texts, prompts.metadata)
        dynamics = Dynamics("flow_sde", 0.7) if isinstance(policy.family.path, Flow) else Dynamics("ddim", 1.0)
        plan = all_steps(self.steps)
        chain = rollout(policy, prompts, condition, steps=self.steps, seed=0, batch=3, guidance=guidance, plan=plan, dynamics=dynamics)
        for k in range(self.steps - 1):
            now, after = (chain.sigmas[j].expand(3) for j in (k, k + 1))
            with torch.no_grad():
                law, _ = transition(policy, chain.latents[:, k], now, after, condition, guidance, dynamics)
            assert torch.equal(law.log_prob(chain.latents[:, k + 1]), chain.log_probs[:, k])

    @pytest.mark.parametrize("name", TRAINERS)
    def test_a_training_step_moves_what_is_meant_to_learn_alone(self, folder: Path, tmp_path: Path, name: str) -> None:
        words = [f"policy.model={folder}", f"run.path={tmp_path}", "run.device=cpu", f"policy.resolution={self.sides[0]}"]
        words += [f"policy.options={json.dumps(self.options)}", f"policy.steps={self.steps}", f"policy.guidance={self.guidances[-1]}"]
        words += ["trainer.prompts=1", "trainer.group_size=2", "trainer.micro_batch=2", f"rewards={self.rewards}"]
        words += [f"eval.rewards={self.rewards}", f"prompts={self.prompt_file(tmp_path)}", f"policy.family={self.family or 'null'}"]
        trained = [f"policy.train=[{self.part}]"] if "policy.lora=null" in TRAINERS[name] else ["policy.train=[]", "policy.lora.rank=2"]
        trainer = build.trainer(config.load(name, [*words, *trained, *TRAINERS[name]]))
        policy = trainer.policy
        before, names = weights(policy), set(policy.named_trainable())
        row = trainer.step(1)
        moved = {key for key, value in weights(policy).items() if not torch.equal(value, before[key])}
        network = next(part for part, module in policy.family.modules().items() if module is policy.family.network)
        assert moved
        assert moved <= {f"{network}.{name}" for name in names}
        assert row.get(trainer.deviation, 0.0) < 1e-6
        assert 0 < row["grad_norm"] < float("inf")

    def prompt_file(self, folder: Path) -> str:
        """Sections of a recipe with prompts that come with a picture where the model needs one."""
        known = self.prompts(2)
        lines: list[str] = []
        for n, (text, metadata) in enumerate(zip(known.texts, known.metadata, strict=True)):
            shown: dict[str, str] = {}
            if metadata:
                shown = {"condition": str(save(metadata["condition"][None], folder, [str(n)])[0])}
            lines.append(json.dumps({"prompt": text} | shown))
        (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return json.dumps({"train": str(folder / "prompts.jsonl"), "test": str(folder / "prompts.jsonl")})

    def test_exported_lora_with_alpha_twice_its_rank_draws_the_same_in_stock_diffusers(
        self, learner: Policy, folder: Path, tmp_path: Path
    ) -> None:
        prompts, side = self.prompts(3), self.sides[0]
        ours = pictures(learner, prompts, steps=self.steps, seed=3, guidance=self.guidances[-1])
        assert build.export(learner, tmp_path) == "adapter"
        pipeline = self.stock(folder)
        pipeline.set_progress_bar_config(disable=True)
        before = self.drawn(pipeline, learner, prompts, self.guidances[-1], side)
        pipeline.load_lora_weights(tmp_path)
        theirs = self.drawn(pipeline, learner, prompts, self.guidances[-1], side)
        assert (theirs - before).abs().max() > 1e-4
        assert (theirs - ours).abs().max() <= 1e-5

    def test_merged_export_is_a_whole_pipeline(self, learner: Policy, tmp_path: Path) -> None:
        prompts = self.prompts(1)
        ours = pictures(learner, prompts, steps=self.steps, seed=3)
        assert build.export(learner, tmp_path, merge=True) == "pipeline"
        again = self.load(tmp_path, resolution=self.sides[0])
        assert (pictures(again, prompts, steps=self.steps, seed=3) - ours).abs().max() < 1e-4

    def test_unique_prompts_are_encoded_once_and_rows_keep_their_order(self, policies: list[Policy]) -> None:
        prompts = self.prompts(3)
        condition = policies[0].family.encode(prompts.texts, [prompts.metadata[n] for n in (0, 1, 0)])
        assert {len(value) for value in condition.tensors.values()} == {2}
        assert condition.index.tolist() == [0, 1, 0]

    def test_decoding_is_differentiable_and_bounded_and_pictures_become_latents(self, policies: list[Policy]) -> None:
        family = policies[0].family
        latents = torch.randn(1, *family.latent_shape, requires_grad=True)
        media = family.decode(latents)
        media.mean().backward()
        assert latents.grad is not None
        assert latents.grad.abs().sum() > 0
        assert 0 <= media.min() <= media.max() <= 1
        encoded = family.encode_images(media.detach())
        assert encoded.shape == latents.shape
        assert encoded.isfinite().all()
        assert isinstance(family, PipelineFamily)
        assert torch.allclose(family.scaled(family.unscaled(latents)), latents, atol=1e-5)

    def test_a_pipeline_object_is_recognised_too(self, plain: Any, policies: list[Policy]) -> None:
        policy = registry.load_policy(plain, self.family, **(self.options | {"resolution": self.sides[0]}))
        assert type(policy.family) is type(policies[0].family)
        assert policy.family.network in policy.family.modules().values()
