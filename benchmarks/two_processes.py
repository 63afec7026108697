"""How much faster are two processes than one, each with a core of its own?

    python benchmarks/two_processes.py [--rounds 3] [--tiny]

Encoding a folder of images, and training the default recipe on the digits at one global batch of two micro-batches: by
one process and by two, in turns, so that a machine that is slow for a while is so for both. Timed from where all have
met to where the last is done, of training well behind its start; what every process does alone at its start
is no part of it. Prints the seconds of each round and the ratio of one process to two, median and range; writes
results/two_processes_*.json. Needs two cores that are idle.

One process uses the second core, too, to prepare its next batch: of the two it keeps some share busy, its CPU seconds
over those of the clock, and two processes can be 2 / share times as fast at most. That bound is printed beside the
ratio, and the CPU time of one over that of two: what is missing from 1 there is what the ranks themselves cost, and
what two busy cores cost each other. How much that is shows `nothing_shared`, passes through the network alone.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _processes import CPU, in_processes, make_images
from _timing import Unsaved, write_json
from tqdm import tqdm

from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.machine import describe_machine
from reference_trainer.model import TrainedModel
from reference_trainer.presets import digits
from reference_trainer.ranks import Ranks
from reference_trainer.training.loop import train
from reference_trainer.training.state import TrainState

GOAL = 1.8
Spent = tuple[float, float]
"""Seconds of the wall, and of the CPU by all threads of this process."""


@dataclass(frozen=True)
class Size:
    """How much is done a round."""

    images: int
    steps: int
    log_every: int
    """A third of steps at most: between two looks at the clocks."""
    passes: int


FULL = Size(images=3000, steps=550, log_every=50, passes=400)
TINY = Size(images=60, steps=6, log_every=2, passes=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    size, about = TINY if options.tiny else FULL, describe_machine()
    rounds: list[dict[str, dict[int, dict[str, float]]]] = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images", size.images, side=64)
        in_processes(1, all_works, root, root / "first", TINY)  # fits and caches the autoencoders
        for number in tqdm(range(options.rounds), desc="rounds", unit="round"):
            spent: dict[str, dict[int, dict[str, float]]] = {work.__name__: {} for work in WORKS}
            for processes in (1, 2):
                at = root / f"{number}-{processes}"
                in_processes(processes, all_works, root, at, size)
                for what, taken in json.loads((at / "spent.json").read_text()).items():
                    spent[what][processes] = taken
            rounds.append(spent)
    rows = []
    for what in (work.__name__ for work in WORKS):
        found = [row[what] for row in rounds]
        ratios = [spent[1]["seconds"] / spent[2]["seconds"] for spent in found]
        for spent in found:
            print(f"{what}: 1 process {spent[1]['seconds']:.2f} s, 2 processes {spent[2]['seconds']:.2f} s")
        median, span = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        bound = 2 / statistics.median(spent[1]["share"] for spent in found)
        cpu = statistics.median(spent[1]["cpu"] / spent[2]["cpu"] for spent in found)
        print(
            f"{what}: 2 processes are {median:.2f} times as fast ({span}), goal {GOAL}; at most {bound:.2f}, as "
            f"1 keeps {2 / bound:.2f} cores busy; CPU time of 1 over that of 2: {cpu:.2f}"
        )
        rows.append({"what": what, "ratio": median, "bound": bound, "cpu": cpu, "ratios": ratios, "spent": found})
    if not options.tiny:
        write_json("two_processes", rows, about)


def all_works(ranks: Ranks, root: Path, at: Path, size: Size) -> None:
    """Do ``WORKS``, in files below ``at``; the leading rank writes what each took."""
    at.mkdir(exist_ok=True)
    spent = {work.__name__: watched(ranks, partial(work, ranks, root, at, size)) for work in WORKS}
    if ranks.leads:
        (at / "spent.json").write_text(json.dumps(spent))


def watched(ranks: Ranks, work: Callable[[], Spent]) -> dict[str, float]:
    """The seconds that ``work`` says it took; CPU seconds of all ranks in that time; and these over the others."""
    ranks.wait()
    seconds, cpu = work()
    total = torch.tensor([cpu], dtype=torch.float64)
    ranks.add_up([total])
    return {"seconds": seconds, "cpu": float(total), "share": float(total) / max(seconds, 1e-9)}


def clocks() -> Spent:
    """Of the wall, and of all threads of this process."""
    return time.perf_counter(), time.process_time()


def since(began: Spent, ended: Spent | None = None) -> Spent:
    """Seconds, until now."""
    wall, cpu = (now - then for now, then in zip(ended or clocks(), began, strict=True))
    return wall, cpu


def nothing_shared(ranks: Ranks, root: Path, at: Path, size: Size) -> Spent:
    """Seconds for passes through the default network, there and back, that the processes share out and that is all."""
    config = digits()
    f = config.preconditioned(TrainState.create(config, (2, 4, 4), CPU).network)
    x = torch.randn(128, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ranks.wait()
    began = clocks()
    for _ in range(size.passes // ranks.world):
        f(x, torch.ones(len(x))).sum().backward()
    ranks.wait()
    return since(began)


def encoding(ranks: Ranks, root: Path, at: Path, size: Size) -> Spent:
    """Seconds for all images; the autoencoder comes out of the cache."""
    source = ImageFolder(path=str(root / "images"), resolution=64)
    autoencoder = KLAutoencoder(steps=10, block_out_channels=(32, 64), latent_channels=4)
    shard = max(1, size.images // 20)
    ranks.wait()
    began = clocks()
    encode_folder(Encoding(source=source, autoencoder=autoencoder, shard=shard), at / "store", CPU, root / "cache")
    ranks.wait()
    return since(began)


def training(ranks: Ranks, root: Path, at: Path, size: Size) -> Spent:
    """Seconds for the steps between the first and the last look of ``Watch``."""
    config = replace(digits(), steps=size.steps, log_every=size.log_every, save_every=size.steps, micro_batches=2)
    config = replace(config, autoencoder=replace(config.autoencoder, steps=10), evaluate_every=size.log_every)
    run, watch = Unsaved(at / "run"), Watch()
    if ranks.leads:
        run.root.mkdir()
        run.claim(config)
    train(config, run, config.load_images(CPU), root / "cache", CPU, watch, ranks=ranks)
    return since(watch.looks[0], watch.looks[-1])


class Watch:
    """Reads the clocks of each rank where the trainer would evaluate."""

    def __init__(self) -> None:
        self.looks: list[Spent] = []

    def prepare(self, model: TrainedModel) -> None:
        """Nothing to try."""

    def share(self, model: TrainedModel, ranks: Ranks, stopped: Callable[[], bool]) -> bool:
        self.looks.append(clocks())
        return True

    def __call__(self, model: TrainedModel) -> None:
        if not torch.distributed.is_initialized():  # else ``share`` did
            self.looks.append(clocks())


WORKS = (nothing_shared, encoding, training)


if __name__ == "__main__":
    main()
