"""What a coupling gains and what it asks of f, without training: by space, pool size and noise level.

`python benchmarks/coupling.py [--epochs 40]`: latents of the digits and of the suite `heavy` as the preset trains on
them, clip included, and Gaussians of two sizes. For each pool size

explained below   up to which noise a sample explains a fifth of the variance: the gate of the preset;
gain      share of the random pairing's cost that the exact pairing saves;
E[z|x]^2  mean square, an element, of the mean noise a data point is given over many draws (0 without coupling): at
          small t it is what f must subtract from its input, f(x_t, t) = x_t - t E[z | x_t], and learn by heart;
linear    which part of that mean is linear in x (R^2 on points the fit did not see): the rest is irregular;
mismatch  by how much the variance of x_t differs from that under independent noise, at t = 0.3, 1, 3, 10:
          what the teacher below a gate at t sees for the first time.
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).parents[1] / "analysis" / "needed.py"))

import torch
from _timing import write_json
from torch import Tensor
from tqdm import tqdm

from reference_trainer.ablation.ladder import heavy_tailed
from reference_trainer.config import TrainConfig
from reference_trainer.data.latents import some_of
from reference_trainer.machine import cache_folder, describe_machine
from reference_trainer.presets import digits
from reference_trainer.training.start import training_latents
from robustcm.couplers import coupling_gain, exact
from robustcm.gates import AboveExplained, explained_below
from robustcm.randomness import step_generator

LEVELS = (0.3, 1.0, 3.0, 10.0)


def latents_of(config: TrainConfig) -> Tensor:
    """Normalised latents of the training images ``[n, d]``."""
    latents, _ = training_latents(config, config.data.load(), cache_folder(), torch.device("cpu"))
    return latents.flatten(1)


def measured(x: Tensor, pool: int, epochs: int) -> dict[str, float]:
    """The columns of the table for data ``x [n, d]``, std 0.5."""
    n, d = len(x) // pool * pool, x.shape[1]
    # Two means from two halves of the draws: products across them are free of the noise of averaging.
    totals, seen = torch.zeros(2, *x.shape), torch.zeros(2, len(x), 1)
    gains, covariances = [], []
    for epoch in tqdm(range(epochs), desc=f"d = {d}, pool {pool}", leave=False):
        generator = step_generator(0, epoch)
        for chosen in torch.randperm(len(x), generator=generator)[:n].split(pool):
            z = torch.randn(pool, d, generator=generator)
            perm = exact(x[chosen], z)
            gains.append(float(coupling_gain(x[chosen], z, perm)))
            covariances.append(float((x[chosen] * z[perm]).mean()))
            totals[epoch % 2, chosen] += z[perm]
            seen[epoch % 2, chosen] += 1
    one, two = (totals / seen.clamp(min=1)).double()
    half = torch.arange(len(x)) % 2 == 0  # fitted on these, judged on the others
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    fitted = design @ torch.linalg.lstsq(design[half], one[half], driver="gelsd").solution
    square = float((one * two).mean())
    unexplained = float(((one - fitted) * (two - fitted))[~half].mean())
    covariance, power = sum(covariances) / len(covariances), float(x.square().mean())
    return {
        "explained below": explained_below(some_of(x), AboveExplained.share),
        "gain": sum(gains) / len(gains),
        "E[z|x]^2": square,
        "linear": 1 - unexplained / square,
        **{f"mismatch at {t:g}": 2 * t * covariance / (power + t * t) for t in LEVELS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="draws of noise a data point (default 40)")
    parser.add_argument("--pools", type=int, nargs="+", default=[128, 512])
    options = parser.parse_args()
    about, rows, started = describe_machine(), [], time.monotonic()
    generator = torch.Generator().manual_seed(0)
    spaces = {"digits": latents_of(digits()), "digits, suite heavy": latents_of(heavy_tailed(digits()))}
    spaces |= {f"Gaussian, d = {d}": 0.5 * torch.randn(2048, d, generator=generator) for d in (64, 256)}
    for name, x in spaces.items():
        for pool in options.pools:
            row = measured(x, pool, options.epochs)
            rows.append({"data": name, "d": x.shape[1], "pool": pool, **row})
            print(f"{name:22} pool {pool:5}  " + "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    print(f"{time.monotonic() - started:.0f} s; wrote {write_json('coupling', rows, about).name}")


if __name__ == "__main__":
    main()
