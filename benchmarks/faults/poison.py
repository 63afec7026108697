"""Does a run with 1 % of its batches poisoned end with the quality of a clean one?

    python benchmarks/faults/poison.py [--share 0.01] [--steps 1000] [--seeds 0 1] [PRESET]

Trains PRESET (default: digits) for --steps, clean and with a NaN in one sample of a random share of the batches, from
the same seeds, and prints the Frechet distances of both at one and two evaluations, and their ratio. Runs and the
autoencoder are kept in --out: the same command again prints at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from reference_trainer.config import TrainConfig
from reference_trainer.evaluation.evaluate import choose_features, evaluate
from reference_trainer.model import load_model
from reference_trainer.presets import PRESETS
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches
from robustcm.objective import Batch

CPU = torch.device("cpu")


def poisoned(share: float) -> type[Batches]:
    """Batches of which a ``share`` has a NaN, the same at every call."""

    class Poisoned(Batches):
        def _made(self, step: int, part: int) -> Batch:
            batch = super()._made(step, part)
            generator = torch.Generator().manual_seed(10**6 + step)
            if float(torch.rand((), generator=generator)) < share:
                row = int(torch.randint(len(batch.x), (), generator=generator))
                batch.x[row].view(-1)[0] = torch.nan
            return batch

    return Poisoned


def distances(config: TrainConfig, root: Path, cache: Path, share: float) -> tuple[int, dict[str, float]]:
    """Bad steps of the run in ``root``, trained if it is not yet, and the Frechet distance of each of its samplers."""
    run, images = RunFolder(root), config.data.load()
    with run.locked():
        run.claim(config)
        loop.Batches = poisoned(share)
        if not loop.train(config, run, images, cache, CPU):
            raise KeyboardInterrupt
    model = load_model(run, CPU)
    rows = evaluate(model, images, choose_features(None, model), bounds=False)["rows"]
    return run.metrics()[-1]["bad_steps"], {name: row["frechet"] for name, row in rows.items() if "evaluation" in name}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="digits", choices=[preset.__name__ for preset in PRESETS])
    parser.add_argument("--share", type=float, default=0.01, help="of the batches (default 0.01)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/poison"), help="default %(default)s")
    options = parser.parse_args()
    (preset,) = (preset for preset in PRESETS if preset.__name__ == options.preset)
    ratios: dict[str, list[float]] = {}
    for seed in options.seeds:
        config = replace(preset(), steps=options.steps, seed=seed)
        torch.set_num_threads(config.threads)
        found = {}
        for name, share in (("clean", 0.0), ("poisoned", options.share)):
            root = options.out / f"{options.preset}-{options.steps}-{share}-seed-{seed}"
            bad, found[name] = distances(config, root, options.out / "cache", share)
            shown = ", ".join(f"{samples} {value:.2f}" for samples, value in found[name].items())
            print(f"seed {seed}, {name:8}: {bad:3} bad steps of {options.steps}; Frechet: {shown}", flush=True)
        for samples, value in found["clean"].items():
            ratios.setdefault(samples, []).append(found["poisoned"][samples] / value)
    for samples, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{samples}: poisoned over clean {mean:.3f} ({', '.join(f'{value:.3f}' for value in values)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
