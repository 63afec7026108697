"""A natural image set without a download: patches of the photographs that scikit-image and scikit-learn ship.

Axes: pixels uint8 [ch, h, w] of a photograph, [n, ch, 32, 32] of patches. A *factor* says how much smaller a photograph
was made before a patch was cut, so that a patch of it covers a square of ``32 * factor`` pixels of the photograph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from reference_trainer.data.images import ImageSet
from reference_trainer.errors import UserError
from robustcm.checks import need_real, need_seed, need_whole
from robustcm.randomness import Stream, counter_generator, uniform

SIDE = 32
"""Pixels of a patch."""
FACTORS = (1, 2, 4)
"""By which a photograph is made smaller: at 1 a patch is texture and edges, at 4 half a face."""
HELD_OUT = 0.4
"""Of the height and of the width of a photograph: the corner that is never trained on, a sixth of its area."""


@dataclass(frozen=True)
class Photograph:
    """A file that a package ships, known by its hash: another file is another data set."""

    name: str
    package: str
    """Its import name."""
    file: str
    """Below the package."""
    digest: str
    """First 16 hexadecimal digits of the SHA-256 of the file."""
    terms: str
    """Under which it may be used, as the package states them."""

    def read(self) -> Tensor:
        """uint8 ``[3, h, w]``.

        Raises:
            UserError: the package or the file is not there, or it is another file.
        """
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the photographs lie in {self.package}, which is not installed: pip install {self.package}, or in a "
                "clone the extra natural, pip install -e '.[natural]'"
            )
        path = Path(spec.submodule_search_locations[0]) / self.file
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest()[:16] != self.digest:
            raise UserError(
                f"{self.package} has {'another' if content else 'no'} {self.file} than the photographs are cut from: "
                "install the version that the extra natural in pyproject.toml names"
            )
        with Image.open(path) as opened:
            return rearrange(torch.from_numpy(np.array(opened.convert("RGB"))), "h w ch -> ch h w")


SKIMAGE, SKLEARN = "skimage", "sklearn"
PHOTOGRAPHS = (
    Photograph("astronaut", SKIMAGE, "data/astronaut.png", "88431cd9653ccd53", "NASA, public domain"),
    Photograph("cat", SKIMAGE, "data/chelsea.png", "596aa1e7cb875eb7", "Stefan van der Walt, CC0"),
    Photograph("coffee", SKIMAGE, "data/coffee.png", "cc02f8ca188b167c", "Rachel Michetti, CC0"),
    Photograph("rocket", SKIMAGE, "data/rocket.jpg", "c2dd0de7c538df8d", "SpaceX, public domain"),
    Photograph("temple", SKLEARN, "datasets/images/china.jpg", "8378025ad2519d64", "danielbuechele, CC BY 2.0"),
    Photograph("flower", SKLEARN, "datasets/images/flower.jpg", "a77f6ec41e353afd", "vultilion, CC BY 2.0"),
)
"""All colour photographs of everyday things in these wheels whose terms are stated and free. Left out: pictures of the
sky, of tissue and of an eye's ground (hubble_deep_field, immunohistochemistry, retina), the grey ones, and the
motorcycle of a benchmark that states no terms."""


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Patches of 32x32 RGB of six photographs, each at three sizes; the classes are the photographs.

    Patches stand on a grid, ``spacing`` pixels of the photograph apart at any size, each shifted at random by less than
    that. They overlap, so that n patches are fewer than n independent images. Held out is a corner of each photograph:
    a patch that reaches into it and out of it is of neither set, so that no pixel of a photograph is in both. Patches
    of nearly one colour are left out.
    """

    spacing: int = 16
    """Pixels of the photograph from a patch to the next, 4 to 96, a multiple of 4; half of it makes four times as many
    patches."""
    least_spread: float = 8.0
    """Standard deviation of the pixels of a patch (0 .. 255) about its mean colour, 0 to 32: with less it is left
    out."""
    seed: int = 0
    """Of the shifts."""

    def __post_init__(self) -> None:
        need_whole(self, "spacing", least=4, most=96)
        if self.spacing % max(FACTORS):
            raise ValueError(f"spacing must be a multiple of {max(FACTORS)}, got {self.spacing}")
        need_real(self, "least_spread", least=0, most=32)
        need_seed(self)

    def load(self) -> ImageSet:
        """Cut them.

        Raises:
            UserError: a package is missing, or ships other files.
        """
        parts = [part for label in range(len(PHOTOGRAPHS)) for part in self._patches(label)]
        return ImageSet(
            "photographs",
            torch.cat([part.pixels for part in parts]),
            torch.cat([torch.full_like(part.top, part.label) for part in parts]),
            torch.cat([part.is_held_out for part in parts]),
            tuple(name for part in parts for name in part.names()),
            tuple(photograph.name for photograph in PHOTOGRAPHS),
        )

    def _patches(self, label: int) -> Iterator[Patches]:
        """Those of the photograph ``label``, at one size after the other."""
        pixels = PHOTOGRAPHS[label].read()
        corner = held_out_corner(label, *pixels.shape[1:])
        for factor in FACTORS:
            smaller = reduced(pixels, factor)
            top, left = self._places(label, factor, *smaller.shape[1:])
            inside, apart = corner.holds(factor * top, factor * left, factor * SIDE)
            kept = (inside | apart) & (spreads(smaller)[top, left] >= self.least_spread)
            top, left = top[kept], left[kept]
            windows = smaller.unfold(1, SIDE, 1).unfold(2, SIDE, 1)  # [ch, h, w, 32, 32], a view
            patches = rearrange(windows[:, top, left], "ch n y x -> n ch y x")
            yield Patches(patches, label, factor, factor * top, factor * left, inside[kept])

    def _places(self, label: int, factor: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Rows ``[n]`` and columns ``[n]`` at which patches of a photograph stand that was made smaller to ``h`` x
        ``w``."""
        step = self.spacing // factor
        rows, columns = (torch.arange(0, size - SIDE - step + 2, step) for size in (h, w))
        numbers = counter_generator(self.seed, label, Stream.PATCHES, block=factor)
        down, right = (uniform(numbers, (2, len(rows), len(columns))) * step).long()
        return (rows[:, None] + down).flatten(), (columns + right).flatten()


@dataclass(frozen=True)
class Patches:
    """n patches of a photograph at one size."""

    pixels: Tensor
    """uint8 ``[n, 3, 32, 32]``."""
    label: int
    factor: int
    top: Tensor
    """int64 ``[n]``, in pixels of the photograph; ``left`` as well."""
    left: Tensor
    is_held_out: Tensor
    """bool ``[n]``."""

    def names(self) -> list[str]:
        """Where each was cut, in words."""
        which = f"{PHOTOGRAPHS[self.label].name}, 1:{self.factor}"
        places = zip(self.top.tolist(), self.left.tolist(), strict=True)
        return [f"{which}, row {row}, column {column}" for row, column in places]


@dataclass(frozen=True)
class Corner:
    """A rectangle of a photograph, in its pixels; the ends are outside."""

    top: int
    bottom: int
    left: int
    right: int

    def holds(self, top: Tensor, left: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Which squares of ``side`` at ``top [n]``, ``left [n]`` lie inside, and which apart: bool ``[n]`` both."""
        bottom, right = top + side, left + side
        inside = (self.top <= top) & (bottom <= self.bottom) & (self.left <= left) & (right <= self.right)
        apart = (bottom <= self.top) | (top >= self.bottom) | (right <= self.left) | (left >= self.right)
        return inside, apart


def held_out_corner(index: int, h: int, w: int) -> Corner:
    """Of the photograph ``index`` of ``h`` x ``w``: the corners take turns."""
    height, width = round(HELD_OUT * h), round(HELD_OUT * w)
    below, right_of = index // 2 % 2 == 1, index % 2 == 1
    return Corner(
        h - height if below else 0, h if below else height, w - width if right_of else 0, w if right_of else width
    )


def reduced(pixels: Tensor, factor: int) -> Tensor:
    """uint8 ``[ch, h, w]`` -> ``[ch, h // factor, w // factor]``: the mean of each square, rounded.

    Not a filter that reaches further: a patch then has the pixels of its own square of the photograph and no others.
    """
    _, h, w = pixels.shape
    whole = pixels[:, : h // factor * factor, : w // factor * factor].int()
    sums = reduce(whole, "ch (h y) (w x) -> ch h w", "sum", y=factor, x=factor)
    return ((sums + factor**2 // 2) // factor**2).to(torch.uint8)


def spreads(pixels: Tensor) -> Tensor:
    """Root mean square, about the mean of each channel, of every patch of uint8 ``[ch, h, w]``, 0 .. 127.5: float64
    ``[h - 31, w - 31]``.

    Of sums of whole numbers: no machine rounds another way and keeps another patch.
    """
    values, count = pixels.long(), SIDE**2
    squares = count * sums(values.square()) - sums(values).square()
    return (squares.double().mean(0) / count**2).sqrt()


def sums(values: Tensor) -> Tensor:
    """Over every patch of int64 ``[ch, h, w]``: ``[ch, h - 31, w - 31]``."""
    total = F.pad(values.cumsum(1).cumsum(2), (1, 0, 1, 0))
    above, below = total[:, :-SIDE], total[:, SIDE:]
    return below[..., SIDE:] - below[..., :-SIDE] - above[..., SIDE:] + above[..., :-SIDE]
