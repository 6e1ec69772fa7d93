"""VideoReward: a Qwen2-VL-2B that rates a video's visual quality, its motion and how it follows its prompt, one number each.

Differs from the published code (VideoAlign): tensors instead of files, with gradients to the frames; frames are chosen as there. Visual
quality and motion are rated before the prompt is read, so these two don't depend on it. The instruction of the training is data of the
authors and is read from a file; see `template`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.qwen_reader import Precision, QwenReader, converted, harmless, load_template
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.weights import fetch, read_weights

DIMENSIONS = ("visual", "motion", "text")
TOKENS = {"visual": "<|VQ_reward|>", "motion": "<|MQ_reward|>", "text": "<|TA_reward|>"}
MOMENTS = {"visual": (3.6757, 2.2476), "motion": (1.1646, 1.3811), "text": (2.8105, 2.5121)}  # published mean and std of the raw ratings
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame after scaling
LEAST, MOST = 4, 768  # frames that are looked at
TEMPLATE = f"""
Watch the generated video and give three independent ratings from 0 (worst) to 10 (best).

Visual quality: errors, sharpness, detail, beauty and safety of the single frames. Rating: {TOKENS["visual"]}

Motion quality: stability, physical plausibility, smoothness, clean edges and amount of movement. Rating: {TOKENS["motion"]}

Text alignment: whether subjects, movement, surroundings, style and camera are those of the following text.
Text - {{prompt}}
Rating: {TOKENS["text"]}
"""


def chosen_frames(count: int, seconds: float, fps: float) -> Tensor:
    """(K,) int64, evenly spaced indices into `count` frames: `fps` a second, an even number of at least 4 and at most all of them."""
    wanted = min(max(seconds * fps, LEAST), min(MOST, count) // 2 * 2)
    return torch.linspace(0, count - 1, min(max(round(wanted / 2) * 2, 1), count)).round().long()


def head(width: int) -> nn.Module:
    """State to one rating; the same for the three tokens."""
    return nn.Linear(width, 1, bias=False)


def published_config(checkpoint: str, path: Path) -> dict[str, Any]:
    """The training's `model_config.json`, which lies beside the weights or one folder above; empty where a local checkpoint has none."""
    name = "model_config.json"
    found = next((folder / name for folder in path.parents[:2] if (folder / name).is_file()), None)
    if found is None and not Path(checkpoint).expanduser().exists():
        found = fetch(checkpoint, name)
    return json.loads(found.read_text(encoding="utf-8")) if found else {}


def moments(config: dict[str, float]) -> list[tuple[float, float]]:
    """(mean, std) of the raw ratings, by dimension."""
    named = zip(("VQ", "MQ", "TA"), MOMENTS.values(), strict=True)
    return [(config.get(f"{name}_mean", mean), config.get(f"{name}_std", std)) for name, (mean, std) in named]


def update_scale(config: dict[str, Any]) -> float | None:
    """alpha / rank of low-rank updates, or alpha / √rank where they are rank-stabilised; None where nothing says it."""
    rank = config.get("lora_r")
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank) if rank else None


class VideoReward(Reward):
    """Ratings of a video, differentiable (Liu et al. 2025, arXiv 2501.13918, section 3).

    Each raw rating is z-scored with the published mean and std. Components, (N,) each: `visual`, `motion`, `text` and their sum, `overall`.

    Args:
        checkpoint: the default hub id; a folder or a file with the weights (`model.safetensors`, or the published `model.pth`, whose
            low-rank updates are merged on loading; the folder's `model_config.json` gives their scale, and mean and std of the ratings).
        base: config, tokenizer and picture processor, a folder or hub id; None means the checkpoint's folder if it has a config.json, or
            else the published one.
        dimension: which component is the score.
        fps: frames looked at per second of video.
        video_fps: frames per second of the videos, where `metadata["fps"]` doesn't say it.
        template: a text file with the instruction, `{prompt}` and the three special tokens once each; None means `template.txt` beside the
            weights. Without either the instruction is in our own words, with a warning, and scores are not the published ones.
        dtype: of the frozen backbone; the head computes in float32.

    Raises:
        UserError: a checkpoint, base or template that cannot be loaded or doesn't fit.
    """

    spec = RewardSpec(
        name="video_reward",
        modality="video",
        differentiable=True,
        needs=frozenset({"prompt", "video"}),
        licence="Apache-2.0",
        model_id="KwaiVGI/VideoReward",
    )
    base_id = "Qwen/Qwen2-VL-2B-Instruct"

    def __init__(
        self,
        checkpoint: str = spec.model_id,
        base: str | None = None,
        dimension: Literal["overall", "visual", "motion", "text"] = "overall",
        fps: Annotated[float, Field(gt=0)] = 2.0,
        video_fps: Annotated[float, Field(gt=0)] = 16.0,
        template: str | None = None,
        dtype: Precision = "bf16",
    ):
        path = fetch(checkpoint, "model.safetensors", "checkpoint-11352/model.pth", "model.pth")
        base = base or (str(path.parent) if path.with_name("config.json").is_file() else self.base_id)
        self.template = load_template(template, path.parent, TEMPLATE, ("{prompt}", *TOKENS.values()), "video_reward")
        self.dimension, self.fps, self.video_fps = dimension, fps, video_fps
        published = published_config(checkpoint, path)
        self.moments = torch.tensor(moments(published.get("inference_config") or {}))
        weights = converted(read_weights(path), update_scale(published.get("peft_lora_config") or {}))
        where = f"video_reward's checkpoint {checkpoint!r}"
        self.reader = QwenReader(base, weights, list(TOKENS.values()), head, MIN_PIXELS, MAX_PIXELS, dtype, where)

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32, about -3 to 3 for a single dimension."""
        assert batch.video is not None
        count = batch.video.shape[1]
        chosen = [chosen_frames(count, count / self._fps(metadata), self.fps) for metadata in batch.metadata]
        videos = [video[at.to(video.device)] for video, at in zip(batch.video, chosen, strict=True)]
        texts = [self.template.replace("{prompt}", harmless(prompt)) for prompt in batch.prompts]
        raw = self.reader(videos, texts)[..., 0]
        mean, std = self.moments.to(raw.device).unbind(-1)
        ratings = dict[str, Tensor](zip(DIMENSIONS, ((raw - mean) / std).unbind(-1), strict=True))
        ratings["overall"] = torch.stack(list(ratings.values())).sum(0)
        return RewardOutput.of(ratings[self.dimension], components=ratings)

    def _fps(self, metadata: dict[str, Any]) -> float:
        fps = metadata.get("fps", self.video_fps)
        if not (isinstance(fps, int | float) and fps > 0):
            raise UserError(f"video_reward: metadata fps is {fps!r}, expected frames per second above 0")
        return float(fps)
