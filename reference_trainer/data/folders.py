"""Which files below a folder are images to train on: in one order everywhere, without loops and without runs."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from reference_trainer.errors import UserError, printable

NOT_OURS = frozenset({"__MACOSX", "@eaDir"})
"""Folders that archives and network drives fill with copies of the pictures beside them."""

LARGEST_CONFIG = 1 << 20  # bytes; a run's config.json has a few thousand


@dataclass(frozen=True)
class Listing:
    """What there is below a folder; all paths are relative to it."""

    files: tuple[Path, ...]
    """Sorted by their parts, so that a folder's images stay together."""
    unlisted: tuple[tuple[Path, OSError], ...]
    """Folders that cannot be listed, and why."""
    runs: tuple[Path, ...]
    """Folders that hold a run of the trainer; nothing below them is listed."""


def list_files(root: Path, extensions: Set[str]) -> Listing:
    """Everything below ``root`` whose lower-case extension is one of ``extensions``; it need not be readable.

    Hidden files and folders are passed over. Links to folders are followed, each folder once: as itself before as a
    link, and never to a folder that holds ``root``.

    Raises:
        UserError: ``root`` cannot be listed.
    """
    top = os.path.realpath(root)
    files, unlisted, runs = [], [], []
    seen: set[str] = set()
    folders, links = deque([Path()]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(root / folder)
        if real in seen or (folder.parts and os.path.commonpath([real, top]) == real):
            continue
        seen.add(real)
        try:
            with os.scandir(root / folder) as scanned:
                entries = sorted((e for e in scanned if not _is_passed_over(e.name)), key=lambda e: e.name)
        except OSError as error:
            if not folder.parts:
                raise UserError(f"cannot list {printable(str(root))}: {error.strerror}") from error
            unlisted.append((folder, error))
            continue
        if folder.parts and any(e.name == "config.json" for e in entries) and _holds_run(root / folder):
            runs.append(folder)
            continue
        for entry in entries:
            below = folder / entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(below)
            elif below.suffix.lower() in extensions:
                files.append(below)
            elif why := _broken_link(root / below):  # perhaps to a folder of images that is not mounted
                unlisted.append((below, why))
    return Listing(tuple(sorted(files, key=lambda file: file.parts)), tuple(unlisted), tuple(runs))


def class_names(files: Sequence[Path]) -> tuple[str, ...]:
    """The folders right below the root, sorted, if all images are in such, and there are two or more; else none."""
    if any(len(file.parts) == 1 for file in files):
        return ()
    names = sorted({file.parts[0] for file in files})
    return tuple(names) if len(names) > 1 else ()


def labels_of_folders(files: Sequence[Path]) -> tuple[tuple[str, ...], list[int] | None]:
    """``class_names`` of ``files``, and the class of each; None without classes."""
    names = class_names(files)
    number = {name: label for label, name in enumerate(names)}
    return names, [number[file.parts[0]] for file in files] if names else None


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in NOT_OURS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _broken_link(path: Path) -> OSError | None:
    try:
        path.stat()
    except OSError as error:
        return error if path.is_symlink() else None
    return None


def _holds_run(folder: Path) -> bool:
    """Whether ``folder`` has the config.json of a run; any other file of that name is the user's."""
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_CONFIG:
            return False
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("part") == "TrainConfig"
