"""Condition consistency: equal maps score best, conditions from files, tensors and references, and every model's own map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.errors import UserError
from visalign.rewards.condition import Condition, _classes, colours, edges, soft_f1
from visalign.scoring import RewardInput
from visalign.toybox import scenes, styles


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """(4, 3, 64, 64): a scene and three others of its prompt."""
    return styles.drawn("a red star and a blue ring", {}, 4)


def tiny(folder: Path, task: str) -> str:
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
    )

    torch.manual_seed(0)
    if task == "depth":
        size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
        backbone = Dinov2Config(**size, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True, initializer_range=0.2)
        necks = {"neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_hidden_size": 16, "head_hidden_size": 8}
        model: Any = DepthAnythingForDepthEstimation(
            DepthAnythingConfig(backbone_config=backbone, patch_size=8, initializer_range=0.2, **necks)
        )
        model.head.conv3.bias.data.fill_(1.0)  # its last ReLU could be dead
    else:
        widths = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
        model = SegformerForSemanticSegmentation(SegformerConfig(**widths, num_labels=5))
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def scored(reward: Condition, images: torch.Tensor, conditions: list[Any]) -> Any:
    return reward.score(RewardInput(images, ["x"] * len(images), [{"condition": c} for c in conditions]))


@pytest.mark.parametrize("kind", ["edges", "colours", "depth", "segmentation"])
def test_the_condition_itself_scores_best(tmp_path: Path, pictures: torch.Tensor, kind: str) -> None:
    checkpoint = tiny(tmp_path, kind) if kind in ("depth", "segmentation") else None
    reward = Condition(kind, checkpoint)  # pyright: ignore[reportArgumentType]
    images = pictures.clone().requires_grad_()
    output = scored(reward, images, [pictures[0]] * 4)
    if kind != "segmentation":  # a random network is nowhere sure of a class
        assert output.scores.argmax() == 0
    if kind in ("edges", "depth"):
        best = 1.0 if kind == "edges" else 0.0
        assert output.scores[0].item() == pytest.approx(best, abs=1e-4)
        assert output.dense[0].abs().max() < 1e-3
    assert (output.dense <= 0).all()
    (slope,) = torch.autograd.grad(output.scores[1:].sum(), images)
    assert slope.isfinite().all()
    assert (slope[1:].flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["edges", "colours"])
def test_the_error_is_the_mean_of_its_map(pictures: torch.Tensor, kind: str) -> None:
    reward = Condition(kind, form="error")  # pyright: ignore[reportArgumentType]
    output = scored(reward, pictures, [pictures[0]] * 4)
    torch.testing.assert_close(output.scores, output.dense.mean((1, 2)))
    assert output.scores.argmax() == 0
    assert reward.spec.range == (-1.0, 0.0)


def test_colours_are_those_of_the_world(pictures: torch.Tensor) -> None:
    shares = colours(pictures).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(4, 64, 64))
    found = shares.argmax(1)
    assert (found == len(scenes.COLOURS)).float().mean() > 0.7  # ground
    assert {0, 2} <= set(found.unique().tolist())  # red and blue
    output = scored(Condition("colours"), pictures, [pictures[0]] * 4)
    assert output.scores[0] > 0.6
    assert output.scores[0] > 1.5 * output.scores[1:].max()
    assert output.components["cross_entropy"].argmin() == 0


def test_classes_overlap_softly() -> None:
    shares = torch.tensor([[0.8, 0.6, 0.1], [0.1, 0.3, 0.7], [0.1, 0.1, 0.2]])[None, :, None]  # (1, 3 classes, 1, 3 places)
    output = _classes(shares.log(), torch.tensor([[[0, 1, 255]]]))
    first, second = (
        0.8 / (0.8 + 1 + 0.6 - 0.8),
        0.3 / (0.1 + 0.3 + 1 - 0.3),
    )  # the third place doesn't count, the third class isn't asked for
    torch.testing.assert_close(output.scores, torch.tensor([(first + second) / 2]))
    assert output.dense is not None
    torch.testing.assert_close(output.dense, torch.tensor([[[-0.2, -0.7, 0.0]]]))
    torch.testing.assert_close(output.components["cross_entropy"], -torch.tensor([[0.8, 0.3]]).log().mean(1))


def test_edges_and_their_agreement() -> None:
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1
    found = edges(half)[0, 0]
    slope = 0.5  # Sobel over a step of one, per pixel
    expected = slope**2 / (slope**2 + 0.01)
    torch.testing.assert_close(found[:, 3:5], torch.full((8, 2), expected))
    assert found[:, :3].abs().max() == 0
    a = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(soft_f1(a.expand(2, -1), b), torch.tensor([0.5, 0.0]), atol=1e-5, rtol=0)
    assert soft_f1(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 1  # nothing asked, nothing there


def test_conditions_from_files_references_and_maps(tmp_path: Path, pictures: torch.Tensor) -> None:
    array = (pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "scene.png")
    reward = Condition("colours", references="toybox")
    by_tensor = scored(reward, pictures, [pictures[0]] * 4).scores
    torch.testing.assert_close(scored(reward, pictures, [str(tmp_path / "scene.png")] * 4).scores, by_tensor)
    prompts = ["a red star and a blue ring"] * 4
    torch.testing.assert_close(reward.score(RewardInput(pictures, prompts)).scores, by_tensor)  # the bank's first is the first drawn
    classes = colours(pictures[:1]).argmax(1)
    given = Condition("colours", given="map")
    torch.testing.assert_close(scored(given, pictures, [classes[0]] * 4).scores, by_tensor)
    Image.fromarray(classes[0].numpy().astype(np.uint8)).save(tmp_path / "classes.png")
    torch.testing.assert_close(scored(given, pictures, [str(tmp_path / "classes.png")] * 4).scores, by_tensor)
    partly = classes[0].clone()
    partly[:, 32:] = 255
    changed = pictures.clone()
    changed[..., 32:] = 0.3
    torch.testing.assert_close(scored(given, changed, [partly] * 4).scores, scored(given, pictures, [partly] * 4).scores)
    drawn = Condition("edges", given="map")
    torch.testing.assert_close(scored(drawn, pictures[:1], [edges(pictures[:1])[0]]).scores, torch.ones(1))


def test_errors(tmp_path: Path, pictures: torch.Tensor) -> None:
    with pytest.raises(UserError, match="condition has no reference pictures"):
        Condition().score(RewardInput(pictures, ["x"] * 4))
    with pytest.raises(UserError, match=r"a map needs given: map"):
        scored(Condition(), pictures[:1], [torch.zeros(64, 64)])
    with pytest.raises(UserError, match="class 40, but there are 9"):
        scored(Condition("colours", given="map"), pictures[:1], [torch.full((64, 64), 40)])
    with pytest.raises(UserError, match="no such file"):
        scored(Condition(), pictures[:1], [str(tmp_path / "missing.png")])
