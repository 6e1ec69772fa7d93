"""The FLUX.1 Kontext family against the stock pipeline, on tiny untrained weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.families.conformance import TEXTS, Conformance
from tests.families.test_flux import packed
from tests.tiny.flux import kontext
from visalign import registry
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.sampling import pictures


class TestFluxKontext(Conformance):
    build = staticmethod(kontext)
    part = "single_transformer_blocks"
    options: ClassVar[dict[str, Any]] = {"max_sequence_length": 12}
    pictured = True

    def packed(self, noise: Tensor) -> Tensor:
        return packed(noise)

    def arguments(self, prompts: Prompts, guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "guidance_scale": 3.5, "negative_prompt": [""] * len(prompts), "max_sequence_length": 12}

    def drawn(self, pipeline: Any, policy: Policy, prompts: Prompts, guidance: float, side: int) -> Tensor:
        shown = torch.stack([record["condition"] for record in prompts.metadata])
        high, wide = shown.shape[-2:]
        scale = side / min(high, wide)
        size = (round(high * scale), round(wide * scale))
        for step in ((high, size[1]), size):  # widths first, clipped after each pass
            if step != tuple(shown.shape[-2:]):
                shown = F.interpolate(shown, step, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((n - side) // 2 for n in size)
        shown = shown[..., top : top + side, left : left + side]
        edit = partial(pipeline, image=shown, max_area=side**2, _auto_resize=False)
        return super().drawn(edit, policy, prompts, guidance, side)


def test_the_picture_matters_and_is_needed(tmp_path: Path) -> None:
    kontext(tmp_path)
    policy = registry.load_policy(str(tmp_path), resolution=32, max_sequence_length=12)
    first, second = (
        pictures(policy, Prompts.of(TEXTS[:1], [{"condition": torch.full((3, 32, 32), grey)}]), steps=2, seed=0) for grey in (0.1, 0.9)
    )
    assert (first - second).abs().max() > 1e-4
    with pytest.raises(UserError, match="prompt 'two red circles' has no picture: this model needs `condition`"):
        policy.family.encode(TEXTS[:1])
