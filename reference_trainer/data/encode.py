"""Images of a folder into a store of latents, shard by shard; what was interrupted goes on at the next shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.autoencoders import Autoencoder, KLAutoencoder
from reference_trainer.data.codecs import Codec
from reference_trainer.data.folders import class_names
from reference_trainer.data.images import ImageFolder, ImageSet, Notes, to_unit
from reference_trainer.data.latents import not_finite
from reference_trainer.data.moments import Moments
from reference_trainer.data.origin import Probe
from reference_trainer.data.shards import (
    DTYPES,
    FLIPPED,
    LABELS,
    LATENTS,
    VERSION,
    about_shard,
    layout_of,
    sha256_of,
    shards_of,
    shown,
    write_shard,
)
from reference_trainer.data.store import CODEC, INDEX, Index, Shard
from reference_trainer.data.stored import autoencoder_to_dict, load_codec, save_codec
from reference_trainer.errors import UserError, printable

FIT_MOST = 10_000
"""Images that an autoencoder is fitted on, evenly over those to train on: more do not fit in memory everywhere."""
PIECE = 250
"""Images read and encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What goes into a store."""

    source: ImageFolder
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

    def recipe(self, root: Path, files: Sequence[Path]) -> str:
        """A digest of all that the shards are made of, but for what is in the files."""
        about = asdict(self) | {"autoencoder": autoencoder_to_dict(self.autoencoder), "version": VERSION}
        del about["source"]["path"]  # a folder may move
        named = [(file.as_posix(), _size_of(root / file)) for file in files]
        return hashlib.sha256(json.dumps([about, named], sort_keys=True).encode()).hexdigest()[:16]


def encode_folder(encoding: Encoding, out: Path, device: torch.device, cache: Path) -> Index:
    """Write the store at ``out``; a finished one of the same images and options stays as it is.

    Images that cannot be read are left out, and said. Labels are the class folders', where all images are in such.

    Raises:
        UserError: see ``ImageFolder.load``; ``out`` holds something else; latents that are not finite, or too large
            for the dtype; no room. What was written stays good.
    """
    source = encoding.source
    root, files = source.files()
    names = class_names(files)
    recipe = encoding.recipe(root, files)
    there = _shards_there(out, recipe)
    if (out / INDEX).exists():
        index = Index.read(out)
        if set(there) != {shard.name for shard in index.shards}:
            raise UserError(f"{shown(out / INDEX)} is of other shards than lie beside it: give another --out")
        return index
    codec = _codec(encoding, root, files, out, recipe, device, cache)
    width = max(3, len(str((len(files) - 1) // encoding.shard)))  # in the order of their names
    shards, moments, notes = list[Shard](), dict[str, Moments](), Notes()
    done = 0
    with tqdm(total=len(files), desc="encoding", unit="img") as bar:
        for number, start in enumerate(range(0, len(files), encoding.shard)):
            part = files[start : start + encoding.shard]
            file = out / f"latents_rank00_shard{number:0{width}d}.safetensors"
            if (about := there.get(file.name)) is None:
                tensors = _encoded(encoding, codec, root, part, names, device, notes, bar)
                count = len(tensors[LATENTS])
                held_out = torch.arange(done, done + count) % source.held_out_every == source.held_out_every - 1
                own = {key: Moments.of(tensors[key][~held_out]) for key in tensors if key != LABELS}
                about = {"recipe": recipe, "count": count, "moments": {key: one.as_dict() for key, one in own.items()}}
                sha256 = write_shard(file, tensors, about)
            else:
                sha256 = sha256_of(file)
                bar.update(len(part))
            for key, found in about["moments"].items():
                here = Moments.from_dict(found)
                moments[key] = moments[key].merged(here) if key in moments else here
            shards.append(Shard(file.name, about["count"], sha256))
            done += about["count"]
    notes.say(of=len(files), resolution=source.resolution)
    source.require_enough(done)
    ch, h, w = layout_of(out / shards[0].name)[LATENTS].shape[1:]
    index = Index(
        shape=(ch, h, w),
        dtype=encoding.dtype,
        shards=tuple(shards),
        flips=encoding.flips,
        classes=len(names),
        label_names=names or None,
        held_out_every=source.held_out_every,
        moments=moments,
        autoencoder=autoencoder_to_dict(encoding.autoencoder),
        preprocessing={"resolution": source.resolution, "square": "largest, centred", "resize": "Lanczos"},
    )
    index.write(out)
    return index


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
    root: Path,
    files: Sequence[Path],
    out: Path,
    recipe: str,
    device: torch.device,
    cache: Path,
) -> Codec:
    """The one kept at ``out`` by an encode that was interrupted, else fitted or imported, and kept there."""
    if (out / CODEC).exists():
        codec, of = load_codec(out, encoding.autoencoder, device)
        if of == recipe:
            return codec
        raise UserError(
            f"{shown(out)} was begun with other images or options: give another --out, or delete that folder"
        )
    if shards_of(out):
        raise UserError(f"{shown(out)} has shards, but no {CODEC}: put it back, or delete that folder")
    source, notes = encoding.source, Notes()
    most = FIT_MOST if isinstance(encoding.autoencoder, KLAutoencoder) else PIECE
    every = source.held_out_every
    if len(files) <= most:
        pixels, names = source.read(root, files, notes)
        source.require_enough(len(names))
        is_held_out = torch.arange(len(names)) % every == every - 1
    else:  # of names: which images are held out is known when all are read
        trained = [file for i, file in enumerate(files) if i % every != every - 1]
        chosen = [trained[i * len(trained) // most] for i in range(min(most, len(trained)))]
        pixels, names = source.read(root, chosen, notes)
        is_held_out = torch.zeros(len(names), dtype=torch.bool)
        if isinstance(encoding.autoencoder, KLAutoencoder):
            tqdm.write(f"the autoencoder is fitted on {len(names)} of {len(files)} images, evenly over them")
    if not len(pixels):
        raise UserError(f"none of {len(files)} images below {printable(source.path)} can be read")
    images = ImageSet(root.name, pixels, None, is_held_out, names)
    codec = encoding.autoencoder.fit(images, device, cache)
    save_codec(out, codec, Probe.of(codec, images.train, device), images.pixels.shape[1], recipe)
    return codec


def _encoded(
    encoding: Encoding,
    codec: Codec,
    root: Path,
    files: Sequence[Path],
    classes: Sequence[str],
    device: torch.device,
    notes: Notes,
    bar: tqdm[NoReturn],
) -> dict[str, Tensor]:
    """The tensors of one shard; labels are 0 where there are no classes, since LightningDiT wants some."""
    keys = (LATENTS, FLIPPED) if encoding.flips else (LATENTS,)
    parts: dict[str, list[Tensor]] = {key: [] for key in keys}
    labels = list[int]()
    for start in range(0, len(files), PIECE):
        piece = files[start : start + PIECE]
        pixels, names = encoding.source.read(root, piece, notes)
        for key in keys:
            unit = to_unit(pixels if key == LATENTS else pixels.flip(-1)).to(device)
            # Of no image the shape alone is wanted, and an autoencoder may not take none.
            raw = codec.encode(unit) if len(unit) else codec.encode(unit.new_zeros(1, *unit.shape[1:]))[:0]
            parts[key].append(_stored(raw.cpu(), names, encoding.dtype))
        labels += [classes.index(Path(name).parts[0]) if classes else 0 for name in names]
        bar.update(len(piece))
    return {key: torch.cat(found) for key, found in parts.items()} | {LABELS: torch.tensor(labels, dtype=torch.long)}


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


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it will be named where it is read
        return -1
