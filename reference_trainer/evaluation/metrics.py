"""Distances between two sets of feature vectors: Frechet, kernel, precision and recall.

Axes: real [n, k], fake [m, k]. Of Inception features the first two are FID and, unscaled, KID; of others they are not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from reference_trainer.data.images import psnr_of_each
from reference_trainer.evaluation.statistics import Statistics


def frechet_distance(real: Tensor | Statistics, fake: Tensor | Statistics) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians with their means and covariances; features squared.

    In float64, the end rounded to the type of the features: the digits of torchmetrics, whose class takes the features
    and not their sums.
    """
    real, fake = (Statistics.of(given) if isinstance(given, Tensor) else given for given in (real, fake))
    a, b = real.covariance, fake.covariance
    common = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    distance = (real.mean - fake.mean).square().sum() + (a.trace() + b.trace()) - 2 * common
    return float(distance.to(fake.some.dtype))


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0, scaled: bool = True) -> float:
    """1000 x squared MMD with the kernel (x y / k + 1)^3, unbiased, mean over 20 subsets of up to 1000.

    The subsets come from a generator of its own, unlike torchmetrics' KID, whose digits these are: two distances may be
    computed at a time.

    Args:
        scaled: divide both sets by the root mean square of ``real``: the kernel is not scale-free, and features of any
            network should give values one can read. KID (Binkowski et al. 2018, arXiv 1801.01401) does not.
    """
    scale = real.double().square().mean().sqrt() if scaled else 1.0
    real, fake = (vectors.double() / scale for vectors in (real, fake))
    size, generator = min(1000, len(real), len(fake)), torch.Generator().manual_seed(seed)
    values = []
    for _ in range(20):
        x, y = (vectors[torch.randperm(len(vectors), generator=generator)[:size]] for vectors in (real, fake))
        values.append(poly_mmd(x, y))
    return 1000 * float(torch.stack(values).mean())


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, limit: int = 2000) -> tuple[float, float]:
    """Share of fakes inside the real manifold, share of reals inside the fake one; manifolds of k-nearest balls.

    Each set is cut to its first ``limit`` vectors, since the values depend on the size: shuffle what is sorted.
    NaN where the fakes are so far away that distances overflow.

    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    real, fake = real[:limit].float(), fake[:limit].float()
    # A power of two, so that no digit changes: features of any size, whose squares may not fit a float.
    scale = 2.0 ** min(126, round(math.log2(max(float(real.abs().max()), 1e-37))))
    real, fake = real / scale, fake / scale
    between = torch.cdist(real, fake)  # [n, m]
    if not between.isfinite().all():
        return math.nan, math.nan
    precision = (between <= _radii(real, neighbours)[:, None]).any(0).float().mean()
    recall = (between <= _radii(fake, neighbours)[None, :]).any(1).float().mean()
    return float(precision), float(recall)


def psnr(real: Tensor, fake: Tensor) -> float:
    """``psnr_of_each`` of images in pairs, in dB: uint8 ``[n, ch, h, w]`` both, the mean over n."""
    return float(psnr_of_each(real, fake).mean())


def _radii(points: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the point itself.
    return torch.cdist(points, points).kthvalue(min(neighbours + 1, len(points)), dim=1).values
