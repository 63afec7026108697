"""What several commands do: features by name, pictures of their own, the words for guidance."""

# What a command needs it imports itself: help and mistakes should not wait for torch.

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from reference_trainer.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reference_trainer.data.images import ImageSet
    from reference_trainer.evaluation.features import Features


GUIDANCE = "of a run trained by class: weight of guidance (default: the run's, which is 1, none, unless set)"

MATCH_MOMENTS = "move samples to the mean and the covariance of the latents, by the linear map that moves them least"


def look_at(files: Sequence[Path]) -> str:
    """Two lines: the files, and a link to the first of them, the page that has all the others."""
    return f"look at {', '.join(map(str, files))}\nall in one page: {files[0].resolve().as_uri()}"


def named_features(name: str | None, images: ImageSet, device: torch.device) -> Features | None:
    """What ``--features`` names, loaded and tried on two images.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    from reference_trainer.evaluation.features import tried
    from reference_trainer.evaluation.named import features_named

    return None if name is None else tried(features_named(name, device), images.pixels)


def require_writable(file: Path) -> None:
    """Refuse a picture's name before the time it takes to draw what goes there.

    Raises:
        UserError: its folder cannot be written, or its ending is that of no picture.
    """
    import torch

    if file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder; give --out a file, as in {file / 'samples.png'}")
    trial = file.with_name(f".trial-{file.name}")
    save_picture(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), trial, called=file)
    trial.unlink()


def save_picture(pixels: Tensor, file: Path, called: Path | None = None, columns: int | None = None) -> None:
    """uint8 ``[n, ch, h, w]`` as one PNG of rows of ``columns``, None: a square; an error calls it ``called``."""
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from reference_trainer.plotting import OWN_PICTURE, tile

    columns = columns or max(1, round(len(pixels) ** 0.5))
    padding = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((padding, *pixels.shape[1:]), 255)])
    temporary = file.with_name(f".{os.getpid()}-{file.name}")  # its ending says what is written
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        about = PngInfo()
        for key, text in OWN_PICTURE.items():
            about.add_text(key, text)
        Image.fromarray(tile(pixels, columns)).save(temporary, pnginfo=about)
        temporary.replace(file)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error).rstrip(": ")
        raise UserError(f"cannot write {called or file}: {why}; give --out a place for a PNG") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
