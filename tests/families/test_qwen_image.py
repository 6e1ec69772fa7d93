"""The Qwen-Image family against the stock pipeline, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.conformance import TEXTS, Conformance
from tests.tiny.qwen_image import qwen_image
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures

TEMPLATE = 34  # tokens before the prompt, as many as the real tokenizer makes of them


class TestQwenImage(Conformance):
    part = "txt_mlp"
    build = staticmethod(qwen_image)

    def packed(self, noise: Tensor) -> Tensor:
        n, c, h, w = noise.shape
        return noise.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(prompts)}

    def test_the_templates_head_is_dropped(self, plain: Any, policies: list[Policy]) -> None:
        tensors = policies[0].family.encode(TEXTS).tensors
        whole = [len(plain.tokenizer(plain.prompt_template_encode.format(text))["input_ids"]) for text in TEXTS[:2]]
        assert len(plain.tokenizer(plain.prompt_template_encode.split("{}")[0])["input_ids"]) == TEMPLATE
        assert tensors["length"].tolist() == [length - TEMPLATE for length in whole]
        assert tensors["text"].shape[1] == max(whole) - TEMPLATE

    def test_pictures_do_not_depend_on_the_batch(self, policies: list[Policy]) -> None:
        prompts = self.prompts(3)
        alone = [pictures(policies[0], prompts.take(slice(n, n + 1)), steps=3, seed=0, guidance=4.0) for n in range(3)]
        assert (pictures(policies[0], prompts, steps=3, seed=0, guidance=4.0) - torch.cat(alone)).abs().max() < 1e-5

    def test_guidance_keeps_the_norm_of_each_token(self, policies: list[Policy]) -> None:
        family = policies[0].family
        conditional, unconditional = torch.randn(2, 2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
        guided = family.guide(conditional, unconditional, 4.0, torch.ones(2))
        assert torch.allclose(self.packed(guided).norm(dim=-1), self.packed(conditional).norm(dim=-1), atol=1e-5)
        plain = unconditional + 4 * (conditional - unconditional)
        cosine = torch.cosine_similarity(self.packed(guided), self.packed(plain), dim=-1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)

    def test_the_grid_is_shifted_by_resolution(self, policies: list[Policy]) -> None:
        small, large = (policy.family.grid(5) for policy in policies)
        assert small[0] == large[0] == 1
        assert (large[1:4] > small[1:4]).all(), "more tokens, more noise"
        assert small[-2] == pytest.approx(0.02), "the published shift_terminal"
        with pytest.raises(UserError, match="use 2 steps or more"):
            policies[0].family.grid(1)


def test_pictures_become_latents_of_the_stock_pipelines_scale(tmp_path: Path) -> None:
    from visalign import registry

    family: Any = registry.load_policy(str(qwen_image(tmp_path)), resolution=32).family
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config, latents = family.pipeline.vae.config, family.encode_images(images)
    raw = family.pipeline.vae.encode((images * 2 - 1)[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    assert torch.allclose(latents * std + mean, raw, atol=1e-5)
