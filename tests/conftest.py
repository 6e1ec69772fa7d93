"""Fixtures that several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusion3Pipeline of the toybox's classes, untrained."""
    from visalign.toybox.build_sd3 import assemble, small_vae

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd3"
    assemble(small_vae()).save_pretrained(folder)
    return folder


def save_tiny_vlm(folder: Path) -> str:
    """A vision-language model of the toybox's classes, untrained."""
    from visalign.toybox.build_vlm import Size, processor, small_vlm

    torch.manual_seed(0)
    small_vlm(Size(32, 1, 2, 32, 2, 1, 1)).save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")
