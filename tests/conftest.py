"""Fixtures that several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models


def save_tiny_sd3(folder: Path) -> Path:
    """A StableDiffusion3Pipeline of the toybox's classes, untrained."""
    from visalign.toybox.build_sd3 import assemble, small_vae

    torch.manual_seed(0)
    assemble(small_vae()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusion3Pipeline, untrained."""
    return save_tiny_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline, untrained."""
    return tiny_models.sd15(tmp_path_factory.mktemp("models") / "sd15")


def save_tiny_vlm(folder: Path) -> str:
    """A vision-language model of the toybox's classes, untrained."""
    from visalign.toybox.build_vlm import Size, processor, small_vlm

    torch.manual_seed(0)
    small_vlm(Size(32, 1, 2, 32, 2, 1, 1)).save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def tiny_dino(folder: Path) -> str:
    """A Dinov2Model of 64 patches with random weights, and its processor."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    Dinov2Model(Dinov2Config(**size, initializer_range=0.2)).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random DINOv2."""
    return tiny_dino(tmp_path_factory.mktemp("dino"))
