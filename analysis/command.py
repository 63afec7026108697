"""What the scripts share: options, exit status, one line for an error the user can mend."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from reference_trainer.command import path, whole
from reference_trainer.errors import UserError, exit_status
from reference_trainer.machine import keep_freed_memory


def add_data(parser: argparse.ArgumentParser, data: str) -> None:
    """``--data``, whose help is ``data``, ``--resolution`` and ``--autoencoder``: what ``configuration`` takes."""
    parser.add_argument("--data", metavar="PATH", help=data)
    parser.add_argument("--resolution", type=int, metavar="PX", help="side the images are brought to (default 64)")
    parser.add_argument(
        "--autoencoder",
        metavar="NAME_OR_PATH",
        help="default: that of `train` for these images; else KLAutoencoder (options in brackets), PixelSpace, a run "
        "folder whose autoencoder to use, or module:function returning an object with encode(images [n, ch, h, w] in "
        "-1 .. 1) and decode",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """``--out``."""
    parser.add_argument(
        "--out",
        type=path,
        default=Path("runs/analysis"),
        metavar="DIR",
        help="folder to write to (default %(default)s)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """``--images``, ``--out`` and ``--device``."""
    parser.add_argument("--images", type=whole, default=5000, help="look at no more training images (default 5000)")
    add_out(parser)
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")


def add_common(parser: argparse.ArgumentParser, samples: int = 4096) -> None:
    """``--samples`` and ``add_images``."""
    parser.add_argument(
        "--samples", type=whole, default=samples, help=f"temporal differences to measure (default {samples})"
    )
    add_images(parser)


def check_common(options: argparse.Namespace) -> None:
    """Refuse counts that cannot work, and a folder that cannot be written."""
    for name, least in (("images", 1), ("samples", 20)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    require_writable(options.out)


def require_writable(folder: Path) -> None:
    """Refuse an ``--out`` that cannot be written before anything is measured for it; it is not made yet.

    Raises:
        UserError: just that.
    """
    try:
        there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another folder with --out") from error


def run_command(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None
) -> int:
    """Parse, work, and turn errors into an exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        options = parser.parse_args(given)
        keep_freed_memory()
        torch.set_num_threads(1)  # as the trainer: the networks here are small, and threads would wait for each other
        return work(options)

    return exit_status(run, debug="--debug" in given)
