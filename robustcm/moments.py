"""Samples given the mean and the covariance of the data behind the sampler, by the affine map that moves them least.

A short training leaves samples whose covariance is not the data's: what a network has not learned yet, a regression
shrinks, and a gate spreads. Both are known once samples can be drawn: measure their mean m and covariance S, take the
data's, M and C, and show every further sample moved::

    x -> M + A (x - m),    A = S^(-1/2) (S^(1/2) C S^(1/2))^(1/2) S^(-1/2)

A is the symmetric positive definite matrix with A S A = C: the optimal transport between two Gaussians, so of all maps
that give samples these two moments the one with the least mean square between a sample and where it goes. No weight
changes, and no evaluation of the network is added. What is not in the first two moments it cannot mend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustcm.principal import principal

CONSTANT = 1e-6
"""Directions in which samples have at most this share of their largest variance stay as they are: what hardly varies
would be spread a thousandfold, rounding with it."""


@dataclass(frozen=True, eq=False)
class MomentMap:
    """``x -> target + matrix (x - centre)``, d numbers a sample; float32, in autocast, too."""

    centre: Tensor
    """``[d]``, the mean of the samples it was measured on."""
    target: Tensor
    """``[d]``, the mean of the data."""
    matrix: Tensor
    """``[d, d]``, symmetric."""

    def to(self, device: torch.device | str) -> MomentMap:
        """The same on ``device``."""
        return MomentMap(self.centre.to(device), self.target.to(device), self.matrix.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """``x [b, ...] -> [b, ...]``: one product with the matrix, 2 d^2 operations a sample.

        Raises:
            ValueError: samples of another size than d.
        """
        if (d := x[0].numel() if len(x) else len(self.centre)) != len(self.centre):
            raise ValueError(f"samples of {d} numbers, and the map was measured on {len(self.centre)}")
        away = x.flatten(1).to(self.matrix.dtype) - self.centre
        with torch.autocast(x.device.type, enabled=False):
            moved = self.target + away @ self.matrix
        return moved.to(x.dtype).reshape(x.shape)


def match_moments(samples: Tensor, mean: Tensor, covariance: Tensor) -> MomentMap:
    """The map for ``samples [n, ...]`` and the moments of data, ``mean [d]`` and ``covariance [d, d]``.

    Take several samples for each of the d numbers: measured on n = 20 d of them (d = 512), further ones came out with
    up to 1.05 times the variance (docs/evidence.md, faces).

    Raises:
        ValueError: no more samples than numbers in one, shapes that do not fit, numbers that are not finite, or samples
            that are all the same.
    Source: the formula as POT's ``ot.gaussian.bures_wasserstein_mapping`` states it (Peyré and Cuturi 2019, arXiv
        1803.00567, Remark 2.31), to which a test compares; here only along directions that vary, and with one root.
        Its use behind a few-step sampler: ours, measured in docs/evidence.md.
    """
    x = samples.detach().flatten(1).double().cpu()
    n, d = x.shape
    mean, covariance = mean.detach().double().cpu(), covariance.detach().double().cpu()
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise ValueError(
            f"samples of {d} numbers need a mean [{d}] and a covariance [{d}, {d}], got {list(mean.shape)} and "
            f"{list(covariance.shape)}"
        )
    if n <= d:
        raise ValueError(f"{n} samples are too few for the covariance of {d} numbers: draw several times as many")
    for name, of in (("samples", x), ("mean", mean), ("covariance", covariance)):
        if not of.isfinite().all():
            raise ValueError(f"{name} has numbers that are NaN or infinite")
    centre = x.mean(0)
    own = (x - centre).T @ (x - centre) / (n - 1)
    axes, variances, _ = principal(own, d)
    if (x == x[0]).all() or variances[0] <= 0:  # the mean of equal numbers need not be that number
        raise ValueError(f"all {n} samples are the same: nothing varies")
    varies = variances > CONSTANT * variances[0]
    axes, rest, spread = axes[:, varies], axes[:, ~varies], variances[varies].sqrt()
    # In the axes of the samples S^(1/2) is diagonal.
    between = spread[:, None] * (axes.T @ covariance @ axes) * spread
    values, turn = torch.linalg.eigh(between)
    root = (turn * values.clamp(min=0).sqrt()) @ turn.T
    matrix = axes @ (root / spread[:, None] / spread) @ axes.T + rest @ rest.T
    return MomentMap(centre.float(), mean.float(), matrix.float())
