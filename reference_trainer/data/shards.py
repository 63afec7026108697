"""One safetensors file of latents: where its tensors lie, what it says of itself, how it is written."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reference_trainer.errors import UserError, printable
from reference_trainer.files import as_json, as_written, write_atomically

FORMAT, VERSION = "robustcm latents", 1
LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors calls them."""


def shards_of(root: Path) -> list[Path]:
    """In the order of their names, which LightningDiT takes too."""
    return sorted(root.glob("*.safetensors"))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the file."""


def layout_of(file: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, and where they lie.

    Raises:
        UserError: it is none, or shorter or longer than it says.
    """
    try:
        with safe_open(file, framework="pt"):  # checks that what the header says fits the file
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {shown(file)}: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: Place(one["dtype"], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in header.items()
    }


def about_shard(file: Path) -> dict[str, Any] | None:
    """What ``write_shard`` was told of a shard; None of somebody else's.

    Raises:
        UserError: the file cannot be read.
    """
    layout_of(file)
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(FORMAT)
    with as_written(file):
        return None if text is None else dict(json.loads(text))


def write_shard(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Write one, atomically; returns its sha256. The same arguments give the same bytes."""
    # One entry: safetensors writes several in an order that changes from process to process.
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {FORMAT: as_json(about)})
    write_atomically(file, content)
    return hashlib.sha256(content).hexdigest()


def sha256_of(file: Path) -> str:
    """Of a file's content, a piece at a time."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {shown(file)}: {error.strerror}") from error


def read_rows(file: Path, place: Place, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the tensor at ``place``, or up to its end. Read, not mapped: see ``StoredLatents``.

    Raises:
        UserError: the file can no longer be read.
    """
    dtype, count = DTYPES[place.dtype], max(0, min(stop, place.shape[0]) - start)
    each = math.prod(place.shape[1:]) * dtype.itemsize
    out = torch.empty(count * each, dtype=torch.uint8)
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(place.start + start * each)
            if count and opened.readinto(out.numpy().data) != count * each:
                raise OSError(0, "it has become shorter")
    except OSError as error:
        raise UserError(f"cannot read {shown(file)}: {error.strerror}: put it back, and go on") from error
    return out.view(dtype).reshape(count, *place.shape[1:])


def read_labels(file: Path) -> Tensor:
    """int64 ``[n]`` of one shard.

    Raises:
        UserError: there are none.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(LABELS).long().flatten().clone()
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the {LABELS} of {shown(file)}: {error}") from error


def shown(path: Path) -> str:
    """A path as it can be printed."""
    return printable(str(path))
