"""Are the losses the same for 1, 2 and 4 processes at one global batch, and for a sharded network?

    python benchmarks/ranks.py [--steps 40]

Trains the default recipe on the digits with 4 micro-batches in one process, in 2, in 4, and in 2 that shard the network
between them; prints the largest relative difference of any step's loss and of the weights from those of one process.
A difference grows with the steps: rounding in another order, and training is chaotic.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

from _processes import CPU, in_processes

from reference_trainer.presets import digits
from reference_trainer.ranks import Ranks
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train

CASES = {"1 process": (1, False), "2 processes": (2, False), "4 processes": (4, False), "2, sharded": (2, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        runs = {}
        for name, (processes, sharded) in CASES.items():
            in_processes(processes, trained, root / name, root / "cache", options.steps, sharded)
            runs[name] = RunFolder(root / name)
            pair = (runs["1 process"], runs[name])
            loss, weights = max(losses_apart(*pair)), weights_apart(*pair)
            print(
                f"{name:12} {options.steps} losses differ by {loss:.1e} at most, weights by {weights:.1e}", flush=True
            )


def trained(ranks: Ranks, root: Path, cache: Path, steps: int, sharded: bool) -> None:
    config = replace(digits(), steps=steps, log_every=1, save_every=steps, micro_batches=4)
    config = replace(config, autoencoder=replace(config.autoencoder, steps=30))
    run = RunFolder(root)
    if ranks.leads:
        run.root.mkdir()
        run.claim(config)
    train(config, run, config.load_images(CPU), cache, CPU, ranks=ranks, sharded=sharded)


def losses_apart(one: RunFolder, other: RunFolder) -> Iterator[float]:
    """Of each step."""
    for row, its in zip(one.metrics(), other.metrics(), strict=True):
        yield abs(row["consistency"] - its["consistency"]) / abs(row["consistency"])


def weights_apart(one: RunFolder, other: RunFolder) -> float:
    """Norm of the difference of the last weights, by their norm."""
    (_, first), (_, second) = (run.latest_checkpoint() or (0, {}) for run in (one, other))
    names = [name for name in first if name.startswith("network/")]
    apart = sum(float((first[name] - second[name]).square().sum()) for name in names)
    return float((apart / sum(float(first[name].square().sum()) for name in names)) ** 0.5)


if __name__ == "__main__":
    main()
