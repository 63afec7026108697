"""The Gaussian with the data's mean and covariance: its consistency function, its denoiser, and the skip made of them.

Under x_t = x + t z the probability flow of N(mu, U diag(l) U^T) scales the principal component k of x_t - mu by
``sqrt((l_k + s^2) / (l_k + t^2))`` on its way from t down to s, so that is its consistency function; its posterior mean
scales it by ``l_k / (l_k + t^2)``. Any such map is ``mu + U diag(g(t)) U^T (x_t - mu)``; a ``Gain`` says g.

For any data at all: of the maps that scale each component, the one nearest to the true consistency function (mean
square) has ``g_k(t) = rho_k(t) sqrt((l_k + s^2) / (l_k + t^2))``, where rho_k is the correlation of the two ends of a
path in that component. For x_s = f(x_t) has the variance l_k + s^2 and x_t l_k + t^2, and the best factor is covariance
over variance. Gaussian data have rho = 1. ``robustcm.turning`` measures how small it can be.

Axes: b = batch, ... = one sample of d elements; k = principal components that are kept, behind which one more stands
for all others together: m = k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from robustcm.noise import NoiseRange
from robustcm.preconditioning import Preconditioning
from robustcm.principal import principal
from robustcm.shapes import one_a_sample

Gain: TypeAlias = Callable[[Tensor, Tensor, NoiseRange], Tensor]
"""``gain(t [b], variances [m], noise) -> [b, m]``: by how much each component of x_t - mu is scaled; 1 to the bit at
sigma_min."""

CONSTANT = 1e-8
"""Components with at most this share of the largest variance count as constant."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance), the covariance as ``k`` principal components and one variance in all other directions."""

    mean: Tensor
    """``[d]``."""
    axes: Tensor
    """``[d, k]``, orthonormal columns, the largest variance first."""
    variances: Tensor
    """``[m]``, falling but for the last: that of each direction outside of ``axes``; if there is none, of all the
    mean, which then is of no effect beyond rounding."""

    @staticmethod
    def of(mean: Tensor, covariance: Tensor, rank: int | None = None) -> Gaussian:
        """That of ``mean [d]`` and ``covariance [d, d]``; float32.

        Args:
            rank: components kept, at most d; the mean of the other variances stands for them. None: all, exact.
        Raises:
            ValueError: shapes that do not fit, not finite, components that are constant, or a rank out of range.
        """
        d = mean.numel()
        if mean.shape != (d,) or covariance.shape != (d, d):
            raise ValueError(f"need a mean [d] and a covariance [d, d], got {[*mean.shape]} and {[*covariance.shape]}")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean or covariance is NaN or infinite")
        if rank is not None and not 1 <= rank <= d:
            raise ValueError(f"rank must be 1 to {d}, the elements of a sample, got {rank}")
        k = d if rank is None else rank
        axes, variances, others = principal(covariance.double(), k)
        if constant := int((variances <= CONSTANT * variances[0].clamp(min=1e-300)).sum()):
            raise ValueError(f"{constant} of {k} principal components are constant")
        others = others[None].clamp(min=CONSTANT * variances[0])
        return Gaussian(mean.float(), axes.float().contiguous(), torch.cat([variances, others]).float())

    @staticmethod
    def fit(x: Tensor, rank: int | None = None) -> Gaussian:
        """That of samples ``x [n, ...]``.

        Raises:
            ValueError: no more samples than components, all of them the same; or see ``of``.
        """
        flat = x.detach().flatten(1).double().cpu()
        if len(flat) <= (components := flat.shape[1] if rank is None else rank):
            raise ValueError(f"{len(flat)} samples are too few for {components} components")
        if (flat == flat[0]).all():  # whose mean need not be that number, nor their variance 0
            raise ValueError(f"all {len(flat)} samples are the same: every component is constant")
        return Gaussian.of(flat.mean(0), torch.cov(flat.T).reshape(flat.shape[1], -1), rank)

    def to(self, device: torch.device | str) -> Gaussian:
        """The same on ``device``."""
        return Gaussian(self.mean.to(device), self.axes.to(device), self.variances.to(device))

    def scaled(self, x: Tensor, gains: Tensor) -> Tensor:
        """``mu + U diag(g) U^T (x - mu)``, all else scaled by the last: ``x [b, ...]``, ``gains [b, m] -> [b, ...]``.

        4 d k operations a sample: 67 million at d = k = 4096, 1.3 ms on one core of a 2.5 GHz Xeon, and none on the way
        back, since no weight is in it. Where all gains of a sample are 1, x itself to the bit: what the last does to
        all of it is taken apart, and only the differences go through the axes; so nothing large is taken from anything
        large, either. At least float32, in autocast, too.
        """
        dtype = torch.promote_types(x.dtype, self.axes.dtype)
        flat, axes, mean = x.flatten(1).to(dtype), self.axes.to(dtype), self.mean.to(dtype)
        others, gains = gains[:, -1:].to(dtype), gains[:, :-1].to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            moved = ((flat - mean) @ axes * (gains - others)) @ axes.T
        return (others * flat + ((1 - others) * mean + moved)).reshape(x.shape)

    def flow(self, x_t: Tensor, t: Tensor, noise: NoiseRange = NoiseRange()) -> Tensor:  # noqa: B008 (frozen)
        """The exact consistency function: ``x_t [b, ...]``, ``t [b] -> [b, ...]``, x_t to the bit at sigma_min."""
        return self.scaled(x_t, flow_gain(one_a_sample("t", t, len(x_t)), self.variances, noise))

    def denoised(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The posterior mean, of any data the best linear denoiser (Wiener): ``x_t [b, ...]``, ``t [b] -> [b, ...]``"""
        t = one_a_sample("t", t, len(x_t))[:, None]
        return self.scaled(x_t, self.variances / (self.variances + t**2))

    def projected(self, x: Tensor) -> Tensor:
        """Principal components of x - mu: ``[b, ...] -> [b, k]``, at least float32."""
        away = x.flatten(1) - self.mean
        with torch.autocast(x.device.type, enabled=False):
            return away @ self.axes.to(away.dtype)


def flow_gain(t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
    """``sqrt((l + s^2) / (l + t^2))``, s = sigma_min: the probability flow of a Gaussian."""
    s, t = noise.sigma_min, t[:, None]
    # Not the root of the quotient: t - s is exactly 0 at sigma_min, and this then exactly 1.
    return 1 / torch.sqrt((t - s) * (t + s) / (variances + s**2) + 1)


def wiener_gain(t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
    """``1 / ((t - s)^2 / l + 1)``: c_skip with the variance of each component in the place of sigma_data^2."""
    return 1 / ((t[:, None] - noise.sigma_min) ** 2 / variances + 1)


def scalar_gain(t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
    """c_skip of data of std 0.5 for every component, whatever its variance: the usual skip, but for their mean."""
    return Preconditioning(noise=noise).c_skip(t)[:, None].expand(-1, len(variances))


def noise_share(t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
    """``t^2 / (l + t^2)``: of the variance of a component of x_t what is noise. No gain; a share for ``Blended``."""
    t2 = t[:, None] ** 2
    return t2 / (variances + t2)


@dataclass(frozen=True)
class Blended:
    """``w first + (1 - w) second`` with the share ``w(t [b], variances [m], noise) -> [b, m]`` in 0 .. 1."""

    first: Gain = flow_gain
    """Where the share is 1."""
    second: Gain = scalar_gain
    """Where it is 0."""
    share: Gain = noise_share
    """Of the first, by component and noise level."""

    def to(self, device: torch.device | str) -> Blended:
        """The same, with the numbers that gains of it hold on ``device``."""
        return Blended(*(_moved(gain, device) for gain in (self.first, self.second, self.share)))

    def __call__(self, t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
        first, second = self.first(t, variances, noise), self.second(t, variances, noise)
        return second + self.share(t, variances, noise) * (first - second)


@dataclass(frozen=True, eq=False)
class Turned:
    """``cos(angle) sqrt((l + s^2) / (l + t^2))``: the flow's gain times the least correlation the two ends can have.

    ``angles``, from ``robustcm.turning``, are at equal steps of ln t from sigma_min, where they are 0, to sigma_max.
    """

    angles: Tensor
    """``[n, m]``, radians, each 0 to pi / 2, n at least 2; the first row is 0."""

    def to(self, device: torch.device | str) -> Turned:
        """The same on ``device``."""
        return Turned(self.angles.to(device))

    def __call__(self, t: Tensor, variances: Tensor, noise: NoiseRange) -> Tensor:
        s, last = noise.sigma_min, len(self.angles) - 1
        # log1p of a difference: exactly 0 at sigma_min, and so is the angle then
        place = torch.log1p((t - s) / s) * (last / math.log(noise.sigma_max / s))
        below = place.floor().clamp(0, last - 1)
        low, high = self.angles[below.long()], self.angles[below.long() + 1]
        return torch.cos(low + (place - below).clamp(0, 1)[:, None] * (high - low)) * flow_gain(t, variances, noise)


@dataclass(frozen=True, eq=False)
class LinearSkip:
    """A ``Skip``: ``mu + U diag(gain(t)) U^T (x_t - mu)``, x_t to the bit at sigma_min."""

    gaussian: Gaussian
    gain: Gain = flow_gain
    noise: NoiseRange = NoiseRange()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.gaussian.scaled(x_t, self.gain(t, self.gaussian.variances, self.noise))

    def to(self, device: torch.device | str) -> LinearSkip:
        """The same on ``device``."""
        return LinearSkip(self.gaussian.to(device), _moved(self.gain, device), self.noise)


def _moved(gain: Gain, device: torch.device | str) -> Gain:
    """``gain`` on ``device``, if it holds numbers."""
    return gain.to(device) if isinstance(gain, (Turned, Blended)) else gain
