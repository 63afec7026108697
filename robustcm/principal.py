"""The first principal components of a covariance, without the others where there are many.

The first 256 components of 4096 x 4096 numbers take a little more than half of the time of all: 9.8 s and 17.2 s of
one core of an "Intel(R) Xeon(R) Processor", measured once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 512
"""Up to this size all are computed."""


class Principal(NamedTuple):
    """Some eigenvectors and eigenvalues; float64."""

    axes: Tensor
    """``[d, k]``, orthonormal columns."""
    variances: Tensor
    """``[k]``, falling. Those that are 0 may come out below it, by rounding."""
    others: Tensor
    """The mean of the other eigenvalues, ``[]``; of all where there is no other."""


def principal(covariance: Tensor, k: int) -> Principal:
    """The ``k`` largest eigenvalues, 1 to d, of ``covariance [d, d]``, symmetric, float64."""
    d = len(covariance)
    if d <= SMALL or 2 * k > d:
        variances, axes = torch.linalg.eigh(covariance)
        variances, axes = variances.flip(0), axes.flip(1)
        return Principal(axes[:, :k], variances[:k], (variances if k == d else variances[k:]).mean())
    from scipy.linalg import eigh  # slow to import, and seldom needed

    some = eigh(covariance.cpu().numpy(), subset_by_index=(d - k, d - 1))
    variances, axes = (torch.from_numpy(of).to(covariance).flip(-1) for of in some)
    return Principal(axes, variances, (covariance.trace() - variances.sum()) / (d - k))
