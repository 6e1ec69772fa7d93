"""The Qwen-Image-Edit family against the stock pipeline, on tiny untrained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.conformance import TEXTS, Conformance
from tests.tiny.qwen_image import qwen_image_edit, qwen_image_edit_plus
from visalign.errors import UserError
from visalign.pictures import to_image
from visalign.policy import Policy
from visalign.rollout import Prompts


class TestQwenImageEdit(Conformance):
    part = "txt_mlp"
    build = staticmethod(qwen_image_edit)
    sides = (64, 128)
    steps = 2
    pictured = True

    def packed(self, noise: Tensor) -> Tensor:
        n, c, h, w = noise.shape
        return noise.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)

    def drawn(self, pipeline: Any, policy: Policy, prompts: Prompts, guidance: float, side: int) -> Tensor:
        """One by one: of a list of pictures, the stock pipeline shows the text encoder each in the size that it has."""
        rows, alone = [slice(n, n + 1) for n in range(len(prompts))], super().drawn
        return torch.cat([alone(pipeline, policy, prompts.take(row), guidance, side) for row in rows])

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": " ", "image": to_image(prompts.metadata[0]["condition"])}

    def test_the_picture_reaches_both_halves_of_guidance(self, policies: list[Policy]) -> None:
        prompts = self.prompts(3)
        condition = policies[0].family.encode([TEXTS[0]] * 2, prompts.metadata[:2])
        for half in (condition.positive(), condition.unconditional()):
            assert half["text"].shape[0] == half["picture"].shape[0] == 2
            assert (half["text"][0] - half["text"][1]).abs().max() > 1e-3, "the text encoder sees it"
            assert (half["picture"][0] - half["picture"][1]).abs().max() > 1e-2
        assert torch.equal(condition.positive()["picture"], condition.unconditional()["picture"])

    def test_pictures_that_do_not_fit_together(self, policies: list[Policy]) -> None:
        wide, high = torch.rand(3, 32, 64), torch.rand(3, 64, 32)
        with pytest.raises(UserError, match="pictures to edit of 32x64, 64x32: one call needs one ratio"):
            policies[0].family.encode(TEXTS[:2], [{"condition": wide}, {"condition": high}])
        with pytest.raises(UserError, match="prompt 'two red circles' has no picture"):
            policies[0].family.encode(TEXTS[:1])


class TestQwenImageEditPlus(TestQwenImageEdit):
    """Qwen-Image-Edit-2509, whose text encoder sees a smaller picture, and more of the prompt."""

    build = staticmethod(qwen_image_edit_plus)
    guidances = (4.0,)
