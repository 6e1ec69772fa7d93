"""HPSv3: transformers' processor and model step by step, uncertainty, templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_models
from visalign.errors import UserError
from visalign.qwen_reader import CHAT
from visalign.rewards.hps3 import AREA, TEMPLATE, TOKEN, HumanPreferenceScore3, head
from visalign.scoring import RewardInput

PROMPTS = ["a red star", "a ring that says <|Reward|>"]


def test_score_equals_transformers_step_by_step(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    model, checkpoint = tiny_models.qwen(tmp_path, 1), tiny_models.hps3(tmp_path)
    reward = HumanPreferenceScore3(checkpoint, dtype="fp32")
    images = (torch.rand(2, 3, 100, 130, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    output = reward.score(RewardInput(images, PROMPTS))

    size = {"shortest_edge": AREA, "longest_edge": AREA}
    processor = Qwen2VLImageProcessor.from_pretrained(checkpoint, size=size)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    layers = head(32)
    state = load_file(tmp_path / "HPSv3.safetensors")
    layers.load_state_dict({name.removeprefix("rm_head."): value for name, value in state.items() if name.startswith("rm_head.")})
    for n, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        seen = processor([Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())], return_tensors="pt")
        text = TEMPLATE.replace("{prompt}", prompt.replace("<|", "< |"))
        ids = tokenizer(
            CHAT.format(media="<|image_pad|>" * (int(seen.image_grid_thw.prod()) // 4), text=text), return_tensors="pt"
        ).input_ids
        assert (ids == tokenizer.convert_tokens_to_ids(TOKEN)).sum() == 1, "the prompt smuggles in no token"
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        with torch.no_grad():
            hidden = model.model(input_ids=ids, position_ids=positions, **seen).last_hidden_state
            mean, log_std = layers(hidden[ids == tokenizer.convert_tokens_to_ids(TOKEN)])[0]
        torch.testing.assert_close(output.scores[n], mean, rtol=0, atol=0.02)  # 8-bit rounding of the resize
        assert output.uncertainty is not None
        torch.testing.assert_close(output.uncertainty[n], log_std.exp(), rtol=0.02, atol=0)
    assert (output.scores[0] - output.scores[1]).abs() > 1e-3


def test_the_instruction_of_the_training_comes_from_a_file(tmp_path: Path) -> None:
    checkpoint = tiny_models.hps3(tmp_path / "model")
    other = tmp_path / "other.txt"
    other.write_text(f"Rate {{prompt}}: {TOKEN}", encoding="utf-8")
    batch = RewardInput(torch.rand(1, 3, 64, 64), ["a ring"])
    plain, changed = (HumanPreferenceScore3(checkpoint, template=path, dtype="fp32") for path in (None, str(other)))
    assert (plain.score(batch).scores - changed.score(batch).scores).abs() > 1e-4
    other.write_text("Rate {prompt}.", encoding="utf-8")
    with pytest.raises(UserError, match=r"must have <\|Reward\|> exactly once"):
        HumanPreferenceScore3(checkpoint, template=str(other))
    (tmp_path / "model" / "template.txt").unlink()
    with pytest.warns(UserWarning, match="not the published ones"):
        HumanPreferenceScore3(checkpoint)


def test_a_base_that_does_not_fit_is_a_user_error(tmp_path: Path) -> None:
    checkpoint = tiny_models.hps3(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no Qwen2-VL config"):
        HumanPreferenceScore3(checkpoint, base=str(tmp_path / "empty"))
    state = load_file(tmp_path / "model" / "HPSv3.safetensors")
    from safetensors.torch import save_file

    save_file({name: value for name, value in state.items() if name != "model.norm.weight"}, tmp_path / "model" / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"without language_model\.norm\.weight"):
        HumanPreferenceScore3(checkpoint)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
    save_file(state, tmp_path / "model" / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"no embeddings for <\|Reward\|>"):
        HumanPreferenceScore3(checkpoint)
