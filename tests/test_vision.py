"""Vision encoders: features equal to the models' own, layers, registers, sharing, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from visalign.errors import UserError
from visalign.preprocess import Preprocess
from visalign.vision import Pixels, VisionEncoder, load_map_predictor, load_vision_encoder

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "initializer_range": 0.2}
NARROW = {"intermediate_size": 32}


def siglip() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE, **NARROW, image_size=32))


def both_towers() -> Any:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, **NARROW}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SIZE | NARROW | {"image_size": 32}))


MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, image_size=32)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZE, image_size=32)),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZE, **NARROW, image_size=32, num_register_tokens=2)),
    "siglip": siglip,
    "clip": both_towers,
}
PROCESSOR = {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    transformers.BitImageProcessor(size={"shortest_edge": 32}, **PROCESSOR).save_pretrained(folder)
    return str(folder)


def unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_models_own(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    encoder = load_vision_encoder(saved(tmp_path, model))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    seen = encoder.encode(images)
    assert (tuple(seen.image.shape), tuple(seen.patches.shape), seen.grid) == ((2, 24), (2, 16, 24), (4, 4))
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        output = tower((images - 0.5) / 0.5, output_hidden_states=True)
    torch.testing.assert_close(seen.image, unit(output.pooler_output))
    last = tower.post_layernorm(output.last_hidden_state) if name == "clip" else output.last_hidden_state
    torch.testing.assert_close(seen.patches, unit(last[:, -16:]))
    assert torch.autograd.grad(seen.patches[0, 0, 0], images)[0].abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder.encode(images).image, seen.image)
    assert not encoder.train().training
    inner = encoder.encode(images, (2, -1)).patches
    norm = next(getattr(tower, n) for n in ("layernorm", "norm", "post_layernorm") if hasattr(tower, n))
    expected = torch.cat([unit(norm(output.hidden_states[2])[:, -16:]), unit(last[:, -16:])], -1)
    torch.testing.assert_close(inner, unit(expected))
    larger = VisionEncoder(encoder.checkpoint, 48).encode(images)
    assert (larger.grid, tuple(larger.patches.shape)) == ((6, 6), (2, 36, 24))


def test_a_patch_is_where_it_is(tmp_path: Path) -> None:
    encoder = load_vision_encoder(saved(tmp_path, MODELS["dinov2"]()))
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1, :, 8:16, 24:32] = 1.0  # row 1, column 3
    features = encoder.model.embeddings(images)
    changed = (features[0] - features[1]).abs().sum(-1)[1:].unflatten(0, encoder.grid)
    assert changed.nonzero().tolist() == [[1, 3]]


def test_loaded_twice_is_one_and_a_resolution_is_another(dino: str) -> None:
    first = load_vision_encoder(dino)
    assert load_vision_encoder(dino) is first
    assert load_vision_encoder(dino, 96) is not first


@pytest.mark.parametrize("size", [(301, 200), (64, 300)])
def test_scaling_and_cropping_are_two_sizes(size: tuple[int, int]) -> None:
    """DINOv2 scales to 256 and cuts 224; EfficientNet (ALIGN) stretches to 346, cuts 289 and rescales to [-1, 1]."""
    pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
    smooth = F.interpolate(pixels[None].float(), scale_factor=0.1).clamp(0, 255)
    image = F.interpolate(smooth, size, mode="bilinear").round()[0].byte()
    for official in (
        transformers.BitImageProcessor(size={"shortest_edge": 256}),
        transformers.EfficientNetImageProcessor(
            do_center_crop=True, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False, resample=2
        ),
    ):
        ours = Preprocess.of(official)(image[None].float() / 255)[0]
        theirs = official(image, return_tensors="pt").pixel_values[0]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean() < 0.01


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no part nothing"):
        load_vision_encoder("toybox/nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty.*vision transformer"):
        load_vision_encoder(str(empty))
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(UserError, match="vision transformer"):
        load_vision_encoder(saved(tmp_path / "bert", bert))
    with pytest.raises(UserError, match="model for depth"):
        load_map_predictor(str(empty), "depth")


def test_pixels_are_windows_and_a_thumbnail() -> None:
    images = torch.rand(2, 3, 32, 32)
    seen = Pixels().encode(images)
    assert (tuple(seen.image.shape), tuple(seen.patches.shape), seen.grid) == ((2, 192), (2, 16, 192), (4, 4))
    window = seen.patches[1, 6].view(3, 8, 8) * 192**0.5  # row 1, column 2
    torch.testing.assert_close((window + 1) / 2, images[1, :, 8:16, 16:24])
    flat = Pixels(16).encode(torch.full((1, 3, 64, 64), 0.75))
    torch.testing.assert_close(flat.patches, torch.full((1, 4, 192), 0.5 / 192**0.5))
    torch.testing.assert_close(flat.image.norm(), torch.tensor(0.5))
    with pytest.raises(UserError, match="windows of 8; 20 is no multiple"):
        Pixels(20)
