"""HPSv2: the cosine without a scale, letterboxed, from a file of weights as it is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.rewards.hps import FILES, HumanPreferenceScore
from visalign.scoring import RewardInput

PROMPTS = ["a ring", "a star", "a red ring"]


def published(folder: Path, file: str) -> str:
    """A tiny open_clip model that is known by name, and weights of it, in half precision and nested as HPSv2's are."""
    import open_clip

    size = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "hps-tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": size, "text_cfg": text}), encoding="utf-8")
    open_clip.add_model_config(folder / "hps-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("hps-tiny", pretrained=None, load_weights=False)
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / file)
    return "hps-tiny"


def test_score_is_the_cosine_of_letterboxed_pictures() -> None:
    images = torch.rand(3, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    reward = HumanPreferenceScore("toybox")
    output = reward.score(RewardInput(images, PROMPTS))
    text = reward.encoder.encode_texts(PROMPTS)
    boxed = F.pad(images, (0, 0, 12, 12))  # 64 pixels is the toybox's size, so that nothing is scaled
    torch.testing.assert_close(output.scores, (reward.encoder.encode_images(boxed) * text).sum(-1))
    cropped = HumanPreferenceScore("toybox", aspect="crop").score(RewardInput(images, PROMPTS)).scores
    assert (cropped - output.scores).abs().max() > 1e-3
    assert tuple(output.embeddings["hps"].shape) == (3, 96)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_published_files_load_into_plain_open_clip(tmp_path: Path, version: str) -> None:
    import open_clip

    name = published(tmp_path, FILES[version])
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reward = HumanPreferenceScore(str(tmp_path), version=version, architecture=name)  # type: ignore[arg-type]
    assert reward.spec.version == version
    model = open_clip.create_model(name, pretrained=str(tmp_path / FILES[version])).eval()
    with torch.no_grad():
        pixels = (images - torch.tensor(reward.encoder.preprocess.mean).view(3, 1, 1)) / torch.tensor(reward.encoder.preprocess.std).view(
            3, 1, 1
        )
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True)
    torch.testing.assert_close(reward.score(RewardInput(images, PROMPTS)).scores, (image * text).sum(-1), rtol=0, atol=1e-5)
    single = HumanPreferenceScore(str(tmp_path / FILES[version]), architecture=name)
    assert single.encoder is reward.encoder


def test_a_broken_file_is_a_user_error(tmp_path: Path) -> None:
    published(tmp_path, "short.pt")
    whole = (tmp_path / "short.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not weights")
    for path, architecture in (("short.pt", "hps-tiny"), ("text.pt", "hps-tiny"), ("text.pt", "no-such-model")):
        with pytest.raises(UserError, match=path):
            HumanPreferenceScore(str(tmp_path / path), architecture=architecture)
