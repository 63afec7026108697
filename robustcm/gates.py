"""Which samples take the coupled noise: the gate of technique 3, and the noise levels that say where to put one.

A gate is ``gate(t [b], progress) -> [b]``: the probability with which a sample at noise level t takes the noise it was
paired with; otherwise it keeps its own, independent of the data. Why a gate at all: below some level the input itself
tells what x is, the pairing has nothing to add, and f only learns inputs that the sampler, whose second noise is drawn
afresh, never produces (derived in docs/evidence.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Gate: TypeAlias = Callable[[Tensor, float], Tensor]
"""``gate(t [b] in units of sigma, progress in [0, 1]) -> [b]`` in [0, 1]."""


def everywhere(t: Tensor, progress: float) -> Tensor:
    """Coupled noise for every sample: the coupling as published."""
    return torch.ones_like(t)


@dataclass(frozen=True)
class Above:
    """Coupled noise for samples at noise levels above ``sigma``, and for no other."""

    sigma: float = 1.0
    """Noise level, 0 or more."""

    def __post_init__(self) -> None:
        _check(self, sigma=self.sigma >= 0)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return (t > self.sigma).to(t.dtype)


@dataclass(frozen=True)
class SoftAbove:
    """Coupled noise with probability ``t^k / (t^k + sigma^k)``: one half at ``sigma``, ``Above`` as k grows."""

    sigma: float = 1.0
    """Noise level of probability one half, above 0."""
    k: float = 2.0
    """Steepness, above 0."""

    def __post_init__(self) -> None:
        _check(self, sigma=self.sigma > 0, k=self.k > 0)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return torch.sigmoid(self.k * torch.log(t / self.sigma))


@dataclass(frozen=True)
class AnnealedAbove:
    """``Above`` a threshold that moves from ``start`` to ``end`` in equal ratios over the run."""

    start: float
    """Noise level at the start of the run, above 0."""
    end: float
    """Noise level at its end, above 0."""

    def __post_init__(self) -> None:
        _check(self, start=self.start > 0, end=self.end > 0)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return Above(self.start * (self.end / self.start) ** progress)(t, progress)


@dataclass(frozen=True)
class ShareAbove:
    """Coupled noise for a random ``share`` of the samples above ``sigma``: a partial coupling."""

    share: float = 0.5
    """Of the samples, 0 to 1."""
    sigma: float = 1.0
    """Noise level, 0 or more."""

    def __post_init__(self) -> None:
        _check(self, share=0 <= self.share <= 1, sigma=self.sigma >= 0)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return self.share * Above(self.sigma)(t, progress)


@dataclass(frozen=True)
class AboveExplained:
    """``Above`` the level ``explained_below`` measures on the data with this ``share``: a gate without a search.

    It becomes one with ``on(x)``; not before it has seen data.

    Source: ours; tried at d = 32 to 2048 (docs/evidence.md).
    """

    share: float = 0.2
    """Of the data's variance that a noisy sample explains at the level, in (0, 1)."""

    def __post_init__(self) -> None:
        _check(self, share=0 < self.share < 1)

    def on(self, x: Tensor) -> Above:
        """The gate for data ``x [n, ...]``; a few thousand samples of a larger set serve.

        Raises:
            ValueError: fewer than two samples, or all the same.
        """
        return Above(explained_below(x, self.share))

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """Not yet a gate.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self} has seen no data: use {self}.on(x)")


def gated_noise(z: Tensor, coupled: Tensor, probability: Tensor, uniform: Tensor) -> Tensor:
    """``coupled`` for the samples whose ``uniform`` lies below their ``probability``, their own ``z`` for the others.

    Args:
        z: noise ``[b, ...]``, as drawn.
        coupled: noise ``[b, ...]`` as paired: ``z[perm]``, or this batch's part of a larger pool.
        probability: ``[b]``, what a gate gave.
        uniform: ``[b]`` in [0, 1), the caller's randomness; without effect for probabilities of 0 and 1.
    """
    takes = (uniform < probability).reshape(-1, *[1] * (z.dim() - 1))
    return torch.where(takes, coupled, z)


def recognisable_below(
    x: Tensor, generator: torch.Generator, *, probes: int = 512, share: float = 0.5, sigma_max: float = 80.0
) -> float:
    """The noise level at which a noisy sample stops showing which one it was, in units of sigma.

    With the data set as prior, the posterior weight of x_i given ``y = x_i + t z`` is the softmax over j of
    ``-||y - x_j||^2 / (2 t^2)`` at i; its mean over samples falls from 1 to 1 / n as t grows, and this is the t where
    it is ``share``. For n Gaussian samples of d elements it is near ``std sqrt(d / (2 ln n))``.

    Args:
        x: data ``[n, ...]``, n >= 2; a few thousand samples of a larger set serve.
        generator: CPU; chooses the probes and their noise.
        probes: how many samples the mean is taken over.
        share: see above.
        sigma_max: returned where the samples are told apart even there.
    Raises:
        ValueError: fewer than two samples.
    Source: ours.
    """
    if len(x) < 2:
        raise ValueError(f"need at least two samples to tell apart, got {len(x)}")
    flat = x.detach().flatten(1).double().cpu()
    chosen = torch.randperm(len(flat), generator=generator)[:probes]
    z = torch.randn(len(chosen), flat.shape[1], generator=generator, dtype=torch.float64)
    probe = flat[chosen]
    # ||x_i + t z - x_j||^2 = ||x_i - x_j||^2 + 2 t z (x_i - x_j) + t^2 ||z||^2, the last the same for every j.
    far = (probe.square().sum(1)[:, None] + flat.square().sum(1)[None, :] - 2 * probe @ flat.T).clamp(min=0)
    along = (z * probe).sum(1)[:, None] - z @ flat.T
    own = torch.arange(len(chosen)), chosen

    def weight(t: float) -> float:
        return float((-(far / (2 * t * t) + along / t)).softmax(1)[own].mean())

    low, high = 1e-4, sigma_max
    if weight(high) >= share:
        return sigma_max
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if weight(middle) >= share else (low, middle)
    return math.sqrt(low * high)


def explained_below(x: Tensor, share: float = 0.5) -> float:
    """The noise level up to which a noisy sample explains ``share`` of what varies in the data, in units of sigma.

    The best linear denoiser of ``y = x + t z`` leaves ``sum_k l_k t^2 / (l_k + t^2)`` of the data's variance
    ``sum_k l_k``, where the l_k are the eigenvalues of their covariance (Wiener); the rest it explains. White data of
    std s are explained to this share at ``s sqrt((1 - share) / share)`` whatever d; the fewer directions hold the
    variance, the higher the level.

    Args:
        x: data ``[n, ...]``, n >= 2; a few thousand samples of a larger set serve, fewer than elements, too, if the
            variance lies in few directions (of white data the level then comes out too high).
        share: in (0, 1).
    Raises:
        ValueError: fewer than two samples, or all the same, or a share out of range.
    Source: ours; the denoiser is Wiener's.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    if len(x) < 2:
        raise ValueError(f"need at least two samples to know what varies, got {len(x)}")
    flat = x.detach().flatten(1).double().cpu()
    if (flat == flat[0]).all():
        raise ValueError(f"all {len(x)} samples are the same: nothing varies")
    flat = flat - flat.mean(0)
    # Of the two matrices with these eigenvalues the smaller.
    gram = flat.T @ flat if flat.shape[1] <= len(flat) else flat @ flat.T
    variances = torch.linalg.eigvalsh(gram).clamp(min=0) / len(flat)
    total = variances.sum()

    def explained(t: float) -> float:
        return float((variances.square() / (variances + t * t)).sum() / total)

    # At t = 0 all is explained; at t = high no more than share even of the direction that varies most.
    low, high = 0.0, math.sqrt(float(variances.max()) * (1 - share) / share)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if explained(middle) >= share else (low, middle)
    return high


def _check(gate: Gate, **conditions: bool) -> None:
    if wrong := [name for name, holds in conditions.items() if not holds]:
        raise ValueError(f"{', '.join(wrong)} out of range: {gate}")
