"""Inputs that should be refused: images, stores, configurations, checkpoints, pickles, command lines, tables."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fuzz_images import damaged, random_changes, samples
from hostile_words import BAD_LINES, BAD_WORDS
from PIL import Image
from safetensors.torch import load_file, save_file
from spoilt import pickles, rewritten, spoilt_bytes, spoilt_json, spoilt_tensors
from torch import Tensor

from reference_trainer.data.index import CODEC, INDEX
from reference_trainer.data.shards import FORMAT, sha256_of
from reference_trainer.files import load_tensors, save_tensors

TINY = ("pixels", "steps=1", "batch_size=4", "data.resolution=16", "network=DiT(width=8,layers=1,heads=2,patch=8)")
"""A training of a moment."""
FLIPPED = "a bit flipped"
"""In the name of a file's own checksum it is harmless; that any other is seen, tests/test_hostile.py shows."""


@dataclass(frozen=True)
class Case:
    """One command line, and the files it meets."""

    about: str
    """What was done to them, in a few words."""
    words: list[str]
    must_fail: bool = True
    """False: the change may be harmless, as that of a comment is; such a case may end well, and then is not counted."""


@dataclass(frozen=True)
class Good:
    """What is copied, and the copy spoilt; all below ``root``, and small."""

    root: Path

    @property
    def images(self) -> Path:
        """24 pictures in two class folders."""
        return self.root / "images"

    @property
    def run(self) -> Path:
        """A finished training on their pixels."""
        return self.root / "run"

    @property
    def store(self) -> Path:
        """Of their pixels as latents, in two shards, with labels."""
        return self.root / "store"

    @property
    def witness(self) -> Path:
        """Is there if something was executed."""
        return self.root.parent / "executed"


# --- Kinds of input ---------------------------------------------------------------------------------------------------


def images(good: Good, folder: Path, rng: random.Random) -> Case:
    """A folder of nine files, one too few if all were good, that are called images."""
    data, content = folder / "images", samples()
    data.mkdir()
    changes = np.random.default_rng(rng.randrange(2**32))
    for i in range(9):
        name = rng.choice(sorted(content))
        file, way = data / f"{i}-{name}", rng.randrange(6)
        if way < 3:
            file.write_bytes(damaged(content[name], random_changes(changes)))
        elif way == 3:
            file.write_bytes(rng.choice(list(pickles(good.witness).values())))
        elif way == 4:
            file.write_bytes(spoilt_bytes(content[name], rng)[1])
        else:
            rng.choice([file.mkdir, lambda f=file: f.symlink_to(f), lambda f=file: os.mkfifo(f)])()
    for name in ("x\n\x1b[31m.eps", "x\n\x1b[31m.png"):  # a program, for who runs it
        (data / name).write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n({good.witness}) (w) file closefile\n")
    return Case("nine damaged images", ["train", *TINY, f"--data={data}", f"--out={folder / 'out'}"])


def stores(good: Good, folder: Path, rng: random.Random) -> Case:
    """A store of latents, damaged or made up; some of it so that all checksums fit."""
    store = folder / "store"
    shutil.copytree(good.store, store)
    shards = sorted(store.glob("*.safetensors"))
    shard, way, sure = rng.choice(shards), rng.randrange(7), True
    if way == 0:
        about = rewritten(shard, spoilt_bytes, rng)
    elif way == 1:
        about, sure = rewritten(store / INDEX, partial(spoilt_json, witness=good.witness), rng), False
    elif way == 2:
        about = rewritten(store / CODEC, spoilt_bytes, rng)
        sure = not about.endswith(FLIPPED)
    elif way == 3:
        about = f"{CODEC.name}: {spoilt_tensors(store / CODEC, rng, ('probe/',))}"
        sure = not about.endswith("dtype")  # of the same numbers
    elif way == 4:
        shard.write_bytes(rng.choice(list(pickles(good.witness).values())))
        about = "a pickle for a shard"
    else:
        about = spoilt_shard(shard, rng)
        if way == 5:  # as somebody else's extraction leaves them
            (store / INDEX).unlink()
            for other in set(shards) - {shard}:
                save_file(load_file(other), other)
        else:
            fit_index(store, shard)
    words = [word for word in TINY if "=" in word and not word.startswith("data.")]
    return Case(about, ["train", *words, f"--data={store}", f"--out={folder / 'out'}", "--brief"], sure)


def spoilt_shard(file: Path, rng: random.Random) -> str:
    """Safetensors still, but no latents that one could train on."""
    tensors = load_file(file)
    latents, labels = tensors["latents"], tensors["labels"]
    nan = latents.clone()
    nan.view(-1)[rng.randrange(nan.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    ways: dict[str, dict[str, Tensor]] = {
        "other keys": {"x": latents, "y": labels},
        "no latents": {"labels": labels},
        "no rows": {"latents": latents[:0], "labels": labels[:0]},
        "no maps": {"latents": latents.flatten(1), "labels": labels},
        "float64": {"latents": latents.double(), "labels": labels},
        "another size": {"latents": latents[..., :-1].contiguous(), "labels": labels},
        "not finite": {"latents": nan, "labels": labels},
        "labels below 0": {"latents": latents, "labels": labels - 2},
        "labels of floats": {"latents": latents, "labels": torch.full(labels.shape, torch.nan)},
        "labels too few": {"latents": latents, "labels": labels[:-1].contiguous()},
        "labels out of range": {"latents": latents, "labels": labels + 2**62},
        "labels too many": {"latents": latents, "labels": labels.repeat(2)},
    }
    how = rng.choice(sorted(ways))
    said = {FORMAT: rng.choice(["{}", "[]", "{", "null"])} if rng.random() < 0.2 else None
    save_file(ways[how], file, said)
    return f"{file.name}: {how}"


def fit_index(store: Path, shard: Path) -> None:
    """The checksum of ``shard`` is that of what it is now: who forges a shard forges this, too."""
    index = json.loads((store / INDEX).read_bytes())
    for one in index["shards"]:
        one["sha256"] = sha256_of(shard) if one["name"] == shard.name else one["sha256"]
    (store / INDEX).write_text(json.dumps(index))


def copied_run(good: Good, folder: Path) -> Path:
    return shutil.copytree(good.run, folder / "run", ignore=shutil.ignore_patterns("tensorboard", ".lock"))


def use_of(run: Path, rng: random.Random) -> list[str]:
    return rng.choice([["sample", str(run), "--n=2"], ["train", f"--out={run}", "--brief"], ["evaluate", str(run)]])


def configurations(good: Good, folder: Path, rng: random.Random) -> Case:
    """config.json of a run that is sampled from, or evaluated."""
    run = copied_run(good, folder)
    about = rewritten(run / "config.json", partial(spoilt_json, witness=good.witness), rng)
    return Case(about, rng.choice([["sample", str(run), "--n=2"], ["evaluate", str(run), "--samples=4"]]), False)


def checkpoints(good: Good, folder: Path, rng: random.Random) -> Case:
    """A checkpoint, or the file of a run's latent space: damaged, of another network, or whole with nonsense in it."""
    run = copied_run(good, folder)
    (checkpoint,) = (run / "checkpoints").iterdir()
    space, way = run / "autoencoder.safetensors", rng.randrange(6)
    words = use_of(run, rng)
    if way < 2:
        about = rewritten((checkpoint, space)[way], spoilt_bytes, rng)
        return Case(about, words, must_fail=not about.endswith(FLIPPED))
    if way == 2:
        return Case(f"{checkpoint.name}: {spoilt_tensors(checkpoint, rng, ('ema/',))}", words)
    if way == 3:
        return Case(f"{space.name}: {spoilt_tensors(space, rng, ('mean', 'std'))}", words)
    tensors, about = load_tensors(checkpoint)
    if way == 4:
        step = rng.choice([-1, "1", None, True, 1.5, 2**70, [1]])
        save_tensors(checkpoint, tensors, about | {"step": step})
        return Case(f"{checkpoint.name} of step {step!r}", words)
    for name, tensor in tensors.items():
        if name.startswith("ema/"):
            tensors[name] = torch.full_like(tensor, rng.choice([torch.nan, torch.inf]))
    save_tensors(checkpoint, tensors, about)
    return Case(f"{checkpoint.name}: weights that are not finite", ["sample", str(run), "--n=2"])


def disguised(good: Good, folder: Path, rng: random.Random) -> Case:
    """Pickles under every name that is read: whoever loads one has executed it."""
    how, content = rng.choice(sorted(pickles(good.witness).items()))
    run, way = copied_run(good, folder), rng.randrange(8)
    places = [*(run / "checkpoints").iterdir(), run / "autoencoder.safetensors", run / "config.json"]
    if way < 3:
        places[way].write_bytes(content)
        return Case(f"{places[way].name} is {how}", use_of(run, rng))
    file = folder / rng.choice(["x.pt", "x.ts"] if way < 5 else ["x.pt", "x.bin", "x.zip", "x.npy"])
    file.write_bytes(content)
    if way < 5:
        return Case(f"--features {how}", ["evaluate", str(run), f"--features={file}"])
    if way == 5:
        return Case(f"{how} for data", ["train", *TINY, f"--data={file}", f"--out={folder / 'out'}"])
    if way == 6:
        return Case(f"{how} to encode", ["encode", str(file), "--autoencoder=PixelSpace", f"--out={folder / 'out'}"])
    network, weights = folder / "network", "diffusion_pytorch_model"
    network.mkdir()
    (network / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))
    (network / rng.choice([f"{weights}.bin", f"{weights}.safetensors", f"{weights}.pt"])).write_bytes(content)
    words = ["encode", str(good.images), f"--autoencoder={network}", f"--out={folder / 'out'}", "--resolution=16"]
    return Case(f"{how} for weights of diffusers", words)


def tables(good: Good, folder: Path, rng: random.Random) -> Case:
    """A zip with a dataset.json: its bytes, its names, its labels."""
    file, way = folder / "data.zip", rng.randrange(4)
    names = sorted(path.relative_to(good.images).as_posix() for path in good.images.rglob("*.png"))
    table, about, sure = {"labels": [[name, i % 3] for i, name in enumerate(names)]}, "", False
    written, label = json.dumps(table).encode(), rng.choice([-1, 1.5, "1", None, True, [0], 10**6, 2**70, {}])
    if way == 0:
        about, written = spoilt_json(written, rng, good.witness)
    elif way == 1:
        table["labels"][rng.randrange(len(names))][1] = label
        about, written, sure = f"label {label!r}", json.dumps(table).encode(), True
    outside = rng.choice(["../x.png", "/x.png", "a/../../x.png"])
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        for name in names:
            archive.write(good.images / name, outside if way == 2 and name == names[0] else name)
        if way == 2:
            archive.writestr(names[-1], b"twice")
            about, sure = f"{outside}, and a name twice", True
        archive.writestr("dataset.json", written)
    if way == 3:
        about = rewritten(file, spoilt_bytes, rng)
    words = ["encode", str(file), "--autoencoder=PixelSpace", f"--out={folder / 'out'}", "--resolution=16"]
    return Case(about, words, sure)


def command_lines(good: Good, folder: Path, rng: random.Random) -> Case:
    """Among words that are right, one that is not; or the like of the other commands."""
    about = {"run": good.run, "images": good.images, "store": good.store, "out": folder / "out"}
    if rng.random() < 0.3:
        line = rng.choice(BAD_LINES)
        return Case(line, line.format_map(about).split())
    if rng.random() < 0.3:
        word = "".join(rng.choice("ab=.-_()[]{}'\"\\,:*~ \t\néß漢\u202e0123456789") for _ in range(rng.randint(1, 30)))
    else:
        word = rng.choice(BAD_WORDS).replace("{witness}", str(good.witness))
    right = [*TINY, f"--data={good.images}", f"--out={folder / 'out'}"]
    rng.shuffle(right)
    return Case(f"{word!r:.60}", ["train", *right, word])  # of a value given twice the last one counts


KINDS: dict[str, Callable[[Good, Path, random.Random], Case]] = {
    "images": images,
    "stores": stores,
    "configurations": configurations,
    "checkpoints": checkpoints,
    "pickles in disguise": disguised,
    "command lines": command_lines,
    "zips and dataset.json": tables,
}


def make_good(root: Path, command: Callable[[list[str]], tuple[int, str]]) -> Good:
    """Images, a run and a store, by the command line; ``command`` gives status and what was said."""
    good, pixels = Good(root), np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        file = good.images / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    encode = ["encode", str(good.images), "--autoencoder=PixelSpace", "--resolution=16", "--shard=12"]
    for line in (
        ["train", *TINY, f"--data={good.images}", f"--out={good.run}", "--brief"],
        [*encode, f"--out={good.store}"],
    ):
        status, said = command(line)
        if status:
            raise SystemExit(f"what is to be spoilt cannot be made: {' '.join(line)}\n{said}")
    return good
