"""One image file of any format and mode to an RGB square: upright, on white, as bright as the file says."""

from __future__ import annotations

import os
import stat
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from reference_trainer.errors import printable
from reference_trainer.plotting import OWN_PICTURE

NO_PIXELS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that Pillow recognises and cannot read by itself. EPS is a program: Ghostscript would run it."""

SIXTEEN_BITS = frozenset({("PNG", "I"), ("PPM", "I"), *((name, "I;16") for name in ("PNG", "TIFF", "JPEG2000"))})
"""Formats and modes (without the byte order) in which Pillow gives unsigned integers that fill 16 bits.

PNG has mode I in older versions of Pillow. FITS, MCIDAS, IM and TIFF in mode I have signs, an offset or 32 bits.
"""

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF

ORIENTATION = 274  # tag of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an orientation; the standard numbers them from 1 (upright)."""


@cache
def formats() -> tuple[str, ...]:
    """The formats that are tried on a file, whatever its name."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PIXELS)


@cache
def extensions() -> frozenset[str]:
    """How names of images end, in lower case with the dot."""
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats())


def resized(square: Image.Image, resolution: int) -> np.ndarray:
    """uint8 RGB ``[resolution, resolution, 3]``."""
    return np.array(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


def open_square(file: Path | BinaryIO) -> Image.Image | None:
    """The largest centred square of the first frame, RGB, upright, transparency on white; None if the trainer drew it.

    Args:
        file: or what is in it, in memory.

    Raises:
        Exception: whatever the decoder thinks fit; ``cause`` puts it in words.
    """
    if not (_size_of(file) if isinstance(file, Path) else file.seek(0, os.SEEK_END)):
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags nobody asks for, in the middle of the progress bar
        with Image.open(file, formats=formats()) as opened:
            if opened.info.get("Software") == OWN_PICTURE["Software"]:
                return None
            levels = black_and_white(opened)
            transparent = transparent_colour(opened)
            opened.load()
            image = upright(opened)
        if transparent is not None:
            image.info["transparency"] = transparent
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cut before resizing: a resize with a box would let pixels from outside it bleed in.
        return to_rgb(image.crop((left, top, left + side, top + side)), levels)


def _size_of(file: Path) -> int:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for somebody to write
        raise ValueError("not a regular file")
    return found.st_size


def black_and_white(opened: Image.Image) -> tuple[int, int]:
    """The values that are black and white: by what the format says, not by what the image contains.

    For an image not yet loaded (Pillow forgets the rest), in a mode of more than 8 bits; (0, 255) for all others.

    Raises:
        ValueError: no one can tell.
    """
    if opened.mode == "F":
        raise ValueError("32-bit floats have no fixed black and white: save it with 8 or 16 bits a channel")
    if not opened.mode.startswith("I"):
        return 0, 255
    tags = getattr(opened, "tag_v2", {})
    if (opened.format, opened.mode[:4]) not in SIXTEEN_BITS:
        raise ValueError(
            "integers that are signed or of 32 bits have no fixed black and white: save it with 8 or 16 bits a channel"
        )
    white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1  # TIFF has 12 bits too
    return (white, 0) if tags.get(PHOTOMETRIC) == 0 else (0, white)


def transparent_colour(opened: ImageFile.ImageFile) -> Any:
    """The colour or palette entries that are transparent, as the loaded image counts; None: nothing of the kind.

    PNG counts as many bits as the file has, and Pillow takes that over, but loads 2, 4 and 3 x 16 bits as 8.
    """
    colour = opened.info.get("transparency")
    depth = opened.tile[0][3] if opened.format == "PNG" and opened.tile else None  # .args of a tuple since Pillow 11
    if depth in ("L;2", "L;4") and isinstance(colour, int):
        white = 3 if depth == "L;2" else 15
        return colour * 255 // white if colour <= white else colour
    if depth == "RGB;16B" and isinstance(colour, tuple) and max(colour) > 255:
        return tuple(value >> 8 for value in colour)  # the low bytes are lost to Pillow
    return colour


def upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Only the one tag is read: a broken one beside it, or none at all, leaves the image whole."""
    turn = None
    with suppress(Exception):
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, levels: tuple[int, int]) -> Image.Image:
    """Any mode to RGB, transparency laid on white; ``levels`` from ``black_and_white``."""
    if image.mode.startswith("I"):  # Pillow would cut all above 255
        return _grey_to_rgb(image, levels)
    if image.mode in ("La", "RGBa"):  # colours times alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, levels: tuple[int, int]) -> Image.Image:
    black, white = levels
    values = np.asarray(image, dtype=np.float64)
    grey = np.round((values - black) * 255 / (white - black)).clip(0, 255)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def cause(error: Exception) -> str:
    """Why a file could not be read: a few words in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a kind Pillow cannot read"
    words = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return printable(words if len(words) <= 120 else f"{words[:117]}...")
