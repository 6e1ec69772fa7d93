"""ImageReward: published names, the official forward step by step, saving, and prompts that are too long."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tests import tiny_models
from visalign.errors import UserError
from visalign.rewards.image_reward import MEAN, PIXEL_MEAN, PIXEL_STD, STD, ImageReward
from visalign.scoring import RewardInput

PROMPTS = ["a red star", "two blue circles and a ring"]
LONG = "a star and " * 14 + "a ring"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.blip(tmp_path_factory.mktemp("blip"))


def test_score_equals_the_official_steps(folder: str) -> None:
    """PIL preprocessing, image tokens, text with cross-attention, first token, five layers, mean and std."""
    from torchvision import transforms
    from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

    reward = ImageReward(folder)
    config, state = BlipConfig.from_pretrained(folder), load_file(Path(folder) / "model.safetensors")
    vision, text = BlipVisionModel(config.vision_config).eval(), BlipTextModel(config.text_config, add_pooling_layer=False).eval()
    for module, part in ((vision, "vision."), (text, "text.")):
        module.load_state_dict({name: state[tiny_models.blip_names(part + name)] for name in module.state_dict()})
    head = nn.Sequential(
        nn.Linear(32, 24),
        nn.Dropout(0.2),
        nn.Linear(24, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    ).eval()
    head.load_state_dict({name.removeprefix("mlp.layers."): value for name, value in state.items() if name.startswith("mlp.")})
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(32, bicubic), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(PIXEL_MEAN, PIXEL_STD)]
    official = transforms.Compose(steps)
    images = (torch.rand(2, 3, 50, 71, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        patches = vision(torch.stack([official(picture) for picture in pictures])).last_hidden_state  # type: ignore[misc]
        hidden = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches).last_hidden_state
        expected = (head(hidden[:, 0]).squeeze(-1) - MEAN) / STD
    scores = reward.score(RewardInput(images, PROMPTS)).scores
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)  # 8-bit rounding of the resize
    shuffled = reward.score(RewardInput(images, PROMPTS[::-1])).scores
    assert (shuffled - scores).abs().max() > 1e-3, "the prompt matters"


def test_a_saved_folder_scores_alike(folder: str, tmp_path: Path) -> None:
    reward, batch = ImageReward(folder), RewardInput(torch.rand(2, 3, 40, 40), PROMPTS)
    reward.save(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith("blip.") for name in load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(ImageReward(str(tmp_path)).score(batch).scores, reward.score(batch).scores, rtol=0, atol=1e-6)


def test_long_prompts_are_reported_once(folder: str) -> None:
    reward, batch = ImageReward(folder), RewardInput(torch.rand(2, 3, 32, 32), [LONG, "a ring"])
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 35 tokens"):
        first = reward.score(batch).scores
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reward.score(batch).scores, first)


def test_missing_weights_are_named(folder: str, tmp_path: Path) -> None:
    ImageReward(folder).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["vision.post_layernorm.weight"]
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"without vision\.post_layernorm\.weight; with a foreign extra"):
        ImageReward(str(tmp_path))
