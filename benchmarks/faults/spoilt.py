"""What a bad disk, a broken copy or a forger makes of a file: other bytes, another JSON, other tensors, a pickle."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_trainer.files import load_tensors, save_tensors


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.witness, "w")


def pickles(witness: Path) -> dict[str, bytes]:
    """Pickles as they come: bare, torch's two kinds, numpy's."""
    new, old, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"ema/x": Evil(witness)}, new)
    torch.save({"ema/x": Evil(witness)}, old, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Evil(witness)], dtype=object), allow_pickle=True)
    bare = pickle.dumps(Evil(witness))
    return {
        "a pickle": bare,
        "torch.save": new.getvalue(),
        "an old torch.save": old.getvalue(),
        "npy": array.getvalue(),
    }


def spoilt_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """As a bad disk, a broken copy and a person do it."""
    at = rng.randrange(1 + len(content))
    ways = {
        "empty": b"",
        "cut short": content[: min(at, len(content) - 1)],
        "zeroed from somewhere on": content[:at] + bytes(len(content) - at),
        "a byte more": content[:at] + b"\x00" + content[at:],
        "a byte less": content[:at] + content[at + 1 :],
        "random": rng.randbytes(len(content)),
        "HTML": b"<!DOCTYPE html><title>404</title>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a bit flipped": bytes(b ^ (1 if i == at else 0) for i, b in enumerate(content)),
        "all of it twice": content + content,
    }
    how = rng.choice(sorted(ways))
    return how, ways[how]


def leaves(witness: Path) -> tuple[Any, ...]:
    """Values that do not fit; of those that name code, whoever runs it makes a file."""
    touch = f"touch {witness}"
    return (
        *(None, True, -1, 0, 1.5, 2**40, 2**70, 1e308, float("nan"), float("inf")),
        *("", "x", "x" * 5000, "\x1b[31m\n\r", "../../../etc/passwd", "\x00", "\ud800", [], {}, [[]]),
        *({"part": "os:system", "command": touch}, {"part": "DiT"}, {"part": []}),
        *(f"__import__('os').system({touch!r})", [1, 2, 3], "1"),
    )


def paths_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all nodes but the root."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def spoilt_json(content: bytes, rng: random.Random, witness: Path) -> tuple[str, bytes]:
    """The same tree but for one node; or no JSON at all."""
    if rng.random() < 0.2:
        return spoilt_bytes(content, rng)
    if rng.random() < 0.1:
        how, found = rng.choice([("nested", b"[" * 10**5), ("a number", b"7"), ("null", b"null"), ("a list", b"[]")])
        return how, found
    tree = json.loads(content)
    *above, last = rng.choice(list(paths_in(tree)))
    node = tree
    for key in above:
        node = node[key]
    if rng.random() < 0.15:
        del node[last]
        return f"without {last}", json.dumps(tree).encode()
    if isinstance(node, dict) and rng.random() < 0.1:
        node["one more"] = rng.choice(leaves(witness))
        return "one key more", json.dumps(tree).encode()
    node[last] = rng.choice(leaves(witness))
    return f"{'.'.join(map(str, (*above, last)))} = {node[last]!r:.40}", json.dumps(tree).encode()


def rewritten(file: Path, spoil: Callable[[bytes, random.Random], tuple[str, bytes]], rng: random.Random) -> str:
    before = file.read_bytes()
    how, content = spoil(before, rng)
    if content == before:
        content, how = b"", "empty"
    file.write_bytes(content)
    return f"{file.name}: {how}"


def spoilt_tensors(file: Path, rng: random.Random, starts: tuple[str, ...]) -> str:
    """A file of ours, checksum and all, with something else in it."""
    tensors, about = load_tensors(file)
    there = sorted(name for name in tensors if name.startswith(starts) and tensors[name].numel())
    name = rng.choice(there)
    tensor = tensors[name]
    way = rng.randrange(6)
    if way == 0:
        del tensors[name]
        how = "is missing"
    elif way == 1:
        tensors[name], how = tensor.double() if tensor.dtype != torch.float64 else tensor.float(), "of another dtype"
    elif way == 2:
        tensors[name], how = torch.cat([tensor.reshape(-1), tensor.reshape(-1)]), "of another shape"
    elif way == 3 and about:
        key = rng.choice([key for key in sorted(about) if key not in ("notes", "origin", "recognised_at")])
        del about[key]
        name, how = "about", f"without {key}"
    elif way == 4:
        about = rng.choice([[], 7, None, "x"])  # type: ignore[assignment]
        name, how = "about", f"is {about!r}"
    else:
        tensors.clear()
        name, how = "all tensors", "gone"
    save_tensors(file, tensors, about)
    return f"{name} {how}"
