"""Images of any source into a store of latents, shard by shard; what was interrupted goes on at the next shard.

Started several times, or by torchrun, the processes share the shards: each takes one that nobody works at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.autoencoders import Autoencoder, KLAutoencoder, require_elsewhere
from reference_trainer.data.claims import Claims
from reference_trainer.data.codecs import Codec, notes_of
from reference_trainer.data.gathered import gather, tidy
from reference_trainer.data.images import ImageSet, to_unit
from reference_trainer.data.index import CODEC, INDEX, Index, keep_statistics
from reference_trainer.data.latents import not_finite
from reference_trainer.data.origin import Probe, name_of
from reference_trainer.data.reading import ImageFiles, Notes, Source, identity_of, read, require_enough
from reference_trainer.data.shards import (
    DTYPES,
    FLIPPED,
    LABELS,
    LATENTS,
    VERSION,
    about_shard,
    layout_of,
    shards_of,
    shown,
    write_shard,
)
from reference_trainer.data.stored import autoencoder_to_dict, load_codec, save_codec
from reference_trainer.errors import UserError, printable
from reference_trainer.files import write_atomically

FIT_MOST = 10_000
"""Images that an autoencoder is fitted on, evenly over those to train on: more do not fit in memory everywhere."""
LEFT_OUT = "left_out.txt"
"""Of a store: a line for each image that is not in it, and why."""
PIECE = 250
"""Images read and encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What goes into a store."""

    source: Source
    autoencoder: Autoencoder
    flips: bool = False
    """Also encode the mirrored images."""
    dtype: str = "F32"
    """A key of ``DTYPES``: what the latents are stored as."""
    shard: int = 4096
    """Image files a shard."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"a shard needs at least 1 image, got {self.shard}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")

    def recipe(self, files: ImageFiles) -> str:
        """A digest of all that the shards are made of, but for what is in the images."""
        about = asdict(self) | {"autoencoder": autoencoder_to_dict(self.autoencoder), "version": VERSION}
        del about["source"]["path"]  # a folder may move
        about["kind"] = type(self.source).__name__
        return hashlib.sha256(json.dumps([about, identity_of(files)], sort_keys=True).encode()).hexdigest()[:16]


def encode_folder(encoding: Encoding, out: Path, device: torch.device, cache: Path) -> Index:
    """Write the store at ``out``; a finished one of the same images and options stays as it is.

    Images that cannot be read are left out, said, and listed in ``left_out.txt``.

    Raises:
        UserError: see ``Source.open``; too few images; ``out`` holds something else; latents that are not finite, or
            too large for the dtype; no room. What was written stays good.
    """
    source = encoding.source
    files = source.open()
    recipe = encoding.recipe(files)
    there = _shards_there(out, recipe)
    if (out / INDEX).exists():
        index = Index.read(out)
        if set(there) != {shard.name for shard in index.shards}:
            raise UserError(f"{shown(out / INDEX)} is of other shards than lie beside it: give another --out")
        return index
    claims, notes = Claims(out / "claims"), Notes()
    try:
        with claims.held("codec"):  # one fits it
            codec = _codec(encoding, files, out, recipe, device, cache)
    except UserError:
        if not shards_of(out):
            claims.clear()
        raise
    width = max(3, len(str((len(files) - 1) // encoding.shard)))  # in the order of their names
    parts = {
        out / f"latents_rank00_shard{number:0{width}d}.safetensors": range(
            start, min(start + encoding.shard, len(files))
        )
        for number, start in enumerate(range(0, len(files), encoding.shard))
    }
    with tqdm(total=len(files), desc="encoding", unit="img") as bar:
        for file, ours in claims.shared(list(parts)):
            if ours:
                own = source.notes()
                tensors = _encoded(encoding, codec, files, parts[file], device, own, bar)
                about: dict[str, Any] = {"recipe": recipe, "count": len(tensors[LATENTS])}
                write_shard(file, tensors, about | {"unreadable": own.unreadable, "own": own.own})
                notes.enlarged += own.enlarged
            else:
                bar.update(len(parts[file]))
            with claims.held("statistics", wait=False) as free:
                if free:  # else another process gathers this one, too, or the last does
                    gather(out, list(parts), recipe, source.held_out_every)
    with claims.held("statistics"):
        if (out / INDEX).exists():  # another process was first
            return Index.read(out)
        found = gather(out, list(parts), recipe, source.held_out_every)
        for shard in found.shards:  # also those of another process, or of an encode before this one
            about = about_shard(out / shard.name) or {}
            notes.add(Notes(shard.count, about["unreadable"], about["own"]))
        notes.say(of=len(files), resolution=source.resolution)
        require_enough(found.count, files.where, source.held_out_every)
        left_out = notes.left_out()
        if left_out:
            write_atomically(out / LEFT_OUT, "".join(f"{line}\n" for line in left_out).encode())
        ch, h, w = layout_of(out / found.shards[0].name)[LATENTS].shape[1:]
        index = Index(
            shape=(ch, h, w),
            dtype=encoding.dtype,
            shards=found.shards,
            flips=encoding.flips,
            classes=0 if files.labels is None else files.labels.classes,
            label_names=None if files.labels is None else files.labels.names,
            held_out_every=source.held_out_every,
            moments=found.moments,
            autoencoder=autoencoder_to_dict(encoding.autoencoder),
            preprocessing={"resolution": source.resolution, "square": "largest, centred", "resize": "Lanczos"}
            | {"images": len(files), "left_out": len(left_out), "source": _about(source)},
            codec=notes_of(codec) or None,
            statistics=keep_statistics(out, found.statistics),
        )
        index.write(out)
        tidy(out)
    claims.clear()
    return index


def _about(source: Source) -> dict[str, Any]:
    """For an index.json; without the folder that the source lies in, which may move."""
    path = Path(source.path)
    given = {name: value for name, value in asdict(cast(Any, source)).items() if value is not None}
    return {"kind": type(source).__name__} | given | {"path": path.resolve().name if path.exists() else source.path}


def _shards_there(out: Path, recipe: str) -> dict[str, dict[str, Any]]:
    """What the shards at ``out`` say of themselves, by name.

    Raises:
        UserError: one is of other images or options, or somebody else's.
    """
    found = {}
    for file in shards_of(out):
        about = about_shard(file)
        if about is None or about["recipe"] != recipe:
            raise UserError(
                f"{shown(file)} is of other images, another autoencoder or other options: give another --out, or "
                "delete that folder"
            )
        found[file.name] = about
    return found


def _codec(
    encoding: Encoding,
    files: ImageFiles,
    out: Path,
    recipe: str,
    device: torch.device,
    cache: Path,
) -> Codec:
    """The one kept at ``out`` by an encode that was interrupted, else fitted or imported, and kept there."""
    require_elsewhere(encoding.autoencoder, out)  # else it could be written, and never opened again
    if (out / CODEC).exists():
        codec, of = load_codec(out, encoding.autoencoder, device)
        if of == recipe:
            return codec
        raise UserError(
            f"{shown(out)} was begun with other images or options: give another --out, or delete that folder"
        )
    if shards_of(out):
        raise UserError(f"{shown(out)} has shards, but no {CODEC}: put it back, or delete that folder")
    images = images_to_fit(encoding, files, split_of(encoding, files))
    codec = encoding.autoencoder.fit(images, device, cache)
    probe = Probe.of(codec, images.train, device)
    if not len(probe.pixels):  # kept, it would have nothing to know a mended one by
        raise UserError(
            f"{name_of(codec)} gives NaN or infinite latents of each of the images it was tried on: mend it; nothing "
            "is written"
        )
    save_codec(out, codec, probe, images.pixels.shape[1], recipe)
    return codec


def split_of(encoding: Encoding, files: ImageFiles) -> tuple[list[int], list[int]]:
    """Numbers of the files to train on, and of those held out, as the store will have them.

    The store counts images that can be read. Where an autoencoder is fitted on some of many, all are read to know which
    those are, or one would be fitted on images that are held out; where nothing is fitted, the files count.

    Raises:
        UserError: too few images can be read.
    """
    every, there = encoding.source.held_out_every, list(range(len(files)))
    if isinstance(encoding.autoencoder, KLAutoencoder) and len(files) > FIT_MOST:
        there = _readable(encoding, files)
        require_enough(len(there), files.where, every)
    return [i for place, i in enumerate(there) if place % every != every - 1], there[every - 1 :: every]


def _readable(encoding: Encoding, files: ImageFiles) -> list[int]:
    """Numbers of the files that will be in the store; a few are in memory at a time."""
    there, notes = list[int](), encoding.source.notes()
    with tqdm(total=len(files), desc="reading images to split them", unit="img", leave=False, delay=1) as bar:
        for start in range(0, len(files), PIECE):
            piece = range(start, min(start + PIECE, len(files)))
            there += read(files, piece, encoding.source.resolution, notes)[1]
            bar.update(len(piece))
    return there


def images_to_fit(encoding: Encoding, files: ImageFiles, split: tuple[Sequence[int], Sequence[int]]) -> ImageSet:
    """What the autoencoder is fitted on, or tried on: of many images some.

    Args:
        split: see ``split_of``.
    Raises:
        UserError: too few images, or none that can be read.
    """
    source, notes = encoding.source, encoding.source.notes()
    most = FIT_MOST if isinstance(encoding.autoencoder, KLAutoencoder) else PIECE
    every = source.held_out_every
    if len(files) <= most:
        pixels, kept = read(files, range(len(files)), source.resolution, notes)
        require_enough(len(kept), files.where, every)
        is_held_out = torch.arange(len(kept)) % every == every - 1
    else:
        trained = split[0]
        chosen = [trained[i * len(trained) // most] for i in range(min(most, len(trained)))]
        pixels, kept = read(files, chosen, source.resolution, notes)
        is_held_out = torch.zeros(len(kept), dtype=torch.bool)
        if isinstance(encoding.autoencoder, KLAutoencoder):
            tqdm.write(f"the autoencoder is fitted on {len(kept)} of {len(files)} images, evenly over them")
    if not len(pixels):
        raise UserError(f"none of the images {files.where} can be read")
    return ImageSet(Path(source.path).name, pixels, None, is_held_out, tuple(map(files.name, kept)))


def _encoded(
    encoding: Encoding,
    codec: Codec,
    files: ImageFiles,
    part: Sequence[int],
    device: torch.device,
    notes: Notes,
    bar: tqdm[NoReturn],
) -> dict[str, Tensor]:
    """The tensors of one shard; labels are 0 where there are no classes, since LightningDiT wants some."""
    keys = (LATENTS, FLIPPED) if encoding.flips else (LATENTS,)
    parts: dict[str, list[Tensor]] = {key: [] for key in keys}
    labels = list[Tensor]()
    for start in range(0, len(part), PIECE):
        piece = part[start : start + PIECE]
        pixels, kept = read(files, piece, encoding.source.resolution, notes)
        for key in keys:
            unit = to_unit(pixels if key == LATENTS else pixels.flip(-1)).to(device)
            # Of no image the shape alone is wanted, and an autoencoder may not take none.
            raw = codec.encode(unit) if len(unit) else codec.encode(unit.new_zeros(1, *unit.shape[1:]))[:0]
            parts[key].append(_stored(raw.cpu(), [files.name(index) for index in kept], encoding.dtype))
        chosen = torch.tensor(kept, dtype=torch.long)
        labels.append(torch.zeros_like(chosen) if files.labels is None else files.labels.of[chosen])
        bar.update(len(piece))
    return {key: torch.cat(found) for key, found in parts.items()} | {LABELS: torch.cat(labels)}


def _stored(raw: Tensor, names: Sequence[str], dtype: str) -> Tensor:
    """``raw [n, ch, h, w]`` as it is stored.

    Raises:
        UserError: it is not finite, or not as ``dtype``.
    """
    for latents, why in (
        (raw, "mend the autoencoder, or take these images away"),
        (stored := raw.to(DTYPES[dtype]), f"they are too large for {str(DTYPES[dtype])[6:]}: take --dtype float32"),
    ):
        if bad := not_finite(latents):
            named = ", ".join(printable(names[index]) for index in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"latents of {len(bad)} images are NaN or infinite ({named}{more}): {why}")
    return stored
