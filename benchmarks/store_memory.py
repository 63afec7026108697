"""Does memory grow with the data on disk, and what share of a step is spent reading them?

    python benchmarks/store_memory.py [--million] [--lightningdit] [--statistics] [--folder DIR]

For each number of entries: writes synthetic shards as LightningDiT's extraction does, of 10,000 entries each, then in
a process of its own makes the index, opens the store again, and trains some steps with a small network; prints the
seconds of each, the peak of its resident memory, and the share of a step that ``take`` needs (the files not in the
system's cache at first). 4 x 32 x 32 in float16 of 10^4 and 10^5 entries; with ``--million`` 10^6, 8.2 GB. With
``--lightningdit`` instead the shape of its ImageNet latents: 50,000 of 32 x 16 x 16 in float32, mirrored ones, too, and
labels, 3.3 GB. ``--statistics`` also measures box plots and covariance. The files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import write_json
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.data.autoencoders import PretrainedAutoencoder
from reference_trainer.data.latents import Latents
from reference_trainer.data.shards import shards_of
from reference_trainer.data.store import Store
from reference_trainer.data.stored import LatentStore, StoredImages
from reference_trainer.machine import cache_folder, describe_machine
from reference_trainer.networks import DiT
from reference_trainer.presets import ilct, on_data
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import Batches
from reference_trainer.training.start import latents_of_run
from reference_trainer.training.state import TrainState

CPU = torch.device("cpu")
A_FILE, STEPS = 10_000, 20


@dataclass(frozen=True)
class Case:
    """What is written."""

    n: int
    shape: tuple[int, int, int] = (4, 32, 32)
    dtype: str = "float16"
    flips: bool = False


class Tiles:
    """An autoencoder for latents of any channels: images of 3 channels, the first latent channels their colours."""

    def encode(self, images: Tensor) -> Tensor:
        return images.repeat(1, 11, 1, 1)[:, : self.channels]

    def decode(self, latents: Tensor) -> Tensor:
        self.channels = latents.shape[1]
        return latents[:, :3].clamp(-1, 1)


def load() -> Tiles:
    return Tiles()


def write(case: Case, root: Path) -> None:
    """The shards of ``case``: Gaussian numbers, drawn once and shifted in each latent for every further shard."""
    generator = torch.Generator().manual_seed(0)
    keys = ["latents", "latents_flip"] if case.flips else ["latents"]
    drawn = torch.randn(min(A_FILE, case.n), *case.shape, generator=generator).to(getattr(torch, case.dtype)).flatten(1)
    for number, start in enumerate(tqdm(range(0, case.n, A_FILE), desc="writing", unit="shard", leave=False)):
        count = min(A_FILE, case.n - start)
        shifted = (drawn[:count].roll(2 * number + i, 1) for i in range(len(keys)))
        tensors = {key: one.reshape(count, *case.shape) for key, one in zip(keys, shifted, strict=True)}
        tensors["labels"] = torch.randint(1000, (count,), generator=generator)
        save_file(tensors, root / f"latents_rank00_shard{number:03d}.safetensors")


def forget(root: Path) -> None:
    """Take the files out of the system's cache, as after a restart (Linux)."""
    for file in shards_of(root):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Timed:
    """``latents``, and the seconds that taking them took."""

    def __init__(self, latents: Latents) -> None:
        self.latents, self.seconds = latents, 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.latents.shape

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, indices: Tensor) -> Tensor:
        started = time.perf_counter()
        taken = self.latents.take(indices)
        self.seconds += time.perf_counter() - started
        return taken


def peak_mb() -> float:
    """Of the resident memory of this process so far (Linux). ``ru_maxrss`` would begin with that of the parent."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


def used(root: Path, flips: bool, statistics: bool) -> dict[str, Any]:
    """Index, open again, train; in a process of its own."""
    row: dict[str, Any] = {"imported_mb": peak_mb()}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        row[f"{name}_s"], row[f"{name}_peak_mb"] = time.perf_counter() - started, peak_mb()

    with timed("index"):
        store = Store.open(root)
    with timed("open_again"):
        Store.open(root)
    config = on_data(ilct(), root)
    config = replace(
        config,
        data=LatentStore(path=str(root), flips=flips),
        autoencoder=PretrainedAutoencoder(load="store_memory:load"),
        network=DiT(patch=4, layers=2),
        steps=STEPS,
    )
    with timed("start"), TemporaryDirectory() as folder:
        images = config.load_images(CPU)
        assert isinstance(images, StoredImages)
        latents, _ = latents_of_run(config, RunFolder(Path(folder)), images, cache_folder(), CPU)
    forget(root)
    reading = Timed(latents)
    batches, state = Batches(config, reading, images.train_labels), TrainState.create(config, latents.shape, CPU)
    f: nn.Module | Any = config.preconditioned(state.network.train())
    reading.seconds = 0.0
    with timed("train"):
        for step in range(STEPS):
            terms = config.objective(f, batches(step), state.c)
            terms.loss.backward()
            state.optimizer_step(config.optimizer, 1e-4)
            state.c = terms.state
    row |= {"steps": STEPS, "batch": config.batch_size, "reading_share": reading.seconds / row["train_s"]}
    if statistics:
        with timed("statistics"):
            row["eigenvalues"] = len(store.statistics["eigenvalues"] or ())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", action="store_true", help="10^6 entries, too: 8.2 GB of disk")
    parser.add_argument("--lightningdit", action="store_true", help="50,000 of 32 x 16 x 16, with mirrored ones")
    parser.add_argument("--statistics", action="store_true", help="measure box plots and covariance, too")
    parser.add_argument("--folder", type=Path, help="where there is room (default: that for temporary files)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5], help="numbers of entries")
    parser.add_argument("--used", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flips", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.used:
        print(json.dumps(used(options.used, options.flips, options.statistics)))
        return
    about, rows = describe_machine(), []
    name = "store_memory_lightningdit" if options.lightningdit else "store_memory"
    cases = [Case(n) for n in [*options.sizes, *([10**6] if options.million else [])]]
    if options.lightningdit:
        cases = [Case(50_000, (32, 16, 16), "float32", flips=True)]
    for case in cases:
        with TemporaryDirectory(dir=options.folder) as folder:
            write(case, Path(folder))
            forget(Path(folder))
            words = ["--used", folder, *(["--flips"] if case.flips else [])]
            words += ["--statistics"] if options.statistics else []
            done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
            gigabytes = sum(file.stat().st_size for file in shards_of(Path(folder))) / 1e9
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(vars(case) | {"gigabytes": gigabytes} | row)
        measured = f"; statistics {row['statistics_s']:.0f} s" if options.statistics else ""
        reading = f"reading {row['reading_share']:.1%} of a step of {row['train_s'] / STEPS:.3f} s"
        print(
            f"{case.n:8} x {'x'.join(map(str, case.shape))} {case.dtype}, {gigabytes:5.2f} GB: "
            f"index {row['index_s']:.1f} s, again {row['open_again_s']:.2f} s, start {row['start_s']:.1f} s; "
            f"peak {row['train_peak_mb']:.0f} MB ({row['imported_mb']:.0f} behind the imports); {reading}{measured}",
            flush=True,
        )
        file = write_json(name, rows, about)  # behind each: the largest takes long
    print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
