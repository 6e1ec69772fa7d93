"""GenEval: its rules on hand-made detections, and the two models end to end with tiny random weights."""

import json
import math
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from visalign.errors import UserError
from visalign.rewards.geneval import CLASSES, Box, Detection, GenEval, check_metadata, dense, instances, official, relations, select
from visalign.scoring import RewardInput


def thing(label: str, left: float = 0, top: float = 0, size: float = 20, score: float = 0.95, color: str | None = None) -> Detection:
    return Detection(label, score, (left, top, left + size, top + size), color=color)


def asked(*include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"include": list(include), "exclude": exclude or []}


CAT = {"class": "cat", "count": 1}
DOG = {"class": "dog", "count": 1}
RED_CAT = CAT | {"color": "red"}
BLUE_DOG = DOG | {"color": "blue"}
DOG_LEFT = DOG | {"position": ["left of", 0]}
THREE_CATS = asked({"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
CATS = [thing("cat", 30 * n) for n in range(9)]


@pytest.mark.parametrize(
    ("detections", "metadata", "official_score", "dense_score", "strict"),
    [
        # one object, two objects
        ([thing("cat")], asked(CAT), True, 1, True),
        ([thing("dog")], asked(CAT), False, 0, False),
        (CATS[:2], asked(CAT), True, 0, False),  # official: at least one; the dense credit counts
        ([thing("cat"), thing("dog")], asked(CAT, DOG), True, 1, True),
        ([thing("cat")], asked(CAT, DOG), False, 0.5, False),
        # counting: exclude makes the official score exact
        (CATS[:3], THREE_CATS, True, 1, True),
        (CATS[:2], THREE_CATS, False, 2 / 3, False),
        (CATS[:4], THREE_CATS, False, 2 / 3, False),
        (CATS[:9], THREE_CATS, False, 0, False),  # never negative
        # another class excluded: the dense credit doesn't see it
        ([thing("cat"), thing("dog")], asked(CAT, exclude=[DOG]), False, 1, False),
        # colours
        ([thing("cat", color="red")], asked(RED_CAT), True, 1, True),
        ([thing("cat", color="blue")], asked(RED_CAT), False, 0.5, False),
        ([], asked(RED_CAT), False, 0, False),
        ([thing("cat", color="red"), thing("cat", 40, score=0.4)], asked(RED_CAT), True, 0, False),
        ([thing("cat", color="red", score=0.4), thing("cat", 40, color="blue")], asked(RED_CAT), False, 0, False),  # the surest counts
        ([thing("cat", color=c) for c in ("red", "red", "blue")], asked(RED_CAT | {"count": 3}), False, (1 + 2 / 3) / 2, False),
        ([thing("cat", color="red"), thing("dog", color="blue")], asked(RED_CAT, BLUE_DOG), True, 1, True),
        ([thing("cat", color="blue"), thing("dog", color="red")], asked(RED_CAT, BLUE_DOG), False, 0.5, False),
        # positions: parts are count, count, position
        ([thing("cat", 100), thing("dog", 0)], asked(CAT, DOG_LEFT), True, 1, True),
        ([thing("cat", 0), thing("dog", 100)], asked(CAT, DOG_LEFT), False, 2 / 3, False),  # no half credit for a failed position
        ([thing("cat", 100)], asked(CAT, DOG_LEFT), False, 1 / 3, False),
        ([thing("dog", 0)], asked(CAT, DOG_LEFT), False, 1 / 3, False),  # nothing to be left of
        ([thing("cat", 100), thing("cat", 200, score=0.5), thing("dog", 0)], asked(CAT, DOG_LEFT), True, 1 / 3, False),
        ([thing("cat", 100), thing("cat", -90), thing("dog", 0)], asked(CAT | {"count": 2}, DOG_LEFT), False, 2 / 3, False),
        ([thing("cat", 100, color="red"), thing("dog", 0)], asked(RED_CAT, DOG_LEFT), True, 1, True),
        ([thing("cat", 100, color="pink"), thing("dog", 0)], asked(RED_CAT, DOG_LEFT), False, 0.5, False),
    ],
)
def test_rules(detections: list[Detection], metadata: dict[str, Any], official_score: bool, dense_score: float, strict: bool) -> None:
    for order in (detections, detections[::-1]):
        assert official(order, metadata) is official_score
        credit, right = dense(order, metadata)
        assert credit == pytest.approx(dense_score)
        assert right is strict


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 50, 20, 70), {"left of"}),
        ((100, 50, 120, 70), {"right of"}),
        ((50, 0, 70, 20), {"above"}),
        ((50, 100, 70, 120), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((50, 50, 70, 70), set()),
        ((54, 50, 74, 70), set()),  # centres 4 px apart: exactly the margin 0.1 * (20 + 20)
        ((57, 50, 77, 70), set()),  # 7 px: (7 - 4) / 7 < 0.5
        ((59, 50, 79, 70), {"right of"}),  # 9 px: (9 - 4) / 9 > 0.5
        ((100, 75, 120, 95), {"right of"}),  # dy: (25 - 4) / |(50, 25)| = 0.38
    ],
)
def test_relations(box: Box, expected: set[str]) -> None:
    assert relations(box, (50, 50, 70, 70)) == expected


def test_relations_need_a_margin() -> None:
    assert relations((54, 50, 74, 70), (50, 50, 70, 70), margin=0) == {"right of"}


def test_select() -> None:
    cats = [thing("cat", score=0.31 + 0.01 * n) for n in range(20)]
    kept = select([*cats, thing("dog", score=0.3), thing("cow", score=0.9)], 0.3)
    assert [d.label for d in kept] == ["cow"] + ["cat"] * 16
    assert [d.score for d in kept[1:]] == sorted((d.score for d in cats), reverse=True)[:16]


@pytest.mark.parametrize(
    "clause",
    [
        {"class": "dragon", "count": 1},
        {"class": "cat"},
        {"class": "cat", "count": 0},
        CAT | {"color": "teal"},
        CAT | {"position": ["left of", 1]},
        CAT | {"position": ["near", 0]},
        CAT | {"position": ["left of"]},
    ],
)
def test_impossible_metadata(clause: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="clause 1 has"):
        check_metadata(asked(DOG, clause))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_models(tmp_path_factory.mktemp("geneval"))


def tiny_models(folder: Path) -> dict[str, str]:
    """Random tiny detector and CLIP under `folder`; keyword arguments for GenEval."""
    import transformers

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    config = transformers.Mask2FormerConfig(backbone_config=swin, **sizes, **layers, num_labels=len(CLASSES))
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.save_pretrained(folder / "detector")
    transformers.Mask2FormerImageProcessor(num_labels=len(CLASSES)).save_pretrained(folder / "detector")
    letters = [chr(n) for n in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[]).save_pretrained(folder / "clip")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "clip")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(words) - 1
    text = layers | {"vocab_size": len(words), "max_position_embeddings": 77, "eos_token_id": end, "bos_token_id": end - 1}
    vision = layers | {"image_size": 32, "patch_size": 8}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    return {"checkpoint": str(folder / "detector"), "color_checkpoint": str(folder / "clip")}


def pictures(count: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.manual_seed(1))


def rectangle(size: int, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Mask logits of a filled rectangle."""
    logits = torch.full((size, size), -20.0)
    logits[top:bottom, left:right] = 20.0
    return logits


def test_instances_agree_with_transformers() -> None:
    from transformers import Mask2FormerImageProcessor

    torch.manual_seed(0)
    classes, masks = torch.randn(5, len(CLASSES) + 1) * 4, torch.randn(5, 8, 8) * 3
    found = instances(classes, masks, (384, 384), 0.3)
    output = SimpleNamespace(class_queries_logits=classes.unsqueeze(0), masks_queries_logits=masks.unsqueeze(0))
    reference = Mask2FormerImageProcessor().post_process_instance_segmentation(output, threshold=0.3, return_binary_maps=True)[0]
    assert len(found) == len(reference["segments_info"]) > 1
    expected = {
        (CLASSES[s["label_id"]], s["score"]): mask for s, mask in zip(reference["segments_info"], reference["segmentation"], strict=True)
    }
    for detection in found:
        (mask,) = [mask for (label, score), mask in expected.items() if label == detection.label and abs(score - detection.score) < 1e-5]
        assert torch.equal(detection.mask, mask.bool())


def test_instances_boxes_in_pixels_of_the_picture() -> None:
    classes = torch.zeros(2, len(CLASSES) + 1)
    classes[0, CLASSES.index("dog")] = 20
    classes[1, -1] = 20  # no object
    (dog,) = instances(classes, torch.stack([rectangle(16, 4, 8, 12, 16), rectangle(16, 0, 0, 8, 8)]), (160, 320), 0.3)
    assert dog.label == "dog"
    assert dog.score > 0.9
    assert dog.box == pytest.approx((80, 80, 240, 160), abs=2)
    assert instances(classes, torch.full((2, 16, 16), -5.0), (160, 320), 0.3) == []  # an empty mask is no object


def test_score_end_to_end(folders: dict[str, str]) -> None:
    reward = GenEval(**folders, short_side=64, confidence=1e-4, counting_confidence=1e-4)
    found = reward.detect((pictures(2) * 255).to(torch.uint8))
    assert [len(f) > 0 for f in found] == [True, True]
    assert all(d.mask is not None and d.mask.shape == (64, 96) and 0 <= d.box[0] < d.box[2] <= 96 for d in found[0])
    label = select(found[0], 1e-4)[0].label
    records = [asked({"class": label, "count": 1, "color": "red"}), {}]
    output = reward.score(RewardInput(pictures(2), ["p"] * 2, records))
    assert output.valid.tolist() == [True, False]
    assert output.scores.dtype == torch.float32
    assert set(output.components) == {"official", "strict", "dense"}
    for scores in output.components.values():
        assert torch.equal(scores.isfinite(), output.valid)
    assert 0 <= output.scores[0] <= 1


def stub(reward: GenEval, monkeypatch: pytest.MonkeyPatch, detections: list[Detection], colors: list[str]) -> None:
    monkeypatch.setattr(reward, "detect", lambda images: [detections for _ in images])
    monkeypatch.setattr(reward, "colors", lambda picture, objects: colors[: len(objects)])


@pytest.mark.parametrize(("form", "expected"), [("official", 1), ("strict", 0), ("dense", 0.5)])
def test_forms(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, form: Any, expected: float) -> None:
    reward = GenEval(**folders, form=form)
    stub(reward, monkeypatch, [thing("cat"), thing("dog"), thing("dog", 40)], [])
    output = reward.score(RewardInput(pictures(1), ["p"], [asked(CAT, DOG)]))
    assert output.scores.tolist() == [expected]


def test_tag_sets_the_confidence(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = GenEval(**folders)
    stub(reward, monkeypatch, [thing("cat", score=0.5)], [])
    records = [asked(CAT) | {"tag": tag} for tag in ("single_object", "counting")]
    assert reward.score(RewardInput(pictures(2), ["p"] * 2, records)).scores.tolist() == [1, 0]


def test_only_wanted_objects_get_a_color(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = GenEval(**folders, form="official")
    stub(reward, monkeypatch, [thing("cat", score=0.8), thing("cat", 40, score=0.9), thing("dog")], ["red"])
    records = [asked(RED_CAT), asked(RED_CAT, BLUE_DOG), asked(BLUE_DOG)]
    assert reward.score(RewardInput(pictures(3), ["p"] * 3, records)).scores.tolist() == [1, 0, 0]


def test_colors_see_the_object_alone(folders: dict[str, str]) -> None:
    """What lies outside of the mask doesn't matter, what lies inside does."""
    reward = GenEval(**folders)
    picture = (pictures(1)[0] * 255).to(torch.uint8)
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[10:30, 10:50] = True
    seen: list[Tensor] = []
    processor = reward.color_processor

    def record(images: list[Tensor], return_tensors: str) -> Any:
        seen.extend(images)
        return processor(images=images, return_tensors=return_tensors)

    reward.color_processor = record
    (color,) = reward.colors(picture, [Detection("cat", 0.9, (5, 5, 60, 40), mask)])
    assert color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    (crop,) = seen
    inside = mask[5:40, 5:60]
    assert crop.shape == (3, 35, 55)
    assert (crop[:, ~inside] == 153).all()
    assert torch.equal(crop[:, inside], picture[:, mask])


def test_preparing_changes_nothing_and_finds_errors_early(folders: dict[str, str]) -> None:
    record = asked(RED_CAT) | {"prompt": "a red cat"}
    plain, prepared = GenEval(**folders), GenEval(**folders)
    prepared.prepare(["a red cat", "nothing"], [record, {}])
    assert torch.equal(plain._color_features("cat"), prepared._color_features("cat"))
    assert plain._color_features("cat").norm(dim=-1) == pytest.approx(torch.ones(10))
    with pytest.raises(UserError, match="'a unicorn'"):
        plain.prepare(["a unicorn"], [asked({"class": "unicorn", "count": 1}) | {"prompt": "a unicorn"}])


def test_broken_picture_is_invalid(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = GenEval(**folders)
    stub(reward, monkeypatch, [], [])
    images = pictures(2)
    images[0, 0, 0, 0] = math.nan
    output = reward.score(RewardInput(images, ["p"] * 2, [asked(CAT)] * 2))
    assert output.valid.tolist() == [False, True]
    assert output.scores[1] == 0


def test_construction_errors(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="form is 'loose'"):
        GenEval(**folders, form="loose")
    with pytest.raises(UserError, match="no AutoImageProcessor from"):
        GenEval(checkpoint=str(tmp_path))


@pytest.mark.parametrize("name", ["geneval_train.jsonl", "geneval_test.jsonl"])
def test_our_prompts_can_be_verified(name: str) -> None:
    lines = files("visalign.assets").joinpath("prompts", name).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    irregular = {"person": "people", "knife": "knives", "computer mouse": "computer mice"}
    for record in records:
        check_metadata(record)
        names = [clause["class"] for clause in record["include"]]
        assert all(name in record["prompt"] or irregular.get(name, "?") in record["prompt"] for name in names)
    assert {record["tag"] for record in records} == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert len({record["prompt"] for record in records}) == len(records)
