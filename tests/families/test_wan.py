"""The Wan family against its stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from tests.families.of_videos import OfVideos
from tests.tiny import wan as tiny
from visalign import build, registry
from visalign.errors import UserError
from visalign.noise import gaussian
from visalign.pictures import to_image
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures


class OfWan(OfVideos):
    part = "attn2"
    sides = (16, 32)

    def stock(self, folder: Path) -> Any:
        """UniPC of order 1 without its corrector is Euler's method on the same times."""
        pipeline = super().stock(folder)
        every = list(range(1000))
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1, disable_corrector=every)
        return pipeline


class TestWan21(OfWan):
    build = staticmethod(tiny.wan21)


class TestWan22(OfWan):
    """Two experts; at this shift the last of three times is the second one's."""

    build = staticmethod(tiny.wan22)

    def test_exported_lora_with_alpha_twice_its_rank_draws_the_same_in_stock_diffusers(
        self, learner: Policy, folder: Path, tmp_path: Path
    ) -> None:
        prompts, side, guidance = self.prompts(3), self.sides[0], self.guidances[-1]
        ours = pictures(learner, prompts, steps=self.steps, seed=3, guidance=guidance)
        assert build.export(learner, tmp_path) == "adapter"
        pipeline = self.stock(folder)
        pipeline.load_lora_weights(tmp_path)
        one = self.drawn(pipeline, learner, prompts, guidance, side)
        pipeline.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
        both = self.drawn(pipeline, learner, prompts, guidance, side)
        assert (one - ours).abs().max() > 1e-3
        assert (both - ours).abs().max() <= 1e-5

    def test_each_expert_answers_for_its_own_times_with_its_own_guidance(self, folder: Path, plain: Any) -> None:
        policy, prompts = self.load(folder, resolution=16, guidance_2=2.0), self.prompts(3)
        experts = policy.family.network
        x, condition = torch.randn(3, *policy.family.latent_shape), policy.family.encode(prompts.texts).positive()
        sigma = torch.tensor([0.95, 0.5, 0.875])
        with torch.no_grad():
            said = policy.family.forward(experts, x, sigma, condition)
            alone = [policy.family.forward(expert, x, sigma, condition) for expert in experts.each]  # pyright: ignore
        for row, expert in enumerate((0, 1, 0)):
            torch.testing.assert_close(said[row], alone[expert][row])
        noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
        ours = pictures(policy, prompts, steps=self.steps, seed=3, guidance=4.0)
        options = {"height": 16, "width": 16, "num_inference_steps": self.steps, "output_type": "pt", "guidance_scale_2": 2.0}
        theirs = plain(prompt=prompts.texts, latents=noise, **options, **self.arguments(prompts, 4.0))[0]
        assert (ours - theirs).abs().max() <= 1e-5


class TestWan21FromAFirstFrame(OfWan):
    build = staticmethod(tiny.wan21_i2v)
    pictured = True

    def drawn(self, pipeline: Any, policy: Policy, prompts: Prompts, guidance: float, side: int) -> Tensor:
        """One by one: the stock pipeline takes one picture a call."""
        shown: list[Tensor] = []
        for n in range(len(prompts)):
            own = prompts.take(slice(n, n + 1))
            noise = gaussian(policy.family.latent_shape, 3, own.noise_ids, 0)
            options = {"height": side, "width": side, "num_inference_steps": self.steps, "output_type": "pt"}
            options |= {"image": to_image(own.metadata[0]["condition"])} | self.arguments(own, guidance)
            shown.append(pipeline(prompt=own.texts, latents=noise, **options)[0])
        return torch.cat(shown)


class TestWan22FromAFirstFrame(TestWan21FromAFirstFrame):
    """The 5B model."""

    build = staticmethod(tiny.wan22_5b_i2v)

    def test_the_first_frame_is_the_given_one(self, folder: Path) -> None:
        policy, prompts = self.load(folder, resolution=16), self.prompts(2)
        family: Any = policy.family
        given = family.encode(prompts.texts, prompts.metadata).positive()["first"]
        x, sigma = torch.randn(2, *family.latent_shape), torch.tensor([0.9, 0.2])
        with torch.no_grad():
            said = policy.predict(x, sigma, family.encode(prompts.texts, prompts.metadata))
        torch.testing.assert_close((x - sigma.view(2, 1, 1, 1, 1) * said)[:, :, :1], given)


def test_the_5b_model_has_a_time_for_every_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.wan22_5b(tmp_path)
    policy = registry.load_policy(str(tmp_path), resolution=16, frames=5, max_sequence_length=8)
    prompts = Prompts.of(["two red circles"])
    noise = gaussian(policy.family.latent_shape, 3, prompts.noise_ids, 0)
    ours = pictures(policy, prompts, steps=2, seed=3, guidance=4.0)
    assert (ours - policy.family.stock(prompts.texts, noise, 2, 4.0)).abs().max() <= 1e-5


def test_times_are_cut_as_the_scheduler_cuts_them(tmp_path: Path) -> None:
    tiny.wan21(tmp_path)
    family: Any = registry.load_policy(str(tmp_path), resolution=16, frames=5).family
    for shift in (1.0, 3.0, 5.0, 8.0):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        family.pipeline.scheduler = family.scheduler = scheduler
        for steps in (3, 4, 20, 40, 50):
            assert torch.equal(family.time(family.grid(steps)[:-1]).long(), scheduler.timesteps), (shift, steps)
    assert family.time(torch.tensor([0.12345])) == 123


def test_sizes_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    tiny.wan21(tmp_path)
    refused = {"height": (100, "height=100: expected a multiple of 16"), "frames": (4, "frames=4: expected .* and one more")}
    for name, (value, message) in refused.items():
        with pytest.raises(UserError, match=message):
            registry.load_policy(str(tmp_path), **{name: value})
