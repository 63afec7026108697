"""How much faster are two processes than one, each with a core of its own?

    python benchmarks/two_processes.py [--rounds 3] [--tiny]

Encoding a folder of images, and training the default recipe on the digits at one global batch of two micro-batches: by
one process and by two, in turns, so that a machine that is slow for a while is so for both. Timed from where all have
met to where the last is done, of training from the first log to the last; what every process does alone at its start
is no part of it. Prints the seconds of each round and the ratio of one process to two, median and range; writes
results/two_processes_*.json. Needs two cores that are idle: what stands in a row of one process beside it may use the
second core, too, to prepare the next batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from _processes import CPU, in_processes, make_images
from _timing import write_json
from tqdm import tqdm

from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.machine import describe_machine
from reference_trainer.presets import digits
from reference_trainer.ranks import Ranks
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train

GOAL = 1.8


@dataclass(frozen=True)
class Size:
    """How much is done a round."""

    images: int
    steps: int
    log_every: int
    """A divisor of steps, smaller than it."""


FULL, TINY = Size(images=3000, steps=550, log_every=50), Size(images=60, steps=4, log_every=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    size, about = TINY if options.tiny else FULL, describe_machine()
    rounds: list[dict[str, dict[int, float]]] = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images", size.images, side=64)
        in_processes(1, both, root, root / "first", TINY)  # fits and caches the autoencoders
        for number in tqdm(range(options.rounds), desc="rounds", unit="round"):
            seconds: dict[str, dict[int, float]] = {"encoding": {}, "training": {}}
            for processes in (1, 2):
                at = root / f"{number}-{processes}"
                in_processes(processes, both, root, at, size)
                for what, taken in json.loads((at / "seconds.json").read_text()).items():
                    seconds[what][processes] = taken
            rounds.append(seconds)
    rows = []
    for what in ("encoding", "training"):
        ratios = [row[what][1] / row[what][2] for row in rounds]
        for row in rounds:
            print(f"{what}: 1 process {row[what][1]:.2f} s, 2 processes {row[what][2]:.2f} s")
        median, span = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{what}: 2 processes are {median:.2f} times as fast ({span}), goal {GOAL}")
        rows.append({"what": what, "ratio": median, "ratios": ratios, "seconds": [row[what] for row in rounds]})
    if not options.tiny:
        write_json("two_processes", rows, about)


def both(ranks: Ranks, root: Path, at: Path, size: Size) -> None:
    """Encode, then train, in files below ``at``; the leading rank writes the seconds of each."""
    at.mkdir(exist_ok=True)
    seconds = {"encoding": encoding(ranks, root, at, size), "training": training(ranks, root, at, size)}
    if ranks.leads:
        (at / "seconds.json").write_text(json.dumps(seconds))


def encoding(ranks: Ranks, root: Path, at: Path, size: Size) -> float:
    """Seconds for all images; the autoencoder comes out of the cache."""
    source = ImageFolder(path=str(root / "images"), resolution=64)
    autoencoder = KLAutoencoder(steps=10, block_out_channels=(32, 64), latent_channels=4)
    shard = max(1, size.images // 20)
    ranks.wait()
    started = time.perf_counter()
    encode_folder(Encoding(source=source, autoencoder=autoencoder, shard=shard), at / "store", CPU, root / "cache")
    ranks.wait()
    return time.perf_counter() - started


def training(ranks: Ranks, root: Path, at: Path, size: Size) -> float:
    """Seconds for the steps behind the first log."""
    config = replace(digits(), steps=size.steps, log_every=size.log_every, save_every=size.steps, micro_batches=2)
    config = replace(config, autoencoder=replace(config.autoencoder, steps=10))
    run = RunFolder(at / "run")
    if ranks.leads:
        run.root.mkdir()
        run.claim(config)
    train(config, run, config.load_images(CPU), root / "cache", CPU, ranks=ranks)
    rows = run.metrics() if ranks.leads else [{"seconds": 0.0}]
    return float(rows[-1]["seconds"] - rows[0]["seconds"])


if __name__ == "__main__":
    main()
