"""Latents on disk, of any number: safetensors shards with the keys of LightningDiT, and an index.json over them.

::

    latents_rank00_shard000.safetensors   latents [n, ch, h, w], latents_flip (optional), labels [n] int64
    autoencoder/codec.safetensors         a fitted autoencoder's weights, and what it made of a few images
    statistics/covariance.safetensors     mean [d] and covariance [d, d] of what is trained on, float64; d up to 4096
    statistics/checked.json               size and time of the shards that were held against their checksums
    index.json                            written last: a store without it is not finished

LightningDiT and its descendants take every ``*.safetensors`` of the folder for a shard, so what is none lies below it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.index import INDEX, Index, index_of, keep_statistics, require_fit
from reference_trainer.data.shards import (
    DTYPES,
    FLIPPED,
    LATENTS,
    Place,
    layout_of,
    read_labels,
    sha256_of,
    shards_of,
    shown,
)
from reference_trainer.data.statistics import Statistics, pieces_of
from reference_trainer.errors import UserError, printable
from reference_trainer.files import as_json, check_layout, load_tensors, write_atomically

CHECKED = Path("statistics", "checked.json")
SETTLED = 2.0
"""Seconds behind which a change of a file changes its time, whatever the clock of the file system."""
Part = Literal["train", "held_out"]


class Checked:
    """Which shards were read and held against their checksums, as they were then: by name, size, time and sha256."""

    def __init__(self, found: dict[str, list[int | str]]) -> None:
        self._found, self._now = found, dict[str, list[int | str]]()

    @staticmethod
    def read(root: Path) -> Checked:
        """Kept at ``root``; none, if it cannot be read."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((root / CHECKED).read_bytes())
            if isinstance(found, dict):
                return Checked(found)
        return Checked({})

    def has(self, file: Path, sha256: str) -> bool:
        """Whether ``file`` has not changed since it was found to have this ``sha256``."""
        if same := self._found.get(file.name) == [*self._stamp(file), sha256]:
            self._now[file.name] = self._found[file.name]
        return same

    def sha256_of(self, file: Path) -> str:
        """Read it, and note what it was found to have; one that has just been written may change unseen, so not yet."""
        stamp, sha256 = self._stamp(file), sha256_of(file)
        if time.time() - stamp[1] / 1e9 > SETTLED:
            self._now[file.name] = [*stamp, sha256]
        return sha256

    def write(self, root: Path) -> None:
        """For the next time; the folder may be read-only."""
        if self._now != self._found:
            with suppress(UserError):
                write_atomically(root / CHECKED, as_json(self._now).encode())

    @staticmethod
    def _stamp(file: Path) -> tuple[int, int]:
        found = file.stat()
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Store:
    """A store that was opened: index and shards fit each other."""

    root: Path
    index: Index
    layouts: tuple[dict[str, Place], ...]
    """Of each shard."""

    @staticmethod
    def open(root: Path) -> Store:
        """The store at ``root``, its shards held against the index. Shards without an index are given one.

        Every byte is held against the checksums the first time; then, while its size and time are those it had, a shard
        is taken for the one that was checked. Delete ``statistics/checked.json`` to have all read again.

        Raises:
            UserError: nothing there, an unfinished encode, or index and shards that disagree.
        """
        files = shards_of(root)
        if not (root / INDEX).exists():
            index = index_of(root, files)
            with suppress(UserError):  # a convenience: the folder may be read-only
                index.write(root)
        else:
            index = Index.read(root)
        if strange := sorted({file.name for file in files} - {shard.name for shard in index.shards}):
            raise UserError(
                f"{shown(root)}: shard {printable(strange[0])} is not in its {INDEX}: take it away, or delete {INDEX} "
                "to have one made of all shards"
            )
        layouts, checked = [], Checked.read(root)
        bar = tqdm(index.shards, desc="checking shards", unit="shard", leave=False, delay=2)
        for shard in bar:
            file = root / shard.name
            if not file.is_file():
                raise UserError(f"{shown(root)}: shard {printable(shard.name)} of its {INDEX} is missing: put it back")
            layouts.append(layout_of(file))
            require_fit(file, layouts[-1], index, shard)
            if not checked.has(file, shard.sha256) and checked.sha256_of(file) != shard.sha256:
                raise UserError(
                    f"{shown(file)} is not the shard that its {INDEX} tells of (another sha256): put a copy back, or "
                    "encode again into another folder"
                )
        checked.write(root)
        return Store(root, index, tuple(layouts))

    def latents(self, part: Part = "train", flips: bool = False) -> StoredLatents:
        """The raw latents of ``part``; with ``flips`` those of the mirrored images behind them.

        Raises:
            UserError: the store has no flips.
        """
        if flips and not self.index.flips:
            raise UserError(f"{shown(self.root)} has no {FLIPPED}: leave data.flips=False, or encode with --flips")
        return StoredLatents(self, part, flips)

    def entries(self, part: Part, indices: Tensor) -> Tensor:
        """Which entries of the store are the ``indices`` of ``part``."""
        every = self.index.held_out_every
        if part == "held_out":
            return indices * every + every - 1
        return indices // (every - 1) * every + indices % (every - 1)

    @cached_property
    def labels(self) -> Tensor | None:
        """int64 ``[n]`` of all entries, or None; 8 bytes each.

        Raises:
            UserError: a label that is no class.
        """
        if not self.index.classes:
            return None
        labels = torch.cat([read_labels(self.root / shard.name) for shard in self.index.shards])
        if len(labels) != self.index.count:
            raise UserError(
                f"{shown(self.root)} has {len(labels)} labels of {self.index.count} latents, expected one each: encode "
                "again into another folder"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.index.classes:
            raise UserError(
                f"{shown(self.root)} has labels {int(labels.min())} to {int(labels.max())}, expected 0 to "
                f"{self.index.classes - 1}"
            )
        return labels

    def labels_of(self, part: Part, flips: bool = False) -> Tensor | None:
        """int64, in the order of ``latents(part, flips)``."""
        if (labels := self.labels) is None:
            return None
        own = labels[self.entries(part, torch.arange(len(self.latents(part))))]
        return own.repeat(2) if flips else own

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Boxes and eigenvalues, see ``keep_statistics``: of the index, else by one pass, and put into it.

        Raises:
            UserError: a shard that cannot be read.
        """
        if (there := Index.read(self.root).statistics if (self.root / INDEX).exists() else None) is not None:
            return there
        shards, found, done = self.index.shards, None, 0
        for shard in tqdm(shards, desc="measuring latents", unit="shard", leave=False, delay=1):
            for piece in pieces_of(self.root / shard.name, LATENTS, done, self.index.held_out_every):
                if len(piece):
                    found = (found or Statistics.begun(piece)).with_latents(piece)
            done += shard.count
        try:
            made = keep_statistics(self.root, found)
            replace(self.index, statistics=made).write(self.root)
        except UserError as error:  # the folder may be read-only
            tqdm.write(f"the statistics are not kept: {error}")
            assert found is not None
            made = found.summary() | {"covariance": None}
        return made

    def covariance(self) -> Tensor | None:
        """``[d, d]`` float64 of what is trained on, mirrored entries left out; None: not kept, see ``statistics``.

        Raises:
            UserError: its file cannot be read.
        """
        found = self.second_moments()
        return None if found is None else found[1]

    def second_moments(self) -> tuple[Tensor, Tensor] | None:
        """``covariance`` with the mean ``[d]`` before it.

        Raises:
            UserError: their file cannot be read.
        """
        if (about := self.statistics["covariance"]) is None:
            return None
        file, d = self.root / about["file"], math.prod(self.index.shape)
        tensors, _ = load_tensors(file)
        of = torch.empty(1, dtype=torch.float64, device="meta")  # takes no memory
        wanted = {"mean": of.new_empty(d), "covariance": of.new_empty(d, d)}
        try:
            check_layout(tensors, wanted)
        except UserError as error:
            raise UserError(f"{shown(file)}: {error}") from error
        return tensors["mean"], tensors["covariance"]

    def fingerprint(self) -> str:
        """Changes when a shard, or what is held out, changes."""
        said = repr([shard.sha256 for shard in self.index.shards]) + repr(self.index.held_out_every)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


class StoredLatents:
    """``Latents`` of a store, raw. Read where they are asked for: nothing is kept.

    The files are read, not mapped: pages of a map count as memory of the process, and in the end all would be in it.
    """

    def __init__(self, store: Store, part: Part, flips: bool) -> None:
        self._store, self._part, self._flips = store, part, flips
        held_out = store.index.held_out
        self._own = held_out if part == "held_out" else store.index.count - held_out
        self._starts = torch.tensor([0, *accumulate(shard.count for shard in store.index.shards)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        return self._store.index.shape

    def __len__(self) -> int:
        return self._own * (2 if self._flips else 1)

    def take(self, indices: Tensor) -> Tensor:
        """See ``Latents``.

        Raises:
            UserError: a file that can no longer be read.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices must be in 0 .. {len(self) - 1}")
        entries = self._store.entries(self._part, indices % max(1, self._own))
        shards = torch.searchsorted(self._starts, entries, right=True) - 1
        rows = entries - self._starts[shards]
        dtype = DTYPES[self._store.index.dtype]
        each = math.prod(self.shape) * dtype.itemsize
        out = torch.empty(len(indices), each, dtype=torch.uint8)
        for key, wanted in ((LATENTS, indices < self._own), (FLIPPED, indices >= self._own)):
            for shard in shards[wanted].unique().tolist():
                places = torch.nonzero(wanted & (shards == shard))[:, 0]
                self._read(shard, key, rows[places].tolist(), places.tolist(), out)
        return out.view(dtype).reshape(-1, *self.shape).float()

    def second_moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean ``[d]`` and covariance ``[d, d]`` of all of them, float64; None where they are not kept.

        Raises:
            UserError: their file cannot be read.
        """
        return None if self._flips or self._part != "train" else self._store.second_moments()

    def _read(self, shard: int, key: str, rows: list[int], places: list[int], out: Tensor) -> None:
        """The bytes of ``rows`` of one shard to ``places`` of ``out``, uint8 ``[b, bytes of a latent]``."""
        each, file = out.shape[1], self._store.root / self._store.index.shards[shard].name
        start, flat = self._store.layouts[shard][key].start, out.flatten().numpy().data
        try:
            with file.open("rb", buffering=0) as opened:
                for row, place in zip(rows, places, strict=True):
                    opened.seek(start + row * each)
                    if opened.readinto(flat[place * each : (place + 1) * each]) != each:
                        raise OSError(0, "it has become shorter")
        except OSError as error:
            raise UserError(f"cannot read {shown(file)}: {error.strerror}: put it back, and go on") from error


def in_pieces(count: int, size: int = 1024) -> Iterator[Tensor]:
    """All indices below ``count``, in order, ``size`` at a time."""
    for start in range(0, count, size):
        yield torch.arange(start, min(count, start + size))
