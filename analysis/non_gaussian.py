"""How far from Gaussian are latents? The error of a mixture's denoiser over the linear one's; no network is trained.

The best linear denoiser knows mean and covariance of the data and no more; of Gaussian data none is better. A small
mixture of Gaussians is fitted to one half of the data and denoises the other half. The ratio of the two errors is 1
where the latents are as good as Gaussian, less where they are not, and never less than for the best denoiser there is.
It can lie a little above 1: the mixture has more to fit.

Axes: n samples, d numbers each, k of them in the first principal components, m Gaussians of the mixture.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a Python may lack is imported
    runpy.run_path(str(Path(__file__).with_name("needed.py")))

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from tqdm import tqdm

from analysis.command import add_data, add_images, run_command
from analysis.td_outliers import check_options, spaces_of
from analysis.values import NoiseLevels
from reference_trainer.command import Parser, path, whole
from reference_trainer.errors import UserError
from reference_trainer.files import write_atomically
from robustcm.clusters import Clusters

LEVELS = (0.35, 0.7, 1.4, 2.8)
"""Noise levels t, of data of standard deviation 0.5 a channel."""
GAUSSIANS, RANK = 32, 32
"""m and k: what lies outside the first k principal components is denoised linearly by both."""
ROUNDS = 16
"""Of expectation and maximisation."""
FEWEST = 8 * RANK
"""Samples, below which a mixture is no use."""

EPILOG = """
examples:
  python analysis/non_gaussian.py                                  the digits
  python analysis/non_gaussian.py --data photographs
  python analysis/non_gaussian.py --data photos --resolution 32 --autoencoder my_vae:load
  python analysis/non_gaussian.py --run runs/photos                latents as this run sees them
"""


def fit_mixture(x: Tensor, gaussians: int, seed: int = 0) -> Clusters:
    """A mixture of ``gaussians`` fitted to ``x [n, k]`` by expectation and maximisation, from k-means.

    The covariance of each is drawn to the mean of all of them, as if ``RANK`` samples more had that one: a Gaussian has
    too few samples of its own for k x k numbers.
    """
    labels = torch.from_numpy(kmeans2(x.numpy(), gaussians, minit="++", seed=seed, missing="warn")[1]).long()
    shares = torch.nn.functional.one_hot(labels, gaussians).to(x.dtype)
    return Clusters.from_shares(x, shares, rounds=ROUNDS, full=x.shape[1], prior=RANK)


@dataclass(frozen=True)
class Denoised:
    """Squared errors a sample at one noise level, on samples that nothing was fitted to."""

    t: float
    linear: float
    mixture: float
    ratio: float
    """Below 1: not Gaussian."""


def denoising(
    x: Tensor, levels: Sequence[float] = LEVELS, gaussians: int = GAUSSIANS, rank: int = RANK, seed: int = 0
) -> list[Denoised]:
    """How well both denoise ``x [n, ...]`` at each of ``levels``: fitted to one half of them, measured on the other.

    Raises:
        UserError: too few samples, or values that are not finite.
    """
    flat = x.flatten(1).double()
    if len(flat) < FEWEST:
        raise UserError(f"{len(flat)} samples: a mixture wants {FEWEST} or more")
    if not flat.isfinite().all():
        raise UserError("some values are NaN or infinite: mend the autoencoder")
    generator = torch.Generator().manual_seed(seed)
    flat = flat[torch.randperm(len(flat), generator=generator)]
    fitted, measured = flat[: len(flat) // 2], flat[len(flat) // 2 :]
    mean = fitted.mean(0)
    variances, axes = torch.linalg.eigh((fitted - mean).T.cov())
    variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)
    fitted, measured = (fitted - mean) @ axes, (measured - mean) @ axes
    k = min(rank, flat.shape[1])
    mixture = fit_mixture(fitted[:, :k].contiguous(), gaussians, seed)
    z = torch.randn(measured.shape, generator=generator, dtype=torch.float64)
    return [_denoised(measured, z, t, variances, mixture, k) for t in tqdm(levels, "levels", leave=False, delay=2)]


def _denoised(x: Tensor, z: Tensor, t: float, variances: Tensor, mixture: Clusters, k: int) -> Denoised:
    noisy = x + t * z
    errors = (noisy * variances / (variances + t**2) - x).square()
    linear, rest = float(errors.sum()), float(errors[:, k:].sum())
    of_mixture = float((mixture.denoised(noisy[:, :k], x.new_full((len(x),), t)) - x[:, :k]).square().sum()) + rest
    return Denoised(t, linear / len(x), of_mixture / len(x), of_mixture / linear)


def look(options: argparse.Namespace) -> int:
    """Measure, write, say."""
    report, lines = measured(options)
    file = options.out / "non_gaussian.json"
    write_atomically(file, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(lines))
    print(f"\nall numbers are in {file}")
    return 0


def measured(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What goes into the JSON, by space, and the same as lines."""
    check_options(options)
    spaces, lines = spaces_of(options)
    report = {}
    for space in spaces[-1:]:  # the latents; the pixels where there is no autoencoder
        gate = space.levels.explained if isinstance(space.levels, NoiseLevels) else None
        found = denoising(space.data, sorted({*LEVELS, *([] if gate is None else [gate])}), seed=options.seed)
        report[space.name] = {"gate": gate, "levels": [asdict(one) for one in found]}
        lines += [
            "",
            f"== {space.name}: d = {space.data[0].numel()}; error of a mixture of {GAUSSIANS} Gaussians over the "
            "linear denoiser's; 1: Gaussian",
            *(f"   t = {one.t:<5.3g} {one.ratio:.3f}{'   the gate' if one.t == gate else ''}" for one in found),
        ]
    return report, lines


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=path, metavar="RUN", help="look at the latents of this run (default: --data)")
    add_data(p, "a folder, a store, or photographs (default: the digits)")
    p.add_argument("--seed", type=whole, default=0, help="of halves, mixture and noise (default 0)")
    add_images(p)
    p.set_defaults(steps=0, levels=None, samples=20)  # what td_outliers.py would train and measure
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(parser(), look, arguments)


if __name__ == "__main__":
    sys.exit(main())
