"""The verifier: right on fresh renders, zero on pictures of nothing, and a score that rises with the picture."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from visalign.errors import UserError
from visalign.rewards.toybox import Toybox
from visalign.scoring import RewardInput
from visalign.toybox import scenes
from visalign.toybox.perception import perceive
from visalign.toybox.scenes import Object

COUNT = 400


def picture(*objects: Object) -> Tensor:
    return torch.from_numpy(scenes.to_array(scenes.render(objects)).copy()).permute(2, 0, 1) / 255


def batch(images: Tensor, records: list[scenes.Metadata]) -> RewardInput:
    return RewardInput(images, [scenes.describe(record) for record in records], list(records))


def both(images: Tensor, records: list[scenes.Metadata]) -> tuple[Tensor, Tensor]:
    parts = Toybox().score(batch(images, records)).components
    return parts["strict"], parts["dense"]


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, list[scenes.Metadata], list[list[Object]]]:
    rng = random.Random(5)
    records = [rng.choice(scenes.prompts(n % 2 == 1)[scenes.KINDS[n // 2 % 6]]) for n in range(COUNT)]
    layouts = [scenes.lay_out(record, rng) for record in records]
    return torch.stack([picture(*layout) for layout in layouts]), records, layouts


def test_true_prompts_pass_and_altered_ones_do_not(world: tuple) -> None:
    images, records, layouts = world
    strict, dense = both(images, records)
    assert strict.mean() >= 0.995
    assert dense.mean() >= 0.99
    rng = random.Random(6)
    altered = [scenes.alter(record, rng)[1] for record in records]
    false = [n for n in range(COUNT) if not scenes.meets(layouts[n], altered[n])[0]]
    strict, dense = both(images[false], [altered[n] for n in false])
    assert strict.mean() <= 0.005
    assert dense.max() < 1


def test_soft_edges_and_faint_noise_pass(world: tuple) -> None:
    images, records, _ = world
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    soft = (gaussian_blur(images, [7, 7], [0.7, 0.7]) + 0.03 * noise).clamp(0, 1)
    assert both(soft, records)[0].mean() >= 0.97


def test_pictures_of_nothing_score_nothing(world: tuple) -> None:
    images, records, _ = world[0][:48], world[1][:48], None
    rng = torch.Generator().manual_seed(1)
    ground = (images - 128 / 255).abs().amax(1, keepdim=True) < 0.01
    block = torch.tensor([scenes.GROUND, *scenes.COLOURS.values()])[torch.randint(9, (48, 8, 8), generator=rng)] / 255
    nothing = {
        "blank": torch.full_like(images, 128 / 255),
        "white": torch.ones_like(images),
        "noise": torch.rand(images.shape, generator=rng),
        "normal noise": (0.5 + 0.2 * torch.randn(images.shape, generator=rng)).clamp(0, 1),
        "tiled": F.interpolate(images, (32, 32), mode="bilinear", antialias=True).repeat(1, 1, 2, 2),
        "palette blocks": F.interpolate(block.permute(0, 3, 1, 2), size=(64, 64), mode="nearest"),
        "many colours": F.interpolate(torch.rand(48, 3, 8, 8, generator=rng), (64, 64), mode="bicubic").clamp(0, 1),
        "orange ground": torch.where(ground, torch.tensor([0.9, 0.55, 0.2])[:, None, None], images),
        "dark ground": torch.where(ground, torch.tensor(0.2), images),
        "pale": 0.5 + 0.4 * (images - 0.5),
    }
    for name, pictures in nothing.items():
        strict, dense = both(pictures, records)
        assert strict.max() == 0, name
        assert dense.max() == 0, name


def test_orange_is_not_red() -> None:
    red = picture(Object("circle", "red", 32, 32, 14))
    orange = torch.where((red - 128 / 255).abs().amax(0) < 0.01, red, torch.tensor([0.95, 0.55, 0.1])[:, None, None])
    strict, dense = both(orange[None], [{"include": [{"class": "circle", "count": 1}]}])
    assert strict.item() == 0
    assert dense.item() == 0


def test_objects_are_found_where_they_are(world: tuple) -> None:
    images, _, layouts = world
    for found, layout in zip(perceive(images[:50]), layouts[:50], strict=True):
        assert len(found) == len(layout)
        for drawn in layout:
            nearest = min(found, key=lambda o: (o.x - drawn.x) ** 2 + (o.y - drawn.y) ** 2)
            assert (nearest.shape, nearest.colour) == (drawn.shape, drawn.colour)
            assert abs(nearest.x - drawn.x) + abs(nearest.y - drawn.y) < 1.5
            assert abs(nearest.radius - drawn.radius) < 0.1 * drawn.radius


def test_touching_objects_of_two_colours_are_two() -> None:
    found = perceive(picture(Object("square", "red", 20, 32, 12), Object("square", "blue", 20 + 19.2, 32, 12))[None])[0]
    assert sorted((o.shape, o.colour) for o in found) == [("square", "blue"), ("square", "red")]


def test_a_shape_between_two_shapes_is_unknown() -> None:
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing="ij")
    blob = (((x.abs() / 13) ** 3 + (y.abs() / 13) ** 3) < 1).float()  # half square, half circle
    image = 128 / 255 + blob * (torch.tensor([225, 35, 35])[:, None, None] / 255 - 128 / 255)
    assert [o.shape for o in perceive(image[None])[0]] == ["unknown"]
    assert both(image[None], [{"include": [{"class": "circle", "count": 1}]}])[0].item() == 0


def test_dense_rises_along_a_ladder_of_better_pictures() -> None:
    wish = {
        "include": [
            {"class": "star", "count": 1, "color": "red", "position": ["left of", 1]},
            {"class": "ring", "count": 1, "color": "blue"},
        ]
    }
    star, ring = Object("star", "red", 16, 32, 13), Object("ring", "blue", 48, 32, 13)
    sharp = picture(star, ring)
    rungs = [
        torch.full_like(sharp, 128 / 255),
        picture(Object("circle", "green", 48, 32, 13)),
        picture(star),
        gaussian_blur(sharp, [13, 13], [1.8, 1.8]),
        picture(star, replace(ring, colour="green")),
        picture(replace(star, x=48), replace(ring, x=16)),
        sharp,
    ]
    strict, dense = both(torch.stack(rungs), [wish] * len(rungs))
    assert dense.tolist() == sorted(dense.tolist())
    assert len(set(dense.tolist())) == len(rungs)
    assert dense[0] == 0
    assert dense[-1] > 0.98
    assert strict.tolist() == [0] * (len(rungs) - 1) + [1]


def test_haze_costs_more_and_more() -> None:
    sharp = picture(Object("circle", "red", 32, 32, 14))
    y, x = torch.meshgrid(torch.arange(64.0) - 32, torch.arange(64.0) - 32, indexing="ij")
    scores = []
    for reach in (0, 20, 22, 26):  # a halo around the circle
        halo = 0.25 * ((x.square() + y.square()).sqrt() < reach)
        hazy = torch.where((sharp - 128 / 255).abs().amax(0) < 0.01, sharp + halo * (sharp[:, 32, 32, None, None] - sharp), sharp)
        scores.append(both(hazy[None], [{"include": [{"class": "circle", "count": 1}]}]))
    dense = [d.item() for _, d in scores]
    assert dense == sorted(dense, reverse=True)
    assert [s.item() for s, _ in scores] == [1, 0, 0, 0]


def test_scores_do_not_depend_on_batch_order_or_size(world: tuple) -> None:
    images, records, _ = world
    images = (images[:70] + 0.05 * torch.randn(images[:70].shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    whole = both(images, records[:70])[1]
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    assert torch.equal(both(images[order], [records[n] for n in order])[1], whole[order])
    assert torch.allclose(torch.cat([both(images[n : n + 1], records[n : n + 1])[1] for n in range(10)]), whole[:10], atol=1e-5)


def test_records_come_from_the_prompt_when_there_is_no_metadata_and_nonsense_is_invalid() -> None:
    images = torch.stack([picture(Object("circle", "red", 32, 32, 14))] * 4)
    metadata = [{}, {}, {"include": [{"class": "dog", "count": 1}]}, {"include": [{"class": "ring", "count": 1}]}]
    output = Toybox("strict").score(RewardInput(images, ["a red circle", "a photo of a dog", "a red circle", "a red circle"], metadata))
    assert output.valid.tolist() == [True, False, False, True]
    assert output.scores[[0, 3]].tolist() == [1, 0]
    assert output.scores[[1, 2]].isnan().all()


def test_form_and_other_sizes(world: tuple) -> None:
    images, records, _ = world
    large = F.interpolate(images[:16], (192, 192), mode="bilinear", align_corners=False)
    output = Toybox(form="strict").score(batch(large, records[:16]))
    assert torch.equal(output.scores, output.components["strict"])
    assert output.scores.mean() > 0.9
    with pytest.raises(UserError, match="form"):
        Toybox(form="soft")  # type: ignore[arg-type]
