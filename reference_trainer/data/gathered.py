"""What an encode knows of the shards that are there: merged in their order, kept beside them, gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reference_trainer.data.index import Shard
from reference_trainer.data.moments import Moments
from reference_trainer.data.shards import FLIPPED, LATENTS, layout_of, sha256_of
from reference_trainer.data.statistics import Statistics, pieces_of
from reference_trainer.errors import UserError
from reference_trainer.files import as_written, load_tensors, save_tensors

GATHERED = Path("statistics", "gathered.safetensors")


@dataclass(frozen=True)
class Gathered:
    """Of the first shards of a store, all that its index says of them."""

    shards: tuple[Shard, ...] = ()
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of the training entries, under ``latents`` and ``latents_flip``."""
    statistics: Statistics | None = None
    """Of the training entries, not of the mirrored ones; None before the first."""

    @property
    def count(self) -> int:
        """Entries, held-out ones included."""
        return sum(shard.count for shard in self.shards)

    def with_shard(self, file: Path, held_out_every: int) -> Gathered:
        """With the next one, too, which is read. The order makes which entries are held out."""
        layout, moments, statistics = layout_of(file), dict(self.moments), self.statistics
        for key in (key for key in (LATENTS, FLIPPED) if key in layout):
            for piece in pieces_of(file, key, self.count, held_out_every):
                own = Moments.of(piece)
                moments[key] = moments[key].merged(own) if key in moments else own
                if key == LATENTS and len(piece):
                    statistics = (statistics or Statistics.begun(piece)).with_latents(piece)
        shard = Shard(file.name, layout[LATENTS].shape[0], sha256_of(file))
        return Gathered((*self.shards, shard), moments, statistics)

    def save(self, root: Path, recipe: str) -> None:
        """Keep it at ``root``, atomically."""
        about: dict[str, Any] = {"recipe": recipe, "shards": [vars(shard) for shard in self.shards]}
        about |= {"moments": {key: one.as_dict() for key, one in self.moments.items()}}
        tensors = {}
        if self.statistics is not None:
            tensors = dict(vars(self.statistics))
            about["count"] = tensors.pop("count")
        save_tensors(root / GATHERED, tensors, about)

    @staticmethod
    def kept(root: Path, recipe: str) -> Gathered:
        """What ``save`` kept; nothing, if it cannot be read, or a shard of it is no longer there."""
        try:
            tensors, about = load_tensors(root / GATHERED)
            with as_written(root / GATHERED):
                shards = tuple(Shard(**shard) for shard in about["shards"])
                moments = {key: Moments.from_dict(one) for key, one in about["moments"].items()}
                statistics = Statistics(**tensors, count=about["count"]) if tensors else None
                fits = about["recipe"] == recipe and all((root / shard.name).is_file() for shard in shards)
        except UserError:  # it can be had from the shards
            return Gathered()
        return Gathered(shards, moments, statistics) if fits else Gathered()


def gather(root: Path, files: Sequence[Path], recipe: str, held_out_every: int) -> Gathered:
    """Of those of ``files``, all shards of the store in order, before the first that is not there; kept at ``root``."""
    found = before = Gathered.kept(root, recipe)
    for file in files[len(found.shards) :]:
        if not file.is_file():
            break
        found = found.with_shard(file, held_out_every)
    if found is not before:
        found.save(root, recipe)
    return found


def tidy(root: Path) -> None:
    """Behind the index: take away what was kept to go on with, and what killed writers of shards left."""
    left = (*root.glob(".*.safetensors.*.tmp"), *(root / GATHERED).parent.glob(f".{GATHERED.name}.*.tmp"))
    for file in (root / GATHERED, *left):
        with suppress(OSError):
            file.unlink(missing_ok=True)
