"""index.json of a store: what it says, how it is made of shards of somebody else's, whether shards fit it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reference_trainer.data.labels import MOST_CLASSES
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
    read_rows,
    sha256_of,
    shards_of,
    shown,
)
from reference_trainer.data.statistics import ROWS, Statistics
from reference_trainer.errors import UserError
from reference_trainer.files import as_json, save_tensors, write_atomically

INDEX, CODEC = "index.json", Path("autoencoder", "codec.safetensors")
COVARIANCE = Path("statistics", "covariance.safetensors")
HELD_OUT_EVERY = 10
"""Of shards that somebody else wrote; as ``ImageFolder`` has it."""


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
    statistics: dict[str, Any] | None = None
    """Of the training entries, mirrored ones left out: see ``keep_statistics``. None: not measured yet."""

    @property
    def count(self) -> int:
        """Entries, held-out ones included."""
        return sum(shard.count for shard in self.shards)

    @property
    def held_out(self) -> int:
        """Entries never trained on."""
        return self.count // self.held_out_every

    def require_sense(self) -> None:
        """See that its parts fit each other, whoever wrote it.

        Raises:
            ValueError: names those that do not.
        """
        ch, *_ = self.shape
        texts = [text for shard in self.shards for text in (shard.name, shard.sha256)]
        noted = (self.autoencoder, self.preprocessing, self.codec, self.statistics)
        sense = {
            "shape": min(self.shape) > 0,
            "dtype": self.dtype in DTYPES,
            "shards": all(isinstance(text, str) and text == Path(text).name for text in texts)
            and all(shard.count >= 0 for shard in self.shards),
            "held_out_every": self.held_out_every >= 2,
            "classes": 0 <= self.classes <= MOST_CLASSES
            and len(self.label_names or range(self.classes)) == self.classes,
            "moments": {LATENTS, *([FLIPPED] if self.flips else [])} <= self.moments.keys()
            and all(one.makes_sense(ch) for one in self.moments.values()),
            "autoencoder, preprocessing, codec or statistics": all(
                note is None or type(note) is dict for note in noted
            ),
        }
        if wrong := [name for name, makes in sense.items() if not makes]:
            raise ValueError(f"its {', '.join(wrong)} make no sense")

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
                label_names=None if names is None else tuple(map(str, names)),
                held_out_every=int(found["held_out_every"]),
                moments={key: Moments.from_dict(one) for key, one in found["moments"].items()},
                autoencoder=found["autoencoder"],
                preprocessing=found["preprocessing"],
                codec=found.get("codec"),
                statistics=found.get("statistics"),
            )
            index.require_sense()
        except (OSError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
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


def keep_statistics(root: Path, found: Statistics | None) -> dict[str, Any]:
    """Write the covariance below ``root``, if there is one; returns what the index says: ``Statistics.summary`` and
    ``covariance``, its file, shape and bytes, or None.

    Raises:
        UserError: no room.
    """
    if found is None:
        return {"boxes": [], "eigenvalues": None, "left_out": "nothing is trained on", "covariance": None}
    about, covariance = None, found.covariance()
    if covariance is not None:
        save_tensors(root / COVARIANCE, {"mean": found.mean, "covariance": covariance}, {"count": found.count})
        size = (root / COVARIANCE).stat().st_size
        about = {"file": COVARIANCE.as_posix(), "shape": list(covariance.shape), "bytes": size}
    return found.summary() | {"covariance": about}


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
        for key, start in product(keys, range(0, max(1, shard.count), ROWS)):
            latents = read_rows(file, layout[key], start, start + ROWS)
            if bad := not_finite(latents):
                raise UserError(f"{shown(file)}: {key} {start + bad[0]} is NaN or infinite: extract it again")
            own = Moments.of(latents[train[start : start + ROWS]])
            moments[key] = moments[key].merged(own) if key in moments else own
        if LABELS in layout and len(labels := read_labels(file)):
            low, high = int(labels.min()), int(labels.max())
            if len(labels) != shard.count or low < 0 or high >= MOST_CLASSES:
                raise UserError(
                    f"{shown(file)} has {len(labels)} {LABELS} from {low} on, up to {high}, of {shard.count} latents, "
                    f"expected one each, 0 to {MOST_CLASSES - 1}: extract it again"
                )
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


def require_fit(file: Path, layout: dict[str, Place], index: Index, shard: Shard) -> None:
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
