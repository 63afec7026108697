"""Does a run with 1 % of its batches poisoned end with the quality of a clean one?

    python benchmarks/faults/poison.py [--share 0.01] [--steps 800] [--seeds 0 1 2] [--width 64]

Trains the digits for --steps with a narrower network, clean and with a NaN in one sample of a random share of the
batches, from the same seeds, two runs at a time, and prints the Frechet distances of both at one and two evaluations,
and their ratio beside what another seed changes. Exit status 1 if poison costs more than that. Runs and the autoencoder
are kept in --out: the same command again prints at once, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "needed.py"))

import torch

from reference_trainer.config import TrainConfig
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


def distances(config: TrainConfig, root: Path, cache: Path, share: float) -> tuple[int, dict[str, float]]:
    """Bad steps of the run in ``root``, trained if it is not yet, and the Frechet distance of each of its samplers."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.01, help="of the batches (default 0.01)")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64, help="of the network (default 64; the digits' own is 128)")
    parser.add_argument("--out", type=Path, default=Path("runs/poison"), help="default %(default)s")
    options = parser.parse_args()
    base, cache = replace(digits(), steps=options.steps, network=DiT(width=options.width)), options.out / "cache"
    base.autoencoder.fit(base.data.load(), CPU, cache)  # once, not by two processes side by side
    jobs = [(seed, share) for seed in options.seeds for share in (0.0, options.share)]
    ratios, clean = dict[str, list[float]](), dict[str, list[float]]()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = {}
        for seed, share in jobs:
            root = options.out / f"digits-{options.width}-{options.steps}-{share}-seed-{seed}"
            found[seed, share] = pool.submit(distances, replace(base, seed=seed), root, cache, share)
        for seed, share in jobs:
            bad, now = found[seed, share].result()
            shown = ", ".join(f"{samples} {value:.2f}" for samples, value in now.items())
            print(f"seed {seed}, {share:.0%} poisoned: {bad:3} bad steps of {options.steps}; FD {shown}", flush=True)
            for samples, value in now.items():
                if share == 0:
                    clean.setdefault(samples, []).append(value)
                else:
                    ratios.setdefault(samples, []).append(value / clean[samples][-1])
    worse = False
    for samples, values in ratios.items():
        mean, spread = math.exp(sum(map(math.log, values)) / len(values)), max(clean[samples]) / min(clean[samples])
        worse |= mean > max(spread, 1.02)
        print(
            f"{samples}: FD of runs with {options.share:.0%} poisoned batches over clean ones, {len(values)} paired "
            f"seeds: {mean:.3f} ({min(values):.3f} to {max(values):.3f}); another seed: up to {spread:.3f}"
        )
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
