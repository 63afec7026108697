"""Does a run with 1 % of its batches poisoned end with the quality of a clean one?

    python benchmarks/faults/poison.py [--share 0.01] [--steps 800] [--seeds 0 1 2] [--width 64]

Trains the digits for --steps with a narrower network, clean and with a NaN in one sample of a random share of the
batches, from the same seeds, two runs at a time, and prints the Frechet distances of both at one and two evaluations,
and their ratio beside what another seed changes. Exit status 1 if poison costs more than that, if a clean run has a bad
step, if a poisoned one has none, or if no pair of runs was finished. Ctrl-C and SIGTERM end it with the verdict on the
pairs that were. Runs and the autoencoder are kept in --out: the same command again prints at once, and one that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import runpy
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import torch

from reference_trainer.config import TrainConfig
from reference_trainer.errors import Terminated, sigterm_raises
from reference_trainer.evaluation.evaluate import choose_features, evaluate
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.presets import digits
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from robustcm.objective import Batch

CPU = torch.device("cpu")
SAMPLES = 2000
Result = tuple[int, dict[str, float]]
"""Bad steps of a run, and the Frechet distance of each of its samplers."""


def poisoned(share: float) -> type[Batches]:
    """Batches of which a ``share`` has a NaN, the same at every call."""

    class Poisoned(Batches):
        def _made(self, step: int, part: int) -> Batch:
            batch = super()._made(step, part)
            generator = torch.Generator().manual_seed(10**6 + step)
            if float(torch.rand((), generator=generator)) < share and part == 0:
                row = int(torch.randint(len(batch.x), (), generator=generator))
                batch.x[row].view(-1)[0] = torch.nan
            return batch

    return Poisoned


def distances(config: TrainConfig, root: Path, cache: Path, share: float) -> Result:
    """Of the run in ``root``, trained if it is not yet."""
    torch.set_num_threads(1)
    run, images = RunFolder(root), config.data.load()
    with run.locked():
        run.claim(config)
        loop.Batches = poisoned(share)
        if not loop.train(config, run, images, cache, CPU):
            raise KeyboardInterrupt
    model = load_model(run, CPU)
    rows = evaluate(model, images, choose_features(None, model), bounds=False, n=SAMPLES)["rows"]
    return run.metrics()[-1]["bad_steps"], {name: row["frechet"] for name, row in rows.items() if "evaluation" in name}


def verdict(found: Mapping[tuple[int, float], Result], share: float) -> bool:
    """Print what is known of the pairs in ``found``, by seed and share; returns whether all is as it should be."""
    fine = True
    for (seed, poison), (bad, _) in found.items():
        if (bad > 0) != (poison > 0):
            fine = False
            print(f"seed {seed}, {poison:.0%} poisoned: {bad} bad steps, which says nothing of poison")
    seeds = [seed for seed, poison in found if poison > 0 and (seed, 0.0) in found]
    if not seeds:
        print("no pair of runs is finished")
        return False
    for samples in found[seeds[0], 0.0][1]:
        clean = [now[samples] for (_, poison), (_, now) in found.items() if poison == 0]
        values = [found[seed, share][1][samples] / found[seed, 0.0][1][samples] for seed in seeds]
        mean, spread = math.exp(sum(map(math.log, values)) / len(values)), max(clean) / min(clean)
        fine &= mean <= max(spread, 1.02)
        print(
            f"{samples}: FD of runs with {share:.0%} poisoned batches over clean ones, {len(values)} paired "
            f"seeds: {mean:.3f} ({min(values):.3f} to {max(values):.3f}); another seed: up to {spread:.3f}"
        )
    return fine


def train_pairs(options: argparse.Namespace, found: dict[tuple[int, float], Result]) -> None:
    """Train what ``options`` ask for, two runs at a time, print a line for each and put it into ``found``."""
    base, cache = replace(digits(), steps=options.steps, network=DiT(width=options.width)), options.out / "cache"
    base.autoencoder.fit(base.data.load(), CPU, cache)  # once, not by two processes side by side
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        try:
            started = dict[tuple[int, float], Future[Result]]()
            for seed, share in ((seed, share) for seed in options.seeds for share in (0.0, options.share)):
                root = options.out / f"digits-{options.width}-{options.steps}-{share}-seed-{seed}"
                started[seed, share] = pool.submit(distances, replace(base, seed=seed), root, cache, share)
            for (seed, share), future in started.items():
                bad, now = found[seed, share] = future.result()
                shown = ", ".join(f"{samples} {value:.2f}" for samples, value in now.items())
                ended = f"{bad:3} bad steps of {options.steps}"
                print(f"seed {seed}, {share:.0%} poisoned: {ended}; FD {shown}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise


def end_children() -> None:
    """One that trains saves first, and may begin with the next run before it is told again."""
    while children := multiprocessing.active_children():
        for child in children:
            child.terminate()
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.01, help="of the batches, above 0 (default 0.01)")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64, help="of the network (default 64; the digits' own is 128)")
    parser.add_argument("--out", type=Path, default=Path("runs/poison"), help="default %(default)s")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share must be above 0, at most 1, got {options.share}")
    found = dict[tuple[int, float], Result]()
    try:
        with sigterm_raises():
            train_pairs(options, found)
    except (KeyboardInterrupt, Terminated):
        print("interrupted")
    return int(not verdict(found, options.share))


if __name__ == "__main__":
    sys.exit(main())
