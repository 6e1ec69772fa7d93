"""Frozen encoders: preprocessing against the official transforms, both libraries against each other, caches and errors."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visalign import features
from visalign.errors import UserError
from visalign.features import OpenClipEncoder, TransformersEncoder, load_dual_encoder, locate
from visalign.preprocess import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(512, 512), (64, 64), (224, 224), (512, 768), (301, 200), (227, 500)]  # up, down, unchanged; odd margins
TEXTS = ["a red star", "two blue circles", "a green ring left of a cross"]


def picture(height: int, width: int) -> tuple[Image.Image, Tensor]:
    """A picture with slopes, edges and noise, as PIL and as (1, 3, H, W) in [0, 1]."""
    random = np.random.default_rng(height * width)
    slopes = np.cumsum(np.cumsum(random.normal(size=(height, width, 3)), 0), 1)
    slopes = (slopes - slopes.min()) / (slopes.max() - slopes.min())
    slopes[height // 3 : height // 2, width // 4 :] = (0.9, 0.1, 0.1)
    pixels = (np.clip(slopes + 0.05 * random.normal(size=slopes.shape), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255


@pytest.fixture(scope="module")
def folder() -> str:
    return locate("toybox")


@pytest.fixture(scope="module")
def encoders(folder: str) -> tuple[OpenClipEncoder, TransformersEncoder]:
    return OpenClipEncoder(f"local-dir:{folder}"), TransformersEncoder(folder, folder)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "aspect"), [("shortest", "crop"), ("longest", "letterbox"), ("squash", "stretch")])
def test_preprocess_equals_open_clips(size: tuple[int, int], mode: str, aspect: features.Aspect) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image, tensor = picture(*size)
    official = image_transform_v2(PreprocessCfg(resize_mode=mode), is_train=False)(image)
    assert isinstance(official, Tensor)
    difference = (Preprocess((224, 224), MEAN, STD)(tensor, aspect)[0] - official).abs()
    # PIL rounds to 8 bits after each of its two passes: 1/255/std = 0.015. Where widths grow and heights shrink, Pillow 13 takes heights
    # first, which clips a few edge pixels differently.
    assert difference.max() < (0.1 if aspect == "stretch" else 0.02)
    assert difference.mean() < 0.006


@pytest.mark.parametrize("size", SIZES)
def test_preprocess_equals_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    image, tensor = picture(*size)
    official = CLIPImageProcessor()(image, return_tensors="pt").pixel_values[0]
    difference = (Preprocess((224, 224), MEAN, STD, rounds=False)(tensor)[0] - official).abs()
    assert difference.max() < 0.02
    assert difference.mean() < 0.006


@pytest.mark.parametrize("aspect", ["crop", "letterbox", "stretch"])
def test_preprocess_is_differentiable_and_fills_its_size(aspect: features.Aspect) -> None:
    images = torch.rand(2, 3, 30, 47, requires_grad=True)
    pixels = Preprocess((24, 20), MEAN, STD)(images, aspect)
    assert tuple(pixels.shape) == (2, 3, 24, 20)
    (gradient,) = torch.autograd.grad(pixels.square().sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_score_equals_the_official_path(encoders: tuple[OpenClipEncoder, TransformersEncoder]) -> None:
    import open_clip
    from transformers import CLIPModel, CLIPProcessor

    ours = encoders[0]
    name = ours.checkpoint
    model, transform = open_clip.create_model_from_pretrained(name)
    processor = CLIPProcessor.from_pretrained(name.removeprefix("local-dir:"))
    other = CLIPModel.from_pretrained(name.removeprefix("local-dir:"))
    text = ours.encode_texts(TEXTS)
    for size in ((64, 64), (256, 256), (96, 160)):
        image, tensor = picture(*size)
        with torch.no_grad():
            first = model.encode_image(transform(image).unsqueeze(0), normalize=True) @ text.T
            inputs = processor(text=TEXTS, images=image, padding="max_length", return_tensors="pt")
            second = other(**inputs).logits_per_image / other.logit_scale.exp()
        mine = ours.encode_images(tensor) @ text.T
        assert (mine - first).abs().max() < 3e-3, size
        assert (mine - second).abs().max() < 3e-3, size


def test_both_libraries_give_one_embedding(encoders: tuple[OpenClipEncoder, TransformersEncoder]) -> None:
    first, second = encoders
    images = torch.cat([picture(64, 64)[1], picture(64, 64)[1].flip(-1)])
    torch.testing.assert_close(first.encode_images(images), second.encode_images(images), rtol=0, atol=1e-4)
    torch.testing.assert_close(first.encode_texts(TEXTS), second.encode_texts(TEXTS), rtol=0, atol=1e-4)
    assert first.logit_scale == second.logit_scale
    assert first.context == second.context
    assert torch.equal(first._token_ids(TEXTS), second._token_ids(TEXTS))  # open_clip's own tokenizer would give other numbers
    assert int(first._token_ids(TEXTS).max()) == first.tokenizer.tokenizer.eos_token_id
    assert first.encode_images(images).norm(dim=-1).sub(1).abs().max() < 1e-5


def test_the_toyboxs_recipe_saves_a_folder_for_both(tmp_path: Path) -> None:
    from visalign.toybox import build_clip

    tokenizer = build_clip.clip_tokenizer()
    build_clip.save(build_clip.small_clip(tokenizer).eval(), tokenizer, tmp_path)
    first, second = OpenClipEncoder(f"local-dir:{tmp_path}"), TransformersEncoder(str(tmp_path), str(tmp_path))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(first.encode_images(images), second.encode_images(images), rtol=0, atol=1e-4)
    torch.testing.assert_close(first.encode_texts(TEXTS), second.encode_texts(TEXTS), rtol=0, atol=1e-4)


def test_false_negatives_are_told_from_near_misses() -> None:
    from visalign.toybox.build_clip import code, compatible, near_misses
    from visalign.toybox.scenes import describe, parse

    def both(a: str, b: str) -> bool:
        first, second = parse(a), parse(b)
        assert first
        assert second
        return bool(compatible(torch.tensor(code(first)), torch.tensor(code(second))))

    assert both("a star", "a red star")
    assert both("a star and a ring", "a ring above a star")
    assert both("a ring left of a star", "a star right of a ring")
    assert both("a red star and a blue ring", "a blue ring and a red star")
    assert not both("a ring left of a star", "a star left of a ring")
    assert not both("a red star and a blue ring", "a blue star and a red ring")
    assert not both("a star", "two stars")
    record = parse("a red star and a blue ring")
    assert record
    wrong = near_misses(record, random.Random(0))
    assert len(wrong) == 4
    assert describe(record) not in wrong


def test_autocast_of_the_caller_changes_nothing(encoders: tuple[OpenClipEncoder, TransformersEncoder]) -> None:
    images = picture(64, 64)[1]
    for encoder in encoders:
        alone = encoder.encode_images(images), encoder.encode_texts(TEXTS)
        encoder.to(torch.float32)  # drops the cached texts
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder.encode_images(images), alone[0])
            assert torch.equal(encoder.encode_texts(TEXTS), alone[1])


def test_frozen_and_in_evaluation_mode(encoders: tuple[OpenClipEncoder, TransformersEncoder]) -> None:
    for encoder in encoders:
        assert not encoder.train().training
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_texts_are_encoded_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = OpenClipEncoder(f"local-dir:{folder}")
    seen: list[str] = []
    plain = encoder._text_features
    monkeypatch.setattr(encoder, "_text_features", lambda ids: seen.append(str(len(ids))) or plain(ids))
    first = encoder.encode_texts(["a ring", "a star", "a ring"])
    assert torch.equal(first[0], first[2])
    assert torch.equal(encoder.encode_texts(["a star"])[0], first[1])
    assert seen == ["2"]
    encoder.to(torch.float32)  # moving drops the cache
    encoder.encode_texts(["a star"])
    assert seen == ["2", "1"]


def test_the_text_cache_is_bounded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CACHED_TEXTS", 2)
    encoder = OpenClipEncoder(f"local-dir:{folder}")
    assert len(encoder.encode_texts(TEXTS)) == 3
    assert list(encoder._texts) == TEXTS[1:]


def test_long_texts_are_reported(folder: str, encoders: tuple[OpenClipEncoder, TransformersEncoder]) -> None:
    for encoder in encoders:
        with pytest.warns(UserWarning, match=r"2 of 3 texts are longer than the 14 tokens"):
            encoder.encode_texts(["a ring", "a ring and " * 8 + "a star", "a star and " * 9 + "a ring"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.encode_texts(["a purple triangle and a yellow square"])


def test_loaded_twice_is_one(folder: str) -> None:
    first = load_dual_encoder("toybox")
    assert load_dual_encoder("toybox/clip") is first
    assert load_dual_encoder(folder) is first
    assert load_dual_encoder(f"local-dir:{folder}") is first


def test_siglip(tmp_path: Path, folder: str) -> None:
    from transformers import CLIPTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = tower | {"vocab_size": 200, "max_position_embeddings": 16}, tower | {"image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    encoder = load_dual_encoder(str(tmp_path))
    assert (encoder.preprocess.aspect, encoder.preprocess.size, encoder.context) == ("stretch", (32, 32), 16)
    assert encoder.encode_images(picture(40, 60)[1]).shape == encoder.encode_texts(["a ring"]).shape


def broken(folder: str, target: Path, keep: str) -> Path:
    """A copy of the toybox's CLIP with only one library's files."""
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    shutil.copytree(folder, target, ignore=lambda _, files: [f for f in files if (f in names) != (keep == "open_clip") and "model" in f])
    if keep == "transformers":
        (target / "open_clip_config.json").unlink()
    return target


def test_a_broken_checkpoint_is_a_user_error(tmp_path: Path, folder: str) -> None:
    mute = broken(folder, tmp_path / "mute", "open_clip")
    (mute / "open_clip_model.safetensors").unlink()
    torn = broken(folder, tmp_path / "torn", "open_clip")
    (torn / "open_clip_config.json").write_text("{")
    short = broken(folder, tmp_path / "short", "transformers")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("open_clip*"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1  # a layer without weights would be a random one
    (other / "config.json").write_text(json.dumps(config))
    for path in (mute, torn, short, empty, other):
        with pytest.raises(UserError, match=path.name) as caught:
            load_dual_encoder(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoint", ["/nowhere/at/all", "./nowhere", "local-dir:nowhere", "toybox/nothing"])
def test_a_missing_folder_is_a_user_error(checkpoint: str) -> None:
    with pytest.raises(UserError, match=r"nowhere|nothing"):
        load_dual_encoder(checkpoint)
