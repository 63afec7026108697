"""Images by number, wherever they are kept, and how some of them become pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.labels import Labels
from reference_trainer.data.squares import cause, open_square, resized
from reference_trainer.errors import UserError, printable, some_of


class ImageFiles(Protocol):
    """Encoded images, in an order that is the same every time; nothing of them is in memory.

    A folder, a zip or a dataset each has its own; ``read`` makes pixels of any.
    """

    @property
    def where(self) -> str:
        """Where they are, as a message says it, behind "10 images": ``below photos``."""
        ...

    @property
    def labels(self) -> Labels | None:
        """Of all of them."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What it is called; ``printable`` makes that fit to print."""
        ...

    def content(self, index: int) -> Path | BinaryIO:
        """The file, or what it holds.

        Raises:
            Exception: whatever reading it raises.
        """
        ...

    def stamp(self, index: int) -> Sequence[int | str]:
        """Changes when the image is exchanged, as far as can be told without reading it all."""
        ...


class Source(Protocol):
    """The configuration of what ``encode`` reads; a frozen dataclass."""

    @property
    def path(self) -> str:
        """Folder, file or name."""
        ...

    @property
    def resolution(self) -> int:
        """Side in pixels the images are brought to."""
        ...

    @property
    def held_out_every(self) -> int:
        """Every so-many-th image is never trained on."""
        ...

    def open(self) -> ImageFiles:
        """Find the images and their labels; what is left out is said.

        Raises:
            UserError: there are none, or labels that cannot be right.
        """
        ...

    def notes(self) -> Notes:
        """Empty ones, which know what is to be done about an image that cannot be read."""
        ...


def nothing(name: str, error: Exception) -> None:
    """What is done about an image that cannot be read where it is to be left out."""


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
    on_unreadable: Callable[[str, Exception], None] = nothing
    """Called with the name and the error, before it is noted; may raise."""

    def add(self, more: Notes) -> None:
        """Take over those of further images."""
        self.count += more.count
        self.unreadable += more.unreadable
        self.own += more.own
        self.enlarged += more.enlarged

    def left_out(self) -> list[str]:
        """A line for each image that is not among those read."""
        return [*self.unreadable, *(f"{name} (a picture that the trainer drew)" for name in self.own)]

    def say(self, of: int, resolution: int) -> None:
        """A line for each kind, if there is any ``of`` so many files, brought to ``resolution``."""
        say_skipped("pictures that the trainer drew", self.own)
        say_skipped("unreadable images", self.unreadable, of=of)
        if self.enlarged:
            tqdm.write(
                f"{len(self.enlarged)} of {self.count} images are enlarged more than twice to {resolution} pixels, the "
                "smallest from {} ({}): lower data.resolution, or leave them out".format(*min(self.enlarged))
            )


def read(files: ImageFiles, indices: Sequence[int], resolution: int, notes: Notes) -> tuple[Tensor, tuple[int, ...]]:
    """Pixels, uint8 ``[n, 3, resolution, resolution]``, of the images among ``indices``, in their order, and which.

    What there is to say goes to ``notes``.
    """
    pixels = room_for(len(indices), resolution)  # filled from the front: there is never a second copy
    kept = list[int]()
    for index in tqdm(indices, desc="reading images", unit="img", leave=False, delay=1):
        name = files.name(index)
        try:
            square = open_square(files.content(index))
            if square is None:
                notes.own.append(printable(name))
                continue
            pixels[len(kept)] = torch.from_numpy(resized(square, resolution)).permute(2, 0, 1)
        except Exception as error:  # a decoder may raise anything; Ctrl-C is no Exception
            notes.on_unreadable(name, error)
            notes.unreadable.append(reason(name, error))
            continue
        kept.append(index)
        if 2 * square.width < resolution:
            notes.enlarged.append((square.width, printable(name)))
    notes.count += len(kept)
    return pixels[: len(kept)], tuple(kept)


def require_squares(resolution: int, held_out_every: int) -> None:
    """Check the two numbers that every source has.

    Raises:
        ValueError: ``resolution`` is no multiple of 8, or ``held_out_every`` below 2.
    """
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution must be a multiple of 8, got {resolution}")
    if held_out_every < 2:
        raise ValueError(f"held_out_every must be at least 2, got {held_out_every}")


def require_enough(readable: int, where: str, held_out_every: int) -> None:
    """Refuse fewer images than leave one to hold out.

    Raises:
        UserError: just that.
    """
    if readable < held_out_every:
        raise UserError(
            f"{readable} readable images {where}, need at least {held_out_every} (every held_out_every-th is kept for "
            "evaluation)"
        )


def identity_of(files: ImageFiles) -> list[Any]:
    """For JSON: changes when other images, an order or labels come to the same place."""
    labels = None if files.labels is None else [files.labels.classes, files.labels.names, files.labels.digest()]
    return [labels, *([files.name(i), *files.stamp(i)] for i in range(len(files)))]


def reason(name: str, error: Exception) -> str:
    """What could not be read, and why, as it can be printed."""
    return f"{printable(name)} ({cause(error)})"


def say_skipped(what: str, named: Sequence[str], of: int | None = None, at_most: int = 3) -> None:
    """One line with the number and the first of those that were left out; none if there are none."""
    if named:
        number = f"{len(named)}" if of is None else f"{len(named)} of {of}"
        tqdm.write(f"skipped {what} ({number}): {some_of(named, at_most, '; ')}")


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
