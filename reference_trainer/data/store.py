"""Latents on disk, of any number: safetensors shards with the keys of LightningDiT, and an index.json over them.

::

    latents_rank00_shard000.safetensors   latents [n, ch, h, w], latents_flip (optional), labels [n] int64
    autoencoder/codec.safetensors         a fitted autoencoder's weights, and what it made of a few images
    index.json                            written last: a store without it is not finished

LightningDiT and its descendants take every ``*.safetensors`` of the folder for a shard, so the codec lies below it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.latents import not_finite
from reference_trainer.data.moments import Moments
from reference_trainer.data.shards import (
    DTYPES,
    FLIPPED,
    FORMAT,
    LABELS,
    LATENTS,
    VERSION,
    Place,
    about_shard,
    layout_of,
    read_labels,
    sha256_of,
    shards_of,
    shown,
)
from reference_trainer.errors import UserError, printable
from reference_trainer.files import as_json, write_atomically

INDEX, CODEC = "index.json", Path("autoencoder", "codec.safetensors")
HELD_OUT_EVERY = 10
"""Of shards that somebody else wrote; as ``ImageFolder`` has it."""
Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class Shard:
    """One file of a store, as the index knows it."""

    name: str
    count: int
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class Index:
    """index.json."""

    shape: tuple[int, int, int]
    """(ch, h, w) of the latents."""
    dtype: str
    """A key of ``DTYPES``."""
    shards: tuple[Shard, ...]
    flips: bool
    """Whether each latent has a ``latents_flip``, of the mirrored image."""
    classes: int
    """0: the labels mean nothing."""
    label_names: tuple[str, ...] | None
    held_out_every: int
    """Every so-many-th entry is never trained on."""
    moments: dict[str, Moments]
    """Of the training entries, under ``latents`` and ``latents_flip``; of what is stored, after rounding."""
    autoencoder: dict[str, Any] | None
    """Its configuration, see ``autoencoders.as_dict``; None: shards of somebody else's."""
    preprocessing: dict[str, Any] | None
    """What was done to the images."""
    codec: dict[str, Any] | None = None
    """What is known of the autoencoder beside its configuration, see ``notes_of``: class and hash of its weights, or
    PSNR and steps of its fit. None: nothing, or an earlier version's."""

    @property
    def count(self) -> int:
        """Entries, held-out ones included."""
        return sum(shard.count for shard in self.shards)

    @property
    def held_out(self) -> int:
        """Entries never trained on."""
        return self.count // self.held_out_every

    def write(self, root: Path) -> None:
        """See ``write_atomically``."""
        about = {"format": FORMAT, "version": VERSION} | vars(self) | {"count": self.count, "held_out": self.held_out}
        about["shards"] = [vars(shard) for shard in self.shards]
        about["moments"] = {key: moments.as_dict() for key, moments in self.moments.items()}
        write_atomically(root / INDEX, (as_json(about, indent=1) + "\n").encode())

    @staticmethod
    def read(root: Path) -> Index:
        """The index of the store at ``root``.

        Raises:
            UserError: it cannot be read, or is none of this version.
        """
        file = root / INDEX
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise ValueError(f"it is of version {found['version']}, expected {VERSION}")
            ch, h, w = (int(side) for side in found["shape"])
            names = found["label_names"]
            index = Index(
                shape=(ch, h, w),
                dtype=found["dtype"],
                shards=tuple(Shard(one["name"], int(one["count"]), one["sha256"]) for one in found["shards"]),
                flips=bool(found["flips"]),
                classes=int(found["classes"]),
                label_names=None if names is None else tuple(names),
                held_out_every=int(found["held_out_every"]),
                moments={key: Moments.from_dict(one) for key, one in found["moments"].items()},
                autoencoder=found["autoencoder"],
                preprocessing=found["preprocessing"],
                codec=found.get("codec"),
            )
            if index.dtype not in DTYPES or index.held_out_every < 2 or LATENTS not in index.moments:
                raise ValueError("its dtype, held_out_every or moments make no sense")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{shown(file)} is no index of latents ({' '.join(str(error).split())}): put back the one that encode "
                "wrote"
            ) from error
        return index


def is_store(path: Path) -> bool:
    """Whether the folder ``path`` has latents: an index.json of ours, or shards with the key ``latents``."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((path / INDEX).read_bytes())
        if isinstance(found, dict) and found.get("format") == FORMAT:
            return True
    with suppress(OSError, UserError):
        return any(LATENTS in layout_of(file) for file in shards_of(path)[:1])
    return False


@dataclass(frozen=True)
class Store:
    """A store that was opened: index and shards fit each other."""

    root: Path
    index: Index
    layouts: tuple[dict[str, Place], ...]
    """Of each shard."""

    @staticmethod
    def open(root: Path) -> Store:
        """The store at ``root``, every shard held against its checksum. Shards without an index are given one.

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
        layouts = []
        bar = tqdm(index.shards, desc="checking shards", unit="shard", leave=False, delay=2)
        for shard in bar:
            file = root / shard.name
            if not file.is_file():
                raise UserError(f"{shown(root)}: shard {printable(shard.name)} of its {INDEX} is missing: put it back")
            layouts.append(layout_of(file))
            _require_fit(file, layouts[-1], index, shard)
            if sha256_of(file) != shard.sha256:
                raise UserError(
                    f"{shown(file)} is not the shard that its {INDEX} tells of (another sha256): put a copy back, or "
                    "encode again into another folder"
                )
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


def index_of(root: Path, files: Sequence[Path], held_out_every: int = HELD_OUT_EVERY) -> Index:
    """The index of shards that somebody else's extraction wrote, by one pass over them.

    Raises:
        UserError: no shards, an encode of ours that is not finished, shards that differ, latents that are not finite.
    """
    if not files:
        raise UserError(f"no latents at {shown(root)}: it has neither {INDEX} nor *.safetensors")
    shards, moments, classes = list[Shard](), dict[str, Moments](), 0
    first = layout_of(files[0])
    keys = [key for key in (LATENTS, FLIPPED) if key in first]
    done = 0
    for file in tqdm(files, desc="reading latents", unit="shard", delay=1):
        if about_shard(file) is not None:
            raise UserError(f"{shown(root)} is not finished: run the encode command again, it goes on where it stopped")
        layout = layout_of(file)
        place = layout.get(LATENTS)
        if place is None or len(place.shape) != 4 or place.dtype not in DTYPES:
            raise UserError(
                f"{shown(file)} has no {LATENTS} [n, ch, h, w] of {', '.join(str(t)[6:] for t in DTYPES.values())}"
            )
        shard = Shard(file.name, place.shape[0], sha256_of(file))
        _same_kind(file, layout, first, keys)
        train = torch.arange(done, done + shard.count) % held_out_every != held_out_every - 1
        with safe_open(file, framework="pt") as opened:
            for key in keys:
                latents = opened.get_tensor(key)
                if bad := not_finite(latents):
                    raise UserError(f"{shown(file)}: {key} {bad[0]} is NaN or infinite: extract it again")
                own = Moments.of(latents[train])
                moments[key] = moments[key].merged(own) if key in moments else own
        if LABELS in layout and len(labels := read_labels(file)):
            classes = max(classes, int(labels.max()) + 1)
        shards.append(shard)
        done += shard.count
    if done < held_out_every:
        raise UserError(f"{done} latents at {shown(root)}, need at least {held_out_every}")
    ch, h, w = first[LATENTS].shape[1:]
    return Index(
        shape=(ch, h, w),
        dtype=first[LATENTS].dtype,
        shards=tuple(shards),
        flips=FLIPPED in keys,
        classes=classes if classes > 1 else 0,
        label_names=None,
        held_out_every=held_out_every,
        moments=moments,
        autoencoder=None,
        preprocessing=None,
    )


def _same_kind(file: Path, layout: dict[str, Place], first: dict[str, Place], keys: Sequence[str]) -> None:
    for key in (LATENTS, FLIPPED, LABELS):
        if (key in layout) != (key in first):
            raise UserError(f"{shown(file)} {'has' if key in layout else 'has no'} {key}, unlike the first shard")
    count = layout[LATENTS].shape[0]
    for key in keys:
        place, like = layout[key], first[LATENTS]
        if (place.dtype, place.shape) != (like.dtype, (count, *like.shape[1:])):
            raise UserError(
                f"{shown(file)}: {key} is {place.dtype} {list(place.shape)}, expected {like.dtype} "
                f"{[count, *like.shape[1:]]} as in the first shard"
            )


def _require_fit(file: Path, layout: dict[str, Place], index: Index, shard: Shard) -> None:
    """See that the shard at ``file`` has the keys, shapes and dtype that the index says."""
    shape = (shard.count, *index.shape)
    for key in (LATENTS, FLIPPED) if index.flips else (LATENTS,):
        place = layout.get(key)
        if place is None or (place.dtype, place.shape) != (index.dtype, shape):
            found = "nothing" if place is None else f"{place.dtype} {list(place.shape)}"
            raise UserError(
                f"{shown(file)} and {INDEX} disagree: {key} is {found}, by the index {index.dtype} {list(shape)}; put "
                "back the shard or the index that belongs there"
            )
