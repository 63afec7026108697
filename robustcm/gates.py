"""Which samples take the coupled noise: the gate of technique 3, and the noise levels that say where to put one.

``coupled_noise`` is the whole of technique 3 in one call.

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

from robustcm.checks import LARGEST, SMALLEST, need_finite, need_real
from robustcm.couplers import Coupler, exact
from robustcm.noise import sigma_of_flow_time
from robustcm.shapes import one_a_sample, over_samples, same_shape

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
        need_real(self, "sigma", least=0, or_inf=True)

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
        need_real(self, "sigma", least=SMALLEST, most=LARGEST)
        need_real(self, "k", above=0, most=LARGEST)

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
        need_real(self, "start", "end", least=SMALLEST, most=LARGEST)

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
        need_real(self, "share", least=0, most=1)
        need_real(self, "sigma", least=0, or_inf=True)

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
        need_real(self, "share", above=0, below=1)

    def on(self, x: Tensor) -> Above:
        """The gate for data ``x [n, ...]``; a few thousand samples of a larger set serve.

        Raises:
            ValueError: fewer than two samples, all the same or not all finite.
        """
        return Above(explained_below(x, self.share))

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """Not yet a gate.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self} has seen no data: use {self}.on(x)")


@dataclass(frozen=True)
class OfFlowTime:
    """``gate``, which knows sigma, for noise levels given as flow time: ``x_t = (1 - t) x + t z``, t in [0, 1]."""

    gate: Gate

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return self.gate(sigma_of_flow_time(t), progress)


def of_flow_time(gate: Gate) -> Gate:
    """``gate`` on the axis of flow time: its sigma is that of ``(1 - t) x + t z`` seen as ``x + sigma z``, scaled."""
    return OfFlowTime(gate)


@dataclass(frozen=True)
class OfDataTime:
    """``gate``, which knows sigma, for flow time the other way round: ``x_t = t x + (1 - t) z``."""

    gate: Gate

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        return self.gate(sigma_of_flow_time(1 - t), progress)


def of_data_time(gate: Gate) -> Gate:
    """``gate`` where t = 1 is the data, as in torchcfm."""
    return OfDataTime(gate)


def coupled_noise(
    x: Tensor,
    z: Tensor,
    t: Tensor,
    coupler: Coupler = exact,
    gate: Gate = Above(1.0),
    uniform: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: float = 0.0,
) -> Tensor:
    """The noise to train on, ``[b, ...]``: paired with the data where the gate lets it, as drawn elsewhere.

    ::

        z = coupled_noise(x, z, t)                                     # t: sigma, x + t z
        z = coupled_noise(x, z, t, gate=of_flow_time(Above(1.0)))      # t: flow time, (1 - t) x + t z

    Args:
        x: data ``[b, ...]``, at the scale the network sees (std about 0.5 for sigma 1 to be above it).
        z: noise, the shape of ``x``.
        t: noise levels, one a sample, on the axis of the gate.
        coupler: of ``robustcm.couplers``.
        gate: of this module.
        uniform: ``[b]`` in [0, 1), for gates that leave it to chance.
        labels: ``[b]``, for couplers within classes.
        generator: CPU, for couplers that draw.
        progress: share of the training done, for gates that move.
    Raises:
        ValueError: shapes that differ, values that are not finite, or no ``uniform`` where the gate needs it.
    """
    coupled = z[coupler(x, z, labels=labels, generator=generator)]
    probability = gate(one_a_sample("t", t, len(x)), progress)
    if uniform is None:
        if ((probability > 0) & (probability < 1)).any():
            raise ValueError(f"{gate} leaves it to chance who is coupled: pass uniform, [{len(x)}] in [0, 1)")
        uniform = torch.full_like(probability, 0.5)
    return gated_noise(z, coupled, probability, uniform)


def gated_noise(z: Tensor, coupled: Tensor, probability: Tensor, uniform: Tensor) -> Tensor:
    """``coupled`` for the samples whose ``uniform`` lies below their ``probability``, their own ``z`` for the others.

    Args:
        z: noise ``[b, ...]``, as drawn.
        coupled: noise ``[b, ...]`` as paired: ``z[perm]``, or this batch's part of a larger pool.
        probability: ``[b]``, what a gate gave.
        uniform: ``[b]`` in [0, 1), the caller's randomness; without effect for probabilities of 0 and 1.
    """
    same_shape(z=z, coupled=coupled)
    takes = over_samples(one_a_sample("probability", uniform < probability, len(z)), z)
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
        ValueError: fewer than two samples, or values that are not finite.
    Source: ours.
    """
    if len(x) < 2:
        raise ValueError(f"need at least two samples to tell apart, got {len(x)}")
    need_finite(x=x)
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
        ValueError: fewer than two samples, all the same or not all finite, or a share out of range.
    Source: ours; the denoiser is Wiener's.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    if len(x) < 2:
        raise ValueError(f"need at least two samples to know what varies, got {len(x)}")
    need_finite(x=x)
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
