"""Files in and out without a surprise; sheets hold every picture and word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from visalign import pictures
from visalign.errors import UserError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    paths = pictures.save(images, tmp_path / "new", ["a", "b"])
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert torch.equal(torch.stack([pictures.load(path) for path in paths]), images)
    assert [path.name for path in pictures.save(images, tmp_path)] == ["0000.png", "0001.png"]


def test_values_outside_are_cut_and_rounded() -> None:
    image = torch.tensor([-1.0, 0.5, 2.0, float("nan")]).view(1, 1, 4).expand(3, 1, 4)
    assert np.asarray(pictures.to_image(image))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_transparency_sixteen_bits_palettes_and_rotation(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pictures.load(tmp_path / "clear.png").eq(1).all()
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert pictures.load(tmp_path / "deep.png").eq(100 / 255).all()
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert pictures.load(tmp_path / "palette.png").shape == (3, 4, 4)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=turned)
    assert pictures.load(tmp_path / "turned.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png can't be read as a picture"):
        pictures.load(tmp_path / "a.png")


def test_cut_off_missing_folder_oversized_files_and_other_formats(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"part\.png can't be read"):
        pictures.load(tmp_path / "part.png")
    with pytest.raises(UserError, match="no such file"):
        pictures.load(tmp_path / "none.png")
    with pytest.raises(UserError, match="can't be read"):
        pictures.load(tmp_path)
    with pytest.raises(UserError, match=r"too large: 64 × 64, at most 0\.001 megapixels"):
        pictures.load(tmp_path / "whole.png", most=1000)
    with pytest.raises(UserError, match="expected JPEG, WEBP"):
        pictures.load(tmp_path / "whole.png", formats=("JPEG", "WEBP"))


def shades(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """(count, 3, height, width) flat pictures, each its own red."""
    return torch.stack([torch.tensor([(n + 1) / 20, 0.2, 0.6]).view(3, 1, 1).expand(3, height, width) for n in range(count)])


def reds(sheet: Image.Image) -> list[int]:
    """Red values of flat areas with our blue, by reading order."""
    array = np.asarray(sheet).astype(int)
    flat = (array[..., 1] == 51) & (array[..., 2] == 153)
    return [int(value) for value in np.unique(array[..., 0][flat])]


def test_grid_holds_every_picture_once() -> None:
    sheet = pictures.grid(shades(5), 3, ["one", "two words", "", "four", "a caption that is far too long for one line " * 5])
    assert reds(sheet) == [round((n + 1) / 20 * 255) for n in range(5)]
    assert sheet.width > 3 * 128
    assert pictures.grid(shades(2), 8).width < 3 * 200  # no empty columns


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 64), (64, 96), (700, 500)])
def test_before_after_keeps_the_aspect_and_a_readable_size(height: int, width: int) -> None:
    sheet = pictures.before_after(shades(1, height, width), shades(2, height, width)[1:], ["a ring"])
    array = np.asarray(sheet).astype(int)
    area = (array[..., 0] == round(255 / 20)) & (array[..., 1] == 51)
    down, across = area.any(1).sum(), area.any(0).sum()
    assert 128 <= max(down, across) <= 256
    assert down / across == pytest.approx(height / width, rel=0.03)


def test_marks_and_missing_prompts() -> None:
    before, after = shades(3), shades(6)[3:]
    plain = pictures.before_after(before, after, ["a", "b", "c"])
    marked = pictures.before_after(before, after, ["a", "b", "c"], [(False, True)] * 3)
    assert plain.size == marked.size
    colours = {colour for _, colour in marked.getcolors(1 << 20) or []} - {colour for _, colour in plain.getcolors(1 << 20) or []}
    assert {pictures.GOOD, pictures.BAD} <= colours


def test_captions_wrap_at_words_and_end_in_an_ellipsis() -> None:
    font = ImageFont.load_default(pictures.TEXT)
    assert pictures._wrap("a red\nring", font, 160) == ["a red ring"]
    lines = pictures._wrap("two red circles and a green square " * 4, font, 160)
    assert len(lines) == pictures.LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 160 for line in lines)
    (cut,) = pictures._wrap("x" * 200, font, 160)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 160
    assert pictures._wrap("", font, 160) == []


def test_a_video_is_an_animated_file_whose_every_frame_comes_back(tmp_path: Path) -> None:
    videos = torch.randint(0, 256, (2, 4, 3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    videos[1, 1:] = videos[1, 0]  # one that stands still
    paths = pictures.save(videos, tmp_path)
    assert [path.suffix for path in paths] == [".png", ".png"]
    assert torch.equal(pictures.shown(paths), videos)
    assert torch.equal(pictures.load(paths[0]), videos[0, 0]), "as a picture, its first frame"
    with Image.open(paths[0]) as file:
        assert round(file.info["duration"]) == round(1000 / pictures.FPS)
    still = pictures.save(videos[:, 0], tmp_path / "still")
    assert torch.equal(pictures.shown(still), videos[:, 0])


def test_a_sheet_of_videos_is_strips_of_their_first_to_last_frames() -> None:
    videos = torch.zeros(3, 9, 3, 40, 40)
    videos[:, -1] = 1
    strip = pictures.strips(videos)
    assert strip.shape == (3, 3, 40, 5 * 40)
    assert strip[..., :40].eq(0).all()
    assert strip[..., -40:].eq(1).all()
    sheet = pictures.before_after(videos, 1 - videos, ["a", "b", "c"], columns=6)
    assert sheet.width > 5 * pictures.CELL[0], "frames are as large as pictures are, and cells fewer"
    assert pictures.grid(videos, 8, ["a", "b", "c"]).height > 3 * pictures.CELL[0] / 2
