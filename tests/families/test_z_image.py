"""The Z-Image family against the stock pipeline, on tiny untrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.families.conformance import Conformance
from tests.tiny.z_image import z_image
from visalign.policy import Policy, named_as_distilled
from visalign.rollout import Prompts
from visalign.sampling import pictures


class TestZImage(Conformance):
    part = "context_refiner"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 40}
    build = staticmethod(z_image)
    steps = 4
    rules: ClassVar[tuple[dict[str, float], ...]] = ({"cfg_normalization": 0.7}, {"cfg_truncation": 0.3})

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance - 1, "max_sequence_length": 40}

    @pytest.mark.parametrize("rule", rules)
    def test_rules_of_guidance(self, plain: Any, folder: Path, rule: dict[str, float]) -> None:
        policy, prompts = self.load(folder, resolution=32, **rule), self.prompts(3)
        plain_rule, theirs = self.drawn(plain, policy, prompts, 4.0, 32), self.drawn_with(plain, policy, prompts, rule)
        ours = pictures(policy, prompts, steps=self.steps, seed=3, guidance=4.0)
        assert (ours - theirs).abs().max() <= 1e-5
        assert (ours - plain_rule).abs().max() > 1e-3

    def drawn_with(self, plain: Any, policy: Policy, prompts: Prompts, rule: dict[str, float]) -> torch.Tensor:
        return self.drawn(lambda **options: plain(**options, **rule), policy, prompts, 4.0, 32)

    def test_pictures_do_not_depend_on_the_batch(self, policies: list[Policy]) -> None:
        prompts = Prompts.of(["a ring", "two red circles and a blue square left of the green cross above the star of the black ring " * 2])
        lengths = policies[0].family.encode(prompts.texts).tensors["length"]
        assert lengths[0] < 32 < lengths[1], "captions are filled up to a multiple of 32 tokens, and padded to the longest"
        alone = [pictures(policies[0], prompts.take(slice(n, n + 1)), steps=3, seed=0, guidance=4.0) for n in range(2)]
        assert (pictures(policies[0], prompts, steps=3, seed=0, guidance=4.0) - torch.cat(alone)).abs().max() < 1e-5


def test_the_turbo_model_is_known_by_its_name() -> None:
    assert named_as_distilled("Tongyi-MAI/Z-Image-Turbo")
    assert not named_as_distilled("Tongyi-MAI/Z-Image")
