"""The Sana family against the stock pipelines, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tests.families.conformance import TRAINERS, Conformance
from tests.tiny.sana import sana, sana_sprint
from visalign import registry
from visalign.errors import UserError
from visalign.families.sana import NoiseFreeSCM
from visalign.noise import gaussian
from visalign.paths import Trigonometric
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import Dynamics, transition

UNBINNED = {"use_resolution_binning": False}  # to the few published sizes


class TestSana(Conformance):
    part = "caption_projection"
    build = staticmethod(sana)
    sides = (32, 64)

    def stock(self, folder: Path) -> Any:
        pipeline = super().stock(folder)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
        return pipeline

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance} | UNBINNED

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_the_network_gets_the_schedulers_times_whatever_the_number_of_steps(self, folder: Path, shift: float) -> None:
        policy: Any = self.load(folder, resolution=32)
        policy.family.scheduler.register_to_config(flow_shift=shift)
        for steps in range(1, 101):
            grid = policy.family.grid(steps)
            assert torch.allclose(grid, policy.family.scheduler.sigmas, rtol=0, atol=1e-7)
            assert torch.equal((grid[:-1].double() * 1000).long(), policy.family.scheduler.timesteps)

    def test_the_pipeline_keeps_its_scheduler(self, folder: Path) -> None:
        policy: Any = self.load(folder, resolution=32)
        policy.family.stock(["a star"], torch.randn(1, 4, 8, 8), 2, 1.0)
        assert policy.family.pipeline.scheduler.config.solver_order == 2


class TestSprint(Conformance):
    part = "caption_projection"
    build = staticmethod(sana_sprint)
    sides = (32, 64)
    guidances = (1.0,)
    steps = 2

    def stock(self, folder: Path) -> Any:
        pipeline = super().stock(folder)
        pipeline.scheduler = NoiseFreeSCM.from_config(pipeline.scheduler.config)
        return pipeline

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return UNBINNED

    @pytest.mark.parametrize("steps", [1, 3])
    def test_its_chain_is_the_stock_pipelines_with_fresh_noise(self, folder: Path, policies: list[Policy], steps: int) -> None:
        policy, condition = policies[0], policies[0].family.encode(["a star"])
        pipeline = super().stock(folder)  # with its own scheduler
        x = gaussian(policy.family.latent_shape, 0, torch.tensor([0]), 0)
        options = {"num_inference_steps": steps, "intermediate_timesteps": None, "output_type": "pt", "height": 32, "width": 32}
        theirs = pipeline("a star", latents=x, generator=torch.Generator().manual_seed(7), **options, **UNBINNED)[0]
        again, grid = torch.Generator().manual_seed(7), policy.family.grid(steps)
        for k in range(steps):
            with torch.no_grad():
                law, _ = transition(policy, x, grid[k : k + 1], grid[k + 1 : k + 2], condition, 1.0, Dynamics("cps", 1.0))
            x = law.draw(torch.randn(x.shape, generator=again))
        assert (policy.family.decode(x) - theirs).abs().max() <= 1e-5

    @pytest.mark.parametrize("name", [name for name in TRAINERS if name != "toybox_nft"])
    def test_a_training_step_moves_what_is_meant_to_learn_alone(self, folder: Path, tmp_path: Path, name: str) -> None:
        super().test_a_training_step_moves_what_is_meant_to_learn_alone(folder, tmp_path, name)

    def test_losses_of_the_forward_process_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nft trains on the forward process, which is invalid for the step-distilled"):
            super().test_a_training_step_moves_what_is_meant_to_learn_alone(folder, tmp_path, "toybox_nft")

    def test_it_is_a_student_and_on_the_trigonometric_path(self, policies: list[Policy]) -> None:
        assert policies[0].family.step_distilled
        assert isinstance(policies[0].family.path, Trigonometric)
        with pytest.raises(UserError, match="no unconditional half"):
            policies[0].predict(torch.randn(1, 4, 8, 8), torch.ones(1), policies[0].family.encode(["a star"]), 4.5)

    def test_the_distilled_guidance_matters(self, folder: Path, policies: list[Policy]) -> None:
        both = self.load(folder, resolution=32, distilled_guidance=1.0), policies[0]
        x, t = torch.randn(1, 4, 8, 8), torch.ones(1)
        weak, usual = (policy.predict(x, t, policy.family.encode(["a star"])) for policy in both)
        assert (weak - usual).abs().max() > 1e-4


def test_a_scheduler_of_no_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs use_flow_sigmas"):
        registry.load_policy(str(sana(tmp_path, use_flow_sigmas=False)))
