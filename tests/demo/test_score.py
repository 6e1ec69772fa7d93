"""The Score tab's handler: rankings, maps, and uploads that are refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image

from tests.demo.conftest import CLOSE, FLAKY
from visalign.demo import inputs, score
from visalign.demo.look import over
from visalign.demo.workshop import Workshop
from visalign.toybox.scenes import Object, render


@pytest.fixture(scope="module")
def toybox() -> Iterator[Workshop]:
    """The demo's own rewards."""
    made = Workshop(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One circle, the wrong colour, and what "two red circles" asks for, in another size; the names are files."""
    folder = tmp_path_factory.mktemp("scenes")
    right = [Object("circle", "red", 20, 20), Object("circle", "red", 44, 44)]
    render(right[:1]).save(folder / "one.png")
    render([right[0], Object("circle", "blue", 44, 44)]).save(folder / "blue.webp", lossless=True)
    render(right, size=640).save(folder / "right & proper.png")
    return [str(folder / name) for name in ("one.png", "blue.webp", "right & proper.png")]


def handled(workshop: Workshop, files: Any, prompt: Any = "two red circles", chosen: Any = ("toybox",), weight: float = 1.0) -> list[str]:
    return list(score.handler(workshop)(files, prompt, list(chosen), *(weight for _ in workshop.offered)))


def test_the_best_comes_first_with_a_bar_for_each_reward_and_its_map(toybox: Workshop, scenes: list[str]) -> None:
    first, *_, last = handled(toybox, scenes, chosen=["toybox", "clip_score", "dino", "condition"])
    assert "1 of 3 pictures" in first
    places = [last.index(f'title="{name}">') for name in ("right &amp; proper.png", "blue.webp", "one.png")]
    assert places == sorted(places)
    assert last.count('class="meter"') == 3 * 4
    assert last.count("<img") == 3 * 3, "each picture with the maps of dino and condition"
    assert "where it scores" in last
    assert last.count('class="sharp"') == 3 * 2, "small pictures are shown pixel by pixel, the large one is reduced"
    assert 'style="width:100.0%"' in last


def test_a_negative_weight_turns_the_order(toybox: Workshop, scenes: list[str]) -> None:
    *_, last = handled(toybox, scenes, weight=-1.0)
    assert last.index("one.png") < last.index("right &amp; proper.png")


def test_a_reward_without_a_score_is_said(toybox: Workshop, workshop: Workshop, scenes: list[str]) -> None:
    *_, last = handled(toybox, scenes, prompt="../../etc/passwd")
    assert "toybox: no score for any picture; try a prompt such as &#x27;two red circles&#x27;" in last
    *_, last = handled(workshop, scenes, chosen=[FLAKY, CLOSE])
    assert "HTTP 503: the judge" in last
    assert "NaN" not in last
    assert "nan" not in last


def test_a_prompt_is_needed_by_those_who_read_it_alone(toybox: Workshop, scenes: list[str]) -> None:
    assert "jpeg" in handled(toybox, scenes, prompt="", chosen=["jpeg"])[-1]
    with pytest.raises(gr.Error, match="clip_score reads the prompt"):
        handled(toybox, scenes, prompt=" ", chosen=["jpeg", "clip_score"])
    with pytest.raises(gr.Error, match="no reward is chosen"):
        handled(toybox, scenes, chosen=[])
    with pytest.raises(gr.Error, match="asks for nothing that the toybox can draw"):
        handled(toybox, scenes, prompt="<script>", chosen=["dino"])


def test_uploads_that_are_refused(workshop: Workshop, scenes: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = Path(scenes[0]).read_bytes()
    made = {"cut.png": whole[:150], "text.png": b"hello", "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none.gif": b""}
    made |= {"script.ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "<img src=x onerror=alert(1)>.png": b"no"}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (8000, 2001)).save(tmp_path / "huge.png")
    with (tmp_path / "heavy.png").open("wb") as file:
        file.truncate(inputs.MEGABYTES * 2**20 + 1)
    expected = dict.fromkeys(made, "can&#x27;t be read as a picture")
    expected |= {"huge.png": "is too large: 8000 × 2001, at most 16 megapixels", "heavy.png": "is larger than 20 MB"}
    for name, message in expected.items():
        with pytest.raises(gr.Error) as error:
            handled(workshop, [scenes[0], str(tmp_path / name)], chosen=["jpeg"])
        assert message in error.value.message
        assert str(tmp_path) not in error.value.message, "the server's folders are nobody's business"
        assert "<img" not in error.value.message
        assert not error.value.print_exception
    for files, message in (
        ([], "no pictures yet"),
        (None, "no pictures yet"),
        (scenes * 6, "18 pictures are too many; at most 16 at once"),
    ):
        with pytest.raises(gr.Error, match=message):
            handled(workshop, files, chosen=["jpeg"])
    assert not capfd.readouterr().err


def test_names_are_shown_as_text(workshop: Workshop, scenes: list[str], tmp_path: Path) -> None:
    file = tmp_path / "<b onclick=alert(1)>.png"
    shutil.copy(scenes[0], file)
    *_, last = handled(workshop, [str(file)], chosen=["jpeg"])
    assert "<b onclick" not in last
    assert "&lt;b onclick=alert(1)&gt;.png" in last


def test_a_map_is_bright_where_it_is_high() -> None:
    image = torch.full((3, 8, 8), 0.5)
    dense = torch.zeros(2, 2)
    dense[0, 0] = 1
    drawn = over(image, dense, 0.0, 1.0).mean(0)
    assert drawn.argmax() == 0
    assert drawn[0, 0] > 0.7
    assert drawn[-1, -1] < 0.3
    assert over(image, torch.ones(2, 2), 1.0, 1.0).isfinite().all()


@pytest.mark.parametrize(
    ("values", "promised", "span"),
    [
        ([0.2, 0.5], (0.0, 1.0), (0.0, 1.0)),
        ([0.2, 0.5], (-1.0, 1.0), (0.0, 1.0)),
        ([-0.2, 0.5], (-1.0, 1.0), (-0.2, 1.0)),
        ([-0.2, -0.5], (-1.0, 0.0), (-1.0, 0.0)),
        ([3.0, 7.0], (0.0, math.inf), (0.0, 7.0)),
        ([-3.0, -7.0], (-math.inf, math.inf), (-7.0, 0.0)),
        ([math.nan], (-math.inf, math.inf), (0.0, 0.0)),
    ],
)
def test_what_a_bars_ends_stand_for(values: list[float], promised: tuple[float, float], span: tuple[float, float]) -> None:
    assert score._span(values, promised) == span
