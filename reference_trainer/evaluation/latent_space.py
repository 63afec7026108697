"""Samples against data in the latent space itself, where neither an autoencoder nor features stand between.

Axes: latents [n, ...], each flattened to d numbers; k <= d principal components of the data that are kept.
All is a function of the first 50 million elements of each set (5000 samples up to d = 10,000): shuffle what is sorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_trainer.data.latents import not_finite
from reference_trainer.errors import UserError
from reference_trainer.evaluation.metrics import kernel_distance, precision_recall

FLOOR = 1e-6
"""Components with at most this share of the first one's variance are left out: what is constant in the data but for
rounding, or a border that never changes, would otherwise weigh as much as all else once it is whitened."""
MOST_ELEMENTS = 50_000_000
GROUPS = {"variance_first_4": slice(0, 4), "variance_next_12": slice(4, 16), "variance_rest": slice(16, None)}
"""Principal components, the one of largest variance first."""


@dataclass(frozen=True)
class Components:
    """Mean and covariance of latents ``[n, ...]`` as principal components, the largest variance first; float64.

    Of fewer samples than dimensions there are at most n - 1.
    """

    count: int
    """Of latents they are made from."""
    mean: Tensor
    """``[d]``."""
    axes: Tensor
    """``[d, k]``, orthonormal columns."""
    variances: Tensor
    """``[k]``, falling, each above ``FLOOR`` of the first."""

    @staticmethod
    def of(latents: Tensor) -> Components:
        """Those of ``latents [n, ...]``.

        Raises:
            UserError: fewer than 2, all the same, or not finite.
        """
        x = _flat(latents)
        if len(x) < 2:
            raise UserError(f"{len(x)} latent: a covariance needs 2")
        if bad := len(not_finite(x)):
            raise UserError(f"{bad} of {len(x)} latents of the data are NaN or infinite")
        mean = x.mean(0)
        variances, axes = _spectrum(x - mean)
        kept = variances > FLOOR * variances[0]
        if not kept.any():
            raise UserError(f"all {len(x)} latents are the same: no variance to compare with")
        return Components(len(x), mean, axes[:, kept], variances[kept])

    @property
    def dimensions(self) -> int:
        """d; all but ``len(variances)`` are left out."""
        return len(self.mean)

    def whitened(self, latents: Tensor) -> Tensor:
        """``[n, ...] -> [n, k]``: of the data mean 0 and covariance 1; what lies outside the components is dropped."""
        return (_flat(latents) - self.mean) @ self.axes / self.variances.sqrt()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Latents of this ``shape`` (n, ...) from the Gaussian with this mean and covariance; float32."""
        z = torch.randn(shape[0], len(self.variances), generator=generator, dtype=torch.float64)
        return (self.mean + z * self.variances.sqrt() @ self.axes.T).float().reshape(shape)


def whitened_frechet(data: Components, samples: Tensor) -> float:
    """Frechet distance of ``samples [m, ...]`` to the data, both whitened by the data's covariance; dimensionless.

    There the data's covariance is 1, so that it is ``|mean|^2 + sum (sqrt(s) - 1)^2`` over the eigenvalues s of the
    samples'. No invertible linear map of both sets changes it, as long as none of the components is left out.
    Each direction in which m samples cannot vary, having fewer than k + 1, adds 1.
    """
    white = data.whitened(samples)
    mean = white.mean(0)
    spread = _eigenvalues(white - mean).sqrt()
    return float(mean.square().sum() + (spread - 1).square().sum() + (white.shape[1] - len(spread)))


def variance_ratios(data: Components, samples: Tensor) -> dict[str, float]:
    """Variance of ``samples [m, ...]`` over that of the data, in the first 4 principal components of the data, the
    next 12, and the rest: of each group the sum over the sum; a group without components is left out."""
    variances = data.whitened(samples).var(0) * data.variances
    present = {name: group for name, group in GROUPS.items() if len(data.variances[group])}
    return {name: float(variances[group].sum() / data.variances[group].sum()) for name, group in present.items()}


def compare_latents(data: Tensor, components: Components, samples: Tensor) -> dict[str, float]:
    """All figures of ``samples [m, ...]`` against the latents ``data [n, ...]`` and their ``components``.

    Kernel distance, precision and recall as of features (see ``metrics``), the latter two on up to 2000 of each.

    Raises:
        UserError: fewer than 2 samples, or figures that are not finite.
    """
    real, fake = _flat(data), _flat(samples)
    if bad := len(not_finite(fake)):
        raise UserError(f"{bad} of {len(fake)} latents are NaN or infinite: the network has diverged")
    if min(len(real), len(fake)) < 2:
        raise UserError(f"{min(len(real), len(fake))} latent: a distance between sets needs 2 of each")
    precision, recall = precision_recall(real, fake)
    row = {
        "n": len(fake),
        "whitened_frechet": whitened_frechet(components, fake),
        "kernel_x1000": kernel_distance(real, fake),
        "precision": precision,
        "recall": recall,
        **variance_ratios(components, fake),
    }
    if bad_names := [name for name, value in row.items() if not math.isfinite(value)]:
        raise UserError(f"{', '.join(bad_names)} not finite: the latents go up to {float(fake.abs().max()):.1g}")
    return row


def few_latents(components: Components | str) -> list[str]:
    """What to know of figures from few latents, as sentences; of components that are missing nothing."""
    if isinstance(components, str) or components.count > components.dimensions:
        return []
    return [
        f"no more latents than their {components.dimensions} dimensions: their covariance is singular, Frechet "
        "distances of whitened latents see only the directions these vary in, and come out too high"
    ]


def _flat(latents: Tensor) -> Tensor:
    most = max(2, MOST_ELEMENTS // max(1, latents[0].numel())) if len(latents) else 0
    return latents[:most].flatten(1).double()


def _spectrum(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[k]``, falling, and eigenvectors ``[d, k]`` of the covariance of ``centred [n, d]``."""
    n, d = centred.shape
    if n > d:
        values, vectors = torch.linalg.eigh(centred.T @ centred / (n - 1))
        return values.flip(0), vectors.flip(1)
    values, vectors = torch.linalg.eigh(centred @ centred.T / (n - 1))  # n x n has the same ones, but for zeros
    values, vectors = values.flip(0)[: n - 1], vectors.flip(1)[:, : n - 1]
    return values, centred.T @ vectors / ((n - 1) * values.clamp(min=1e-300)).sqrt()


def _eigenvalues(centred: Tensor) -> Tensor:
    """Those of the covariance of ``centred [n, d]``, of the smaller of the two products that have them."""
    n, d = centred.shape
    product = centred.T @ centred if n > d else centred @ centred.T
    return torch.linalg.eigvalsh(product / (n - 1)).clamp(min=0)
