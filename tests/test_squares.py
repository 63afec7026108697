"""One image file to a square: every format and mode comes out as bright, as upright and as opaque as its file says."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from reference_trainer.data import squares
from reference_trainer.data.squares import (
    black_and_white,
    cause,
    extensions,
    formats,
    open_square,
    resized,
    to_rgb,
    transparent_colour,
)


def read_square(file: Path, resolution: int = 8) -> np.ndarray:
    square = open_square(file)
    assert square is not None
    return resized(square, resolution)


def grey_16(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def png(bits: int, colours: int, row: bytes, transparent: bytes = b"") -> bytes:
    """An 8x8 PNG of equal rows, as Pillow does not write it: few bits, or 16 bits a colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 8, 8, bits, colours, 0, 0, 0))
    alpha = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + alpha + chunk(b"IDAT", zlib.compress(8 * (b"\0" + row))) + chunk(b"IEND", b"")


YCBCR = pytest.param(
    "YCbCr",
    marks=pytest.mark.xfail(
        int(PIL.__version__.split(".")[0]) < 13, reason="Pillow below 13 cannot read the TIFF it wrote"
    ),
)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", YCBCR, "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (100, 37), (16, 16)])
def test_every_mode_and_size_becomes_an_rgb_square(mode: str, size: tuple[int, int], tmp_path: Path):
    file = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr", "I;16") else "x.png")
    Image.new(mode, size).save(file)
    assert read_square(file, 16).shape == (16, 16, 3)


def test_the_largest_centred_square_is_cut_out(tmp_path: Path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200  # the centre; black left and right must vanish
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert (read_square(tmp_path / "x.png") == 200).all()


def transparent_palette() -> Image.Image:
    image = Image.new("P", (8, 8), 3)
    image.info["transparency"] = 3
    return image


def transparent(image: Image.Image) -> Image.Image:
    """``image``, all of it: before Pillow 12 a conversion to PA loses the alpha."""
    image.putalpha(0)
    return image


RED, BLUE = (255, 0, 0), (0, 0, 255)
BRIGHTNESS = {
    "1": (Image.new("1", (8, 8), 1), 255),
    "L": (Image.new("L", (8, 8), 100), 100),
    "LA": (Image.new("LA", (8, 8), (100, 255)), 100),
    "LA, half transparent": (Image.new("LA", (8, 8), (55, 128)), 155),
    "La": (Image.new("La", (8, 8), (50, 128)), 177),
    "RGB": (Image.new("RGB", (8, 8), RED), RED),
    "RGBX": (Image.new("RGBX", (8, 8), (*BLUE, 7)), BLUE),
    "RGBA": (Image.new("RGBA", (8, 8), (*BLUE, 255)), BLUE),
    "RGBA, transparent": (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 255),
    "RGBa": (Image.new("RGBa", (8, 8), (0, 0, 0, 0)), 255),
    "P": (Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE), RED),
    "P, with a transparent entry": (transparent_palette(), 255),
    "PA": (transparent(Image.new("RGB", (8, 8), RED).convert("PA")), 255),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
    "YCbCr": (Image.new("YCbCr", (8, 8), (100, 128, 128)), 100),
    "HSV": (Image.new("HSV", (8, 8), (170, 255, 255)), BLUE),
    "LAB, middle grey": (Image.new("LAB", (8, 8), (128, 128, 128)), 119),  # L* = 50
    "LAB, white": (Image.new("LAB", (8, 8), (255, 128, 128)), 255),
}


@pytest.mark.parametrize("name", BRIGHTNESS)
def test_a_mode_keeps_its_brightness_and_colour(name: str):
    image, expected = BRIGHTNESS[name]
    square = np.asarray(to_rgb(image, black_and_white(image))).astype(int)
    assert square.shape == (8, 8, 3)
    assert np.abs(square - expected).max() <= 1


@pytest.mark.parametrize("extension", ["png", "tif", "jp2", "pgm"])
@pytest.mark.parametrize("grey", [0, 1, 100, 255])
def test_sixteen_bits_are_scaled_by_the_format_not_by_what_the_image_contains(
    extension: str, grey: int, tmp_path: Path
):
    """257 is one step of 8 bits: the frame of the value 1 holds nothing above 257, and yet it is dark."""
    grey_16(257 * grey).save(tmp_path / f"x.{extension}")
    assert (read_square(tmp_path / f"x.{extension}") == grey).all()


@pytest.mark.parametrize(("mode", "compression"), [("I;16", None), ("I;16", "tiff_lzw"), ("I;16B", None)])
def test_sixteen_bits_of_either_byte_order(mode: str, compression: str | None, tmp_path: Path):
    image = Image.new(mode, (8, 8), 257 * 3)
    image.save(tmp_path / "x.tif", compression=compression)
    assert (read_square(tmp_path / "x.tif") == 3).all()


def test_sixteen_bits_may_count_from_white(tmp_path: Path):
    grey_16(257 * 55).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert (read_square(tmp_path / "x.tif") == 200).all()


def test_twelve_bits_reach_white_at_4095(tmp_path: Path):
    row = bytes([0xFF, 0xF0, 0x00]) * 4  # white, black, ...
    entries = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8), (279, 96)]
    head = b"II*\0" + struct.pack("<LH", 8, len(entries))
    fields = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in entries)
    (tmp_path / "x.tif").write_bytes(head + fields + struct.pack("<L", 0) + 8 * row)
    assert read_square(tmp_path / "x.tif")[0, ::2].min() == 255
    assert read_square(tmp_path / "x.tif")[0, 1::2].max() == 0


def test_older_pillow_gives_mode_i_for_a_png_of_16_bits():
    image = Image.new("I", (8, 8), 257 * 9)
    image.format = "PNG"
    assert (np.asarray(to_rgb(image, black_and_white(image))) == 9).all()


def test_sixteen_bits_a_colour(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(png(16, 2, struct.pack(">HHH", 257 * 10, 257 * 200, 257 * 30) * 8))
    assert (read_square(tmp_path / "x.png") == (10, 200, 30)).all()


@pytest.mark.parametrize(
    "content",
    [
        png(8, 2, bytes([1, 2, 3]) * 8, struct.pack(">HHH", 1, 2, 3)),
        png(16, 2, struct.pack(">HHH", 1000, 2000, 3000) * 8, struct.pack(">HHH", 1000, 2000, 3000)),
        png(16, 0, struct.pack(">H", 300) * 8, struct.pack(">H", 300)),
        png(8, 0, bytes([7]) * 8, struct.pack(">H", 7)),
        png(4, 0, b"\x55" * 4, struct.pack(">H", 5)),
        png(2, 0, b"\x55" * 2, struct.pack(">H", 1)),
        png(1, 0, b"\0", struct.pack(">H", 0)),
    ],
    ids=["RGB of 8 bits", "RGB of 16", "grey of 16", "grey of 8", "grey of 4", "grey of 2", "grey of 1"],
)
def test_a_png_may_name_one_transparent_colour(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.png").write_bytes(content)
    assert (read_square(tmp_path / "x.png") == 255).all()
    monkeypatch.setattr(squares, "transparent_colour", with_plain_tiles)
    assert (read_square(tmp_path / "x.png") == 255).all()


def with_plain_tiles(opened: Any) -> Any:
    """As Pillow below 11 has them."""
    tiles = [tuple(tile) for tile in opened.tile]
    return transparent_colour(SimpleNamespace(info=opened.info, format=opened.format, tile=tiles))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("x.tif", Image.new("F", (8, 8), 0.5)),
        ("x.pfm", Image.new("F", (8, 8), 0.5)),
        ("x.tif", Image.new("I", (8, 8), 70000)),
    ],
)
def test_pictures_without_a_known_white_are_refused(name: str, image: Image.Image, tmp_path: Path):
    image.save(tmp_path / name)
    with pytest.raises(ValueError, match="no fixed black and white: save it with 8 or 16 bits"):
        open_square(tmp_path / name)


def test_the_inks_of_a_jpeg_are_not_turned_round(tmp_path: Path):
    """Adobe writes CMYK as 255 minus the ink."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_square(tmp_path / "x.jpg").astype(int) - RED).max() < 8


def test_signed_16_bits_are_refused(tmp_path: Path):
    grey_16(500).save(tmp_path / "x.tif", tiffinfo={339: 2})
    with pytest.raises(ValueError, match="signed"):
        open_square(tmp_path / "x.tif")


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    fields = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + fields + struct.pack("<L", 0)


UPSIDE_DOWN = (0x0112, 3, 1, struct.pack("<HH", 3, 0))
BESIDE_BROKEN_TAGS = {
    "alone": exif(UPSIDE_DOWN),
    "resolution is text": exif(UPSIDE_DOWN, (0x011A, 2, 4, b"abc\0")),  # TypeError in ImageOps.exif_transpose
    "text is a float": exif(UPSIDE_DOWN, (0x9999, 12, 1, b"\1\2\3\4")),
    "unit is bytes": exif(UPSIDE_DOWN, (0x0128, 2, 4, b"\xff\xfe\xfd\0")),  # struct.error there
    "a folder of tags outside of the file": exif(UPSIDE_DOWN, (0x8769, 4, 1, struct.pack("<L", 99999))),
}
BROKEN = {
    "orientation is text": exif((0x0112, 2, 4, b"abc\0")),
    "orientation 9": exif((0x0112, 3, 1, struct.pack("<HH", 9, 0))),
    "orientation 0/0": exif((0x0112, 5, 1, struct.pack("<L", 8))),
    "no EXIF at all": b"\x99" * 40,
    "cut short": exif(UPSIDE_DOWN)[:14],
}


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", [*BESIDE_BROKEN_TAGS, *BROKEN])
def test_exif_rotation_is_applied_and_broken_exif_loses_neither_it_nor_the_picture(
    name: str, extension: str, tmp_path: Path
):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255  # white above; orientation 3 turns it upside down
    content = BESIDE_BROKEN_TAGS.get(name) or BROKEN[name]
    file = tmp_path / f"x.{extension}"
    Image.fromarray(picture).save(file, exif=b"Exif\0\0" + content if extension == "jpg" else content)
    square = read_square(file, 16)
    above, below = (0, 255) if name in BESIDE_BROKEN_TAGS else (255, 0)
    assert np.abs(square[0].astype(int) - above).max() < 8
    assert np.abs(square[-1].astype(int) - below).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_those_of_pillow(orientation: int, tmp_path: Path):
    from PIL import ImageOps

    about = Image.Exif()
    about[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png", exif=about)
    with Image.open(tmp_path / "x.png") as opened:
        np.testing.assert_array_equal(read_square(tmp_path / "x.png"), np.asarray(ImageOps.exif_transpose(opened)))


def test_a_tiff_with_a_broken_tag_is_turned_once(tmp_path: Path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112], tags[0x8769] = 3, 99999
    tags.tagtype[0x0112], tags.tagtype[0x8769] = 3, 4
    picture.save(tmp_path / "x.tif", tiffinfo=tags)
    np.testing.assert_array_equal(read_square(tmp_path / "x.tif"), np.asarray(picture)[::-1, ::-1])


@pytest.mark.parametrize("extension", ["gif", "tif", "webp", "png"])
def test_the_first_frame_counts(extension: str, tmp_path: Path):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    options = {"lossless": True} if extension == "webp" else {}
    first.save(tmp_path / f"x.{extension}", save_all=True, append_images=[second], **options)
    assert (read_square(tmp_path / f"x.{extension}") == RED).all()


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a regular file"):
        open_square(tmp_path / "x.png")


def test_programs_are_not_run_whatever_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import EpsImagePlugin

    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("ran a program"))
    with pytest.raises(Exception, match="cannot identify"):
        open_square(tmp_path / "x.png")
    assert "EPS" not in formats()
    assert ".eps" not in extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".gif"} <= extensions()


def test_a_cause_is_a_few_words_in_one_line(tmp_path: Path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(OSError) as caught:
        open_square(tmp_path / "x.png")
    assert cause(caught.value) == "no image, or of a kind Pillow cannot read"
    with pytest.raises(OSError) as missing:
        open_square(tmp_path / "y.png")
    assert cause(missing.value) == "No such file or directory"  # the path is said beside it
    assert cause(MemoryError()) == "MemoryError"
    assert cause(ValueError("one\ntwo")) == r"one\ntwo"
    assert len(cause(ValueError(1000 * "x"))) == 120
