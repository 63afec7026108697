"""Images of a Hugging Face dataset, by the name it has on the hub or from a folder, row by row."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference_trainer.data.labels import Labels, numbered
from reference_trainer.data.reading import Notes, require_squares
from reference_trainer.data.squares import extensions
from reference_trainer.errors import UserError, one_line, printable, some_of

SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
"""What ``save_to_disk`` leaves in a folder: of a dataset with splits, or of one without."""
TABLES = frozenset({".parquet", ".arrow"})
"""How files end that a dataset has its rows in."""


def is_dataset(folder: Path) -> bool:
    """Whether ``folder`` holds a dataset rather than images as files; where it has both, the images count.

    Tables beside images are what downloaders leave of where these came from.
    """
    if is_saved(folder):
        return True
    found = False
    with suppress(OSError):  # whoever reads the folder will say so
        for file in chain(folder.glob("*"), folder.glob("*/*")):
            if (ending := file.suffix.lower()) in extensions():
                return False
            found = found or ending in TABLES
    return found


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    with suppress(OSError):
        return any(all((folder / name).is_file() for name in names) for names in SAVED)
    return False


@dataclass(frozen=True)
class Rows:
    """``ImageFiles`` of one column of a dataset."""

    images: Any
    """The dataset of that column alone, its images as ``{"bytes": ..., "path": ...}``."""
    column: str
    sizes: tuple[int, ...]
    """In bytes; -1 of those that lie elsewhere."""
    split: str
    where: str
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        """The split and the number of the row, as one would type it."""
        return f"{self.split}[{index}]"

    def content(self, index: int) -> Path | io.BytesIO:
        """What the cell holds, or names."""
        cell = self.images[index][self.column]
        if cell is None:
            raise ValueError("the cell is empty")
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])

    def stamp(self, index: int) -> tuple[int]:
        """Its size."""
        return (self.sizes[index],)


@dataclass(frozen=True, kw_only=True)
class HubImages:
    """One split of a Hugging Face dataset (https://huggingface.co/docs/datasets), made RGB squares as ``ImageFolder``.

    Read by the package datasets, of the extra ``hub``. Rows are read where they are: a dataset may be larger than the
    memory. Code that comes with a dataset is never run.
    """

    path: str
    """The folder that ``save_to_disk`` wrote, or one of parquet files; else a name on the hub, ``OWNER/NAME``."""
    split: str | None = None
    """``train``, ...; None: the only one there is."""
    subset: str | None = None
    """Its configuration, where it has several."""
    image_column: str | None = None
    """None: the only one that has images."""
    label_column: str | None = None
    """None: the only one of the kind ClassLabel, if there is any."""
    resolution: int = 64
    """Side in pixels the images are brought to, a multiple of 8."""
    held_out_every: int = 10
    """Every so-many-th image is never trained on, 2 or more."""

    def __post_init__(self) -> None:
        require_squares(self.resolution, self.held_out_every)

    def open(self) -> Rows:
        """Open it; download it, where it is a name and not in the cache of the package.

        Raises:
            UserError: the package is not installed; there is no such dataset, split or column; nobody can tell which
                of several is meant; labels that are no classes.
        """
        datasets = self._package()
        found, split = self._split(datasets)
        where = f"in {split} of {printable(self.path)}"
        column = self._image_column(datasets, found, where)
        labels = self._labels(datasets, found, where)
        try:
            images = found.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            sizes = _sizes(images, column)
        except Exception as error:  # whatever pyarrow finds wrong with it
            raise UserError(f"the column {column} {where} has no images ({one_line(error)}): name another") from error
        classes = "no classes" if labels is None else f"{labels.classes} classes"
        tqdm.write(f"{len(sizes)} rows {where}: images of the column {column}, {classes}")
        return Rows(images, column, sizes, split, where, labels)

    def notes(self) -> Notes:
        """Empty ones; what cannot be read is left out."""
        return Notes()

    def _package(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            shown = printable(self.path)
            what = f"{shown} is a Hugging Face dataset" if self._is_here() else f"there is no {shown} here"
            raise UserError(f"{what}; to read datasets, also from the hub: pip install datasets") from error
        return datasets

    def _is_here(self) -> bool:
        return Path(self.path).exists()

    def _split(self, datasets: Any) -> tuple[Any, str]:
        """The dataset of one split, and what that is called."""
        folder = Path(self.path)
        if not is_saved(folder):
            return self._loaded(datasets)
        with self._said():
            found = datasets.load_from_disk(str(folder))
        if not isinstance(found, dict):
            if self.split is not None:
                raise UserError(f"{printable(self.path)} has no splits: leave --split out")
            return found, folder.resolve().name
        split = self._chosen(list(found))
        return found[split], split

    def _loaded(self, datasets: Any) -> tuple[Any, str]:
        if not self._is_here():
            tqdm.write(f"there is no {printable(self.path)} here: asking the Hugging Face hub for it")
        with self._said():
            # First what it has: to download all of it and then to ask would be late.
            builder = datasets.load_dataset_builder(self.path, self.subset)
            there = list(builder.info.splits or builder.config.data_files or ())
        split = self._chosen(there) if there else self.split or "train"
        with self._said():
            return datasets.load_dataset(self.path, self.subset, split=split), split

    def _chosen(self, there: list[str]) -> str:
        if self.split is None and len(there) == 1:
            return there[0]
        if self.split is None:
            raise UserError(
                f"{printable(self.path)} has the splits {some_of(there, 8)}: say which to read with --split, as in "
                f"--split {there[0]}"
            )
        if self.split not in there:
            raise UserError(f"{printable(self.path)} has no split {self.split}: there are {some_of(there, 8)}")
        return self.split

    def _image_column(self, datasets: Any, found: Any, where: str) -> str:
        self._require_column(self.image_column, found, where)
        if self.image_column is not None:
            return self.image_column
        columns = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
        if len(columns) != 1:
            has = f"has several columns of images, {some_of(columns)}" if columns else "has no column of images"
            raise UserError(
                f"{printable(self.path)} {has} (all: {some_of(found.column_names, 8)}): name one with --image-column"
            )
        return columns[0]

    def _labels(self, datasets: Any, found: Any, where: str) -> Labels | None:
        self._require_column(self.label_column, found, where)
        column = self.label_column
        if column is None:
            columns = [name for name, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)]
            if len(columns) > 1:
                raise UserError(
                    f"{printable(self.path)} has several columns of classes, {some_of(columns)}: name one with "
                    "--label-column"
                )
            if not columns:
                return None
            (column,) = columns
        values = found.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
        if all(value in (None, -1) for value in values):  # as test splits have it
            tqdm.write(f"the column {column} {where} has no labels: encoded without classes")
            return None
        kind = found.features[column]
        names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
        return numbered(values, f"of the column {column} {where}", names)

    def _require_column(self, name: str | None, found: Any, where: str) -> None:
        if name is not None and name not in found.column_names:
            raise UserError(f"no column {name} {where}: there are {some_of(found.column_names, 8)}")

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the package raises as one line; its own notes of every try to reach the hub are left out."""
        shown = printable(self.path)
        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error)[:300]}"
            if self._is_here():
                raise UserError(f"cannot open {shown} as a Hugging Face dataset ({why}): copy it again") from error
            raise UserError(
                f"there is no {shown} here, and no dataset of that name can be had from the Hugging Face hub ({why}): "
                "without network, give the path of a folder that the dataset's save_to_disk(PATH) wrote"
            ) from error
        finally:
            logger.setLevel(level)


def _sizes(images: Any, column: str) -> tuple[int, ...]:
    """Bytes of each image, without reading them."""
    import pyarrow.compute as pc  # comes with datasets

    sizes = list[int]()
    for part in images.with_format("arrow").iter(500):
        lengths = pc.binary_length(pc.struct_field(part.column(column), "bytes"))
        sizes += [-1 if length is None else length for length in lengths.to_pylist()]
    return tuple(sizes)
