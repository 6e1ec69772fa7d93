"""VideoReward: three ratings at three tokens, frames, z-scores, and low-rank updates as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from visalign.errors import UserError
from visalign.qwen_reader import CHAT
from visalign.rewards.video_reward import MAX_PIXELS, MIN_PIXELS, MOMENTS, TEMPLATE, TOKENS, VideoReward, chosen_frames
from visalign.scoring import RewardInput

PROMPTS = ["a red star", "two blue circles"]


def batch(frames: int = 6) -> RewardInput:
    video = (torch.rand(2, frames, 3, 60, 90, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return RewardInput(video[:, 0], PROMPTS, video=video)


def official(model: Any, folder: Path, head: torch.Tensor) -> torch.Tensor:
    """(2, 3) raw ratings by transformers' own processor and model."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    processor = Qwen2VLVideoProcessor(size=size, patch_size=tiny_models.QWEN_PATCH, cap_pixels_per_frame=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TOKENS.values()), special_tokens=True)
    wanted, ratings = tokenizer.convert_tokens_to_ids(list(TOKENS.values())), []
    given = batch()
    assert given.video is not None
    for video, prompt in zip(given.video, PROMPTS, strict=True):
        frames = (video[torch.linspace(0, 5, 4).round().long()] * 255).round().byte()  # 6 frames at 16 a second: the least, 4
        seen = processor(videos=[frames], return_tensors="pt")
        media = "<|video_pad|>" * (int(seen.video_grid_thw.prod()) // 4)
        ids = tokenizer(CHAT.format(media=media, text=TEMPLATE.replace("{prompt}", prompt)), return_tensors="pt").input_ids
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        with torch.no_grad():
            hidden = model(input_ids=ids, position_ids=positions, **seen).last_hidden_state[0]
        ratings.append(torch.stack([hidden[ids[0] == token][0] @ head[0] for token in wanted]))
    return torch.stack(ratings)


def test_ratings_equal_transformers_step_by_step(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, checkpoint = tiny_models.qwen(tmp_path, 3), tiny_models.video_reward(tmp_path)
    raw = official(model.model, tmp_path, load_file(tmp_path / "model.safetensors")["rm_head.weight"])
    output = VideoReward(checkpoint, dtype="fp32").score(batch())
    expected = [(raw[:, n] - mean) / std for n, (mean, std) in enumerate(MOMENTS.values())]
    for name, value in zip(MOMENTS, expected, strict=True):
        torch.testing.assert_close(output.components[name], value, rtol=0, atol=0.02)
    torch.testing.assert_close(output.scores, torch.stack(expected).sum(0), rtol=0, atol=0.05)
    motion = VideoReward(checkpoint, dimension="motion", dtype="fp32").score(batch())
    assert torch.equal(motion.scores, output.components["motion"])


def test_visual_quality_and_motion_do_not_read_the_prompt(tmp_path: Path) -> None:
    reward, given = VideoReward(tiny_models.video_reward(tmp_path), dtype="fp32"), batch()
    one, other = (reward.score(RewardInput(given.images, prompts, video=given.video)).components for prompts in (PROMPTS, PROMPTS[::-1]))
    for name in ("visual", "motion"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    assert (one["text"] - other["text"]).abs().max() > 1e-4


@pytest.mark.parametrize("stabilised", [False, True])
def test_published_updates_are_merged(tmp_path: Path, stabilised: bool) -> None:
    """As peft saves a model with updates, in the published folders, with other means and stds."""
    from peft import LoraConfig, get_peft_model

    model = tiny_models.qwen(tmp_path, 3)
    model.rm_head = torch.nn.Linear(32, 1, bias=False)
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=stabilised, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    (tmp_path / "checkpoint-11352").mkdir()
    torch.save(tuned.state_dict(), tmp_path / "checkpoint-11352" / "model.pth")
    moments = {f"{name}_{kind}": value for name in ("VQ", "MQ", "TA") for kind, value in (("mean", 0.0), ("std", 2.0))}
    settings = {"peft_lora_config": {"lora_r": 4, "lora_alpha": 6, "use_rslora": stabilised}, "inference_config": moments}
    (tmp_path / "model_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "checkpoint-11352" / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    output = VideoReward(str(tmp_path), base=str(tmp_path), dtype="fp32").score(batch())
    raw = official(tuned.eval().base_model.model.model, tmp_path, model.rm_head.weight.detach())
    for n, name in enumerate(MOMENTS):
        torch.testing.assert_close(output.components[name], raw[:, n] / 2, rtol=0, atol=0.02)
    (tmp_path / "model_config.json").unlink()
    with pytest.raises(UserError, match="lora_r and lora_alpha"):
        VideoReward(str(tmp_path), base=str(tmp_path))


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (81, 16.0, 10),  # 5.06 s × 2
        (16, 8.0, 4),
        (49, 8.0, 12),
        (5, 16.0, 4),
        (3, 16.0, 2),
        (1, 16.0, 1),
    ],
)
def test_frames_per_second(count: int, fps: float, expected: int) -> None:
    frames = chosen_frames(count, count / fps, 2.0)
    assert len(frames) == expected
    assert frames[0] == 0
    assert expected == 1 or frames[-1] == count - 1
    assert len(set(frames.tolist())) == expected


def test_metadata_says_how_fast_a_video_is(tmp_path: Path) -> None:
    reward, given = VideoReward(tiny_models.video_reward(tmp_path), dtype="fp32"), batch(32)
    plain = reward.score(given).scores
    slow = reward.score(RewardInput(given.images, PROMPTS, [{"fps": 4}, {}], video=given.video)).scores  # 16 frames are looked at, not 4
    assert (plain[0] - slow[0]).abs() > 1e-4
    torch.testing.assert_close(plain[1], slow[1], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="fps is 'fast'"):
        reward.score(RewardInput(given.images, PROMPTS, [{"fps": "fast"}, {}], video=given.video))
