"""Tensor preprocessing of every scorer against the official processors; Qwen2-VL's patches, sizes and gradients."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks import preprocessing
from visalign.errors import UserError
from visalign.qwen_pixels import QwenPixels
from visalign.rewards import hps3, image_reward, video_reward

SMALL = QwenPixels((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 56 * 56, 28 * 28 * 40)


def test_every_scorers_preprocessing_equals_the_official_one() -> None:
    table = preprocessing.measure(preprocessing.cases(14, seed=1))
    assert len(table) == 7
    for name, row in table.items():
        assert row["mean"] < preprocessing.BOUND, (name, row)
        assert row["max"] < 3 * preprocessing.BOUND, (name, row)


def test_the_measured_settings_are_the_rewards() -> None:
    assert (image_reward.PIXEL_MEAN, image_reward.PIXEL_STD) == (preprocessing.MEAN, preprocessing.STD)
    assert preprocessing.AREAS["hps3"] == (hps3.AREA, hps3.AREA)
    assert preprocessing.AREAS["video_reward"] == (video_reward.MIN_PIXELS, video_reward.MAX_PIXELS)


def test_sizes_equal_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    generator = torch.Generator().manual_seed(0)
    sides = [*torch.randint(3, 2000, (300, 2), generator=generator).tolist(), [28, 28], [14, 2800], [1, 150], [448, 448], [1024, 1024]]
    for least, most in ((56 * 56, 28 * 28 * 1280), (256 * 28 * 28, 256 * 28 * 28), (128 * 28 * 28, 256 * 28 * 28)):
        pixels = QwenPixels(SMALL.mean, SMALL.std, least, most)
        for height, width in sides:
            if max(height, width) <= 200 * min(height, width):
                assert pixels.scaled(height, width) == smart_resize(height, width, 28, least, most), (height, width)


def test_patches_of_unscaled_pictures_are_transformers_own() -> None:
    """Nothing is resized, so the two are equal to float32, patch by patch."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels})
    pixels = (torch.rand(2, 3, 84, 112, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    pictures = [Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()) for picture in pixels]
    official = processor(pictures, return_tensors="pt")
    rows, grid = QwenPixels.of(processor)(pixels)
    torch.testing.assert_close(rows, official.pixel_values, rtol=0, atol=1e-5)
    assert torch.equal(grid, official.image_grid_thw)
    assert QwenPixels.of(processor, 28 * 28, 56 * 56).scaled(84, 112) == (28, 56)


def test_videos_are_patched_by_pairs_of_frames() -> None:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels}
    processor = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    videos = torch.randint(0, 256, (2, 3, 3, 84, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    official = processor(videos=list(videos), return_tensors="pt")
    rows, grid = QwenPixels.of(processor)(videos / 255)
    torch.testing.assert_close(rows, official.pixel_values_videos, rtol=0, atol=1e-5)
    assert torch.equal(grid, official.video_grid_thw)
    assert grid.tolist() == [[2, 6, 4]] * 2


def test_a_picture_is_a_video_of_one_frame_twice() -> None:
    picture = torch.rand(1, 3, 60, 70)
    rows, grid = SMALL(picture)
    assert torch.equal(rows, SMALL(picture.unsqueeze(1).expand(1, 2, 3, 60, 70))[0])
    assert grid.tolist() == [[1, 4, 4]]


def test_gradients_reach_every_pixel() -> None:
    media = torch.rand(1, 3, 3, 60, 90, requires_grad=True)
    (gradient,) = torch.autograd.grad(SMALL(media)[0].square().sum(), media)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.99


def test_a_narrow_picture_is_a_user_error() -> None:
    with pytest.raises(UserError, match="2 × 600"):
        SMALL.scaled(2, 600)
