"""Tensors and JSON on disk, written atomically; tensors with a checksum. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference_trainer.errors import UserError, one_line


def save_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``about`` so that ``file`` is either the old one or whole.

    Of tensors on the CPU no copy is made, of those on another device one.

    Raises:
        UserError: no permission, no space: what stood at ``file`` before still does.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = as_json(about)
    metadata = {"about": said, "about_crc32": _checksum_of(said), "crc32": f"{_checksum(contiguous):08x}"}
    with _replacing(file) as temporary:
        save_file(contiguous, temporary, metadata)  # out of the tensors' own memory
        _sort_metadata(temporary)


def _sort_metadata(file: Path) -> None:
    """Safetensors orders them anew in each process; sorted, the same tensors are the same bytes everywhere."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the header is JSON without spaces, but for those behind it"
        opened.seek(8)
        opened.write(text.ljust(length))


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote: tensors on the CPU, and ``about``.

    Raises:
        UserError: the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            # Cloned: what comes is a window on the file, and would change with it.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (no mapping)
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if "crc32" not in metadata:
        raise UserError(f"cannot read {file}: it has no checksum, so this trainer did not write it")
    said = metadata.get("about", "")
    # Of earlier versions' files the tensors alone have a checksum.
    if metadata["crc32"] != f"{_checksum(tensors):08x}" or metadata.get("about_crc32") not in (
        None,
        _checksum_of(said),
    ):
        raise UserError(f"cannot read {file}: its checksum does not fit, the file is damaged")
    with as_written(file):
        about = json.loads(said)
        if not isinstance(about, dict):
            raise TypeError(f"about is {said[:20]}")
    return tensors, about


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Inside, what ``load_tensors`` gave is taken apart: what is missing in it, or does not fit, is the file's fault.

    Raises:
        UserError: just that.
    """
    try:
        yield
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"cannot read {file}: it is whole, but not what this trainer writes there ({one_line(error)[:200]})"
        ) from error


def as_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, in one line unless ``indent`` says otherwise.

    A number that is not finite becomes null: JSON has none, and its readers choke on Python's NaN.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_layout(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """See that ``found`` has the names, shapes and dtypes of ``expected``.

    Raises:
        UserError: names the first difference.
    """
    for name in (*expected, *found):
        if name not in found or name not in expected:
            raise UserError(f"{'no' if name in expected else 'an unknown'} tensor {name}")
        there, here = ((t.dtype, list(t.shape)) for t in (found[name], expected[name]))
        if there != here:
            raise UserError(f"{name} is {there[0]} {there[1]}, expected {here[0]} {here[1]}")


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that after a crash at any moment it is either the old one or whole.

    Raises:
        UserError: it could not be written; nothing has changed.
    """
    with _replacing(file) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """The name of a file to write; behind the block, on disk, it becomes ``file``.

    Raises:
        UserError: it could not be written; nothing has changed.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as opened:
            os.fsync(opened.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file}: {getattr(error, 'strerror', None) or error}; make room or make it writable, then "
            "run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Of files that a killed process was writing in ``folder``; let no other one be writing there."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            left.unlink()


def _checksum_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        data = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {data.dtype} {tuple(data.shape)}".encode(), crc)
        crc = zlib.crc32(data.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
