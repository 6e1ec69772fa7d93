"""Fixtures that several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import tiny_models

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # the suite's processes share the machine
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in several processes where xdist is there; named files in one, as every process has to wait for its imports."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole and not workers and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = min(4, os.cpu_count() or 1), "worksteal"


def save_tiny_sd3(folder: Path, narrow: bool = False) -> Path:
    """A StableDiffusion3Pipeline of the toybox's classes, untrained; narrow: a third of the time per forward."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from visalign.toybox.build_sd3 import assemble, small_transformer, small_vae

    torch.manual_seed(0)
    pipeline = assemble(small_vae())
    if narrow:
        sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
        pipeline.register_modules(transformer=SD3Transformer2DModel.from_config({**small_transformer().config, **sizes}))
    pipeline.save_pretrained(folder)
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
