"""Which feature network it was: what figures that are to share a table must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INSIDE = "whatever the network does itself"


@dataclass(frozen=True)
class Identity:
    """Of a feature network."""

    digest: str
    """Of its weights, or of what it makes of a few images: another network, another digest."""
    resize: str = INSIDE
    """How images are brought to the size the network takes, in words."""


def digest_of(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """16 hexadecimal digits that change with any name, shape, type or bit of ``tensors``, or with ``more``."""
    found = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest_of_file(file: Path) -> str:
    """16 hexadecimal digits that change with any byte of ``file``."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
