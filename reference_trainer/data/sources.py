"""What ``encode DATA`` reads: a folder, a zip or a dataset, by what DATA is."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from zipfile import is_zipfile

from reference_trainer.data.hub import HubImages, is_dataset
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.index import is_store
from reference_trainer.data.reading import Source
from reference_trainer.data.squares import cause
from reference_trainer.data.zipped import ZippedImages
from reference_trainer.errors import UserError, printable, some_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""``NAME`` or ``OWNER/NAME``."""


def source_of(
    data: str,
    resolution: int,
    *,
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """The source that ``data`` is: what lies there, or if nothing does a name on the Hugging Face hub.

    Args:
        resolution: side in pixels the images are brought to.
        split: see ``ZippedImages`` and ``HubImages``; of a folder of images the one below it.
        subset, image_column, label_column: see ``HubImages``; of no use elsewhere.
    Raises:
        UserError: it is none, or already encoded; what is for datasets is given for something else.
        ValueError: of ``resolution``.
    """
    path, shown = Path(data), printable(data)
    if is_there(path) and not is_dataset(path):
        for option, given in (("subset", subset), ("image-column", image_column), ("label-column", label_column)):
            if given is not None:
                raise UserError(f"--{option} is for Hugging Face datasets, and {shown} is none: leave it out")
        if is_store(path):
            raise UserError(f"{shown} has latents, not images: train on them with --data {shlex.quote(shown)}")
        if split is not None and path.is_dir() and not (path / split).is_dir():
            there = sorted(each.name for each in path.iterdir() if each.is_dir())
            raise UserError(f"{shown} has no folder {split} for --split: there are {some_of(there, 8) or 'none'}")
        if path.is_dir():
            return ImageFolder(path=str(path / (split or "")), resolution=resolution)
        if not is_zip(path):
            raise UserError(f"{shown} is a file, but no zip: give a zip, a folder of images, or a dataset's folder")
        return ZippedImages(path=data, split=split, resolution=resolution)
    if not is_there(path) and not HUB_NAME.fullmatch(data):
        raise UserError(f"there is no {shown}: give a folder of images, a zip, or a Hugging Face dataset")
    return HubImages(
        path=data,
        split=split,
        subset=subset,
        image_column=image_column,
        label_column=label_column,
        resolution=resolution,
    )


def is_there(path: Path) -> bool:
    """Whether there is something at ``path``.

    Raises:
        UserError: nobody can tell.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a folder above it is closed; a name too long, or of no characters
        raise UserError(f"cannot look at {printable(str(path))}: {cause(error)}") from error
    return True


def is_zip(path: Path) -> bool:
    """By its name, so that a broken one is called by what it is; else by its content."""
    with suppress(OSError):
        return path.is_file() and (path.suffix.lower() == ".zip" or is_zipfile(path))
    return False


def require_no_archive(path: Path) -> None:
    """Refuse to train on what has to be encoded first: images in memory come from a folder alone.

    Raises:
        UserError: with the command to type.
    """
    kind = "zip" if is_zip(path) else "Hugging Face dataset" if path.is_dir() and is_dataset(path) else None
    if kind is not None:
        given, store = shlex.quote(printable(str(path))), shlex.quote(printable(f"{path.stem}-latents"))
        raise UserError(
            f"{given} is a {kind}: encode it first with `python -m reference_trainer encode {given} --out {store}`, "
            f"then train with --data {store}"
        )
