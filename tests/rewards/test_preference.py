"""preference: the saved head on its encoder's features, and one line for what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.rewards.conftest import preference_head, scene_batch
from visalign.errors import UserError
from visalign.features import load_dual_encoder
from visalign.rewards.preference import Preference


def test_score_is_the_perceptron_on_image_text_and_product(tmp_path: Path) -> None:
    reward, batch = Preference(preference_head(tmp_path)), scene_batch()
    encoder = load_dual_encoder("toybox")
    image, text = encoder.encode_images(batch.images), encoder.encode_texts(batch.prompts)
    first, _, last = reward.head.layers
    features = torch.cat([96**0.5 * image, 96**0.5 * text, 96 * image * text], 1)
    hidden = torch.nn.functional.gelu(features @ first.weight.T + first.bias)  # pyright: ignore
    torch.testing.assert_close(reward.score(batch).scores, hidden @ last.weight[0] + last.bias)  # pyright: ignore


def test_a_local_encoder_is_kept_by_its_whole_path(clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from visalign.heads import PreferenceHead

    monkeypatch.chdir(Path(clip_folder).parent)
    PreferenceHead(Path(clip_folder).name, 16, 4).save(tmp_path / "reward")
    monkeypatch.chdir("/")
    assert Preference(str(tmp_path / "reward")).score(scene_batch()).valid.all()


def test_what_is_no_head_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no preference head .* give RUN/reward of a reward_model run with kind=head"):
        Preference(str(tmp_path))
    preference_head(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="holds no preference head"):
        Preference(str(tmp_path))
