"""Which class an image is of: by its folder, by EDM's dataset.json, or by a column of numbers.

A class keeps its number whatever becomes of its images: one whose folder is empty, or whose images cannot be read, is
still counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.errors import UserError, one_line, printable, some_of

TABLE = "dataset.json"
"""EDM's: ``{"labels": [["00000/img00000000.png", 3], ...]}``, or null for labels; names from where it lies."""
MOST_CLASSES = 100_000
"""A network has an embedding for each: what is above is no class, but a number of another kind."""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
"""What folders of images for different purposes are called, in lower case."""


@dataclass(frozen=True)
class Labels:
    """Of some images."""

    of: Tensor
    """int64 ``[n]``."""
    classes: int
    names: tuple[str, ...] | None
    """One a class, or None where they are only numbered."""

    def digest(self) -> str:
        """Changes with any of them."""
        return hashlib.sha256(self.of.numpy().tobytes()).hexdigest()[:16]


def labels_of(names: Sequence[str], folders: Iterable[str], table: bytes | None, where: str) -> Labels | None:
    """By the ``table`` if it is EDM's, even where that has none; else by folder.

    Args:
        names: of the files, relative to where they were looked for, with ``/``.
        folders: those at the top, with images or without.
        table: what a dataset.json beside them holds, if there is one.
        where: for messages, see ``ImageFiles.where``.
    Raises:
        UserError: see ``by_table``; or the table is no JSON.
    """
    try:
        found = None if table is None else json.loads(table)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{TABLE} {where} is no JSON ({one_line(error)}): mend it, or take it away") from error
    if not isinstance(found, dict) or "labels" not in found:
        return by_folder(names, folders, where)
    if (pairs := found["labels"]) is None:
        return None
    return by_table(pairs, names, where)


def by_folder(files: Sequence[str], folders: Iterable[str], where: str) -> Labels | None:
    """The folders at the top, sorted, if all of ``files`` are in such, and at least two hold any; else None.

    Those of ``folders`` that hold no images keep their numbers, and are said.
    """
    tops = [file.partition("/")[0] for file in files]
    filled = set(tops)
    if len(filled) < 2 or not all("/" in file for file in files):
        return None
    names = sorted(filled.union(folders))
    if empty := [f"{name} (class {number})" for number, name in enumerate(names) if name not in filled]:
        tqdm.write(
            f"{len(empty)} of {len(names)} class folders {where} have no images: {some_of(empty)}; they keep their "
            "numbers: take away what is no class"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return Labels(torch.tensor([numbers[top] for top in tops]), len(names), tuple(names))


def by_table(pairs: Any, names: Sequence[str], where: str) -> Labels | None:
    """The labels that ``pairs`` of a dataset.json give to ``names``; names of it that are not there are said.

    Raises:
        UserError: ``pairs`` are none, an image has no label, or two, or one that is no class.
    """
    table = _by_name(pairs, where)
    if missing := [name for name in names if name not in table]:
        raise UserError(
            f"{TABLE} {where} has no label for {len(missing)} of {len(names)} images ({some_of(missing)}): add them, "
            "or take these images away"
        )
    if strange := sorted(table.keys() - set(names)):
        tqdm.write(f"{len(strange)} of {len(table)} images of {TABLE} {where} are not there: {some_of(strange)}")
    return numbered([table[name] for name in names], where=f"of {TABLE} {where}")


def _by_name(pairs: Any, where: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(
                f'{TABLE} {where}: entry {number} of "labels" is {printable(repr(pair)[:60])}, expected a name and a '
                'number, as in ["00000/img00000000.png", 3]'
            )
        name, label = pair[0].replace("\\", "/"), pair[1]
        if table.setdefault(name, label) != label:
            raise UserError(f"{TABLE} {where} has {printable(name)} twice, with different labels: leave one of them")
    return table


def numbered(values: Sequence[Any], where: str, names: tuple[str, ...] | None = None) -> Labels | None:
    """``values`` as labels, checked; None if all are of one class.

    Args:
        where: the labels are, for messages.
        names: of the classes; without them there are as many as the largest value says.
    Raises:
        UserError: one is no whole number from 0 on, or too large.
    """
    most = MOST_CLASSES if names is None else len(names)
    for number, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
            raise UserError(
                f"label {number} {where} is {printable(repr(value)[:60])}, expected a whole number from 0 to {most - 1}"
            )
    classes = max(values, default=-1) + 1 if names is None else len(names)
    return Labels(torch.tensor(values, dtype=torch.long), classes, names) if classes > 1 else None


def require_one_split(files: Sequence[str], where: str) -> None:
    """Refuse what has folders such as ``train`` and ``val`` at the top: they are no classes, nor to be mixed.

    One such name among others is a class: vehicles have a ``train``, too.

    Raises:
        UserError: which there are.
    """
    if splits := splits_in(files):
        raise UserError(
            f"the images {where} are in {some_of(splits)}: say which to read with --split, as in --split {splits[-1]}"
        )


def splits_in(files: Sequence[str]) -> list[str]:
    """The folders at the top that are splits by their names, if they are no classes: several, or all there are."""
    tops = {file.partition("/")[0] for file in files if "/" in file}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    return splits if len(splits) > 1 or len(splits) == len(tops) else []
