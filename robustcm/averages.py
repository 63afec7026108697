"""Averages of the weights over training: exponential, or by a power of the step, which can also be had afterwards.

An average moves towards the weights w once a step: ``a += share (w - a)``, with a list of tensors and no copy of the
network ``torch._foreach_lerp_(averaged, weights, average(step))``. Each further one costs 4 bytes a weight of memory,
as much in a checkpoint, and a pass over the weights a step: of the digits' 753,056 weights 0.6 ms of a core, 1.4 % of a
step (``benchmarks/step_time.py``, an Intel Xeon).

How long an average should be is not known before training, and matters. Of two power functions, say sigma_rel 0.05
and 0.1, keep what they were after every few hundred steps. Then ``reconstruct`` says how these combine to the average
of nearly any other length, so that the length is chosen once training is done.

Source: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from robustcm.checks import SMALLEST, need_real

UNIFORM = 12**-0.5
"""sigma_rel of the plain mean of all steps, 0.2887: no power function is wider."""


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """``a = decay a + (1 - decay) w``; over the first steps with the smaller decay (step + 1) / (step + 10)."""

    decay: float = 0.999
    """At least 0 (the weights themselves), below 1. 1 / (1 - decay) steps is how far it looks back."""

    def __post_init__(self) -> None:
        need_real(self, "decay", least=0, below=1)

    def __call__(self, step: int) -> float:
        """The share of the weights behind the update of ``step`` (from 0), 0 to 1."""
        return 1 - min(self.decay, (step + 1) / (step + 10))


@dataclass(frozen=True, kw_only=True)
class PowerFunction:
    """Weights behind step t count in proportion to t^gamma: the average grows longer as training goes on.

    What the network began with does not count. Steps in which nothing was averaged leave the profile a little off.
    """

    sigma_rel: float = 0.1
    """Standard deviation of the profile as a share of the steps done; at most 12^-1/2 = 0.2887, the plain mean."""

    def __post_init__(self) -> None:
        need_real(self, "sigma_rel", least=SMALLEST, most=UNIFORM)

    @cached_property
    def gamma(self) -> float:
        """The power, 0 or more."""
        return gamma_of(self.sigma_rel)

    def __call__(self, step: int) -> float:
        """The share of the weights behind the update of ``step`` (from 0), 0 to 1: 1 - (1 - 1/t)^(gamma + 1)."""
        return 1.0 if step == 0 else -math.expm1((self.gamma + 1) * math.log1p(-1 / (step + 1)))


Average: TypeAlias = Exponential | PowerFunction
"""``(step) -> share of the new weights``; equal ones are the same average."""


def gamma_of(sigma_rel: float) -> float:
    """The power whose profile has the relative standard deviation ``sigma_rel``, in (0, 12^-1/2].

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2; the two others are negative.
    """
    t = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile t^gamma on (0, 1), for gamma >= 0; the inverse of ``gamma_of``."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


class Profile(NamedTuple):
    """How much the weights behind each step count in a power-function average, as it stands behind ``step`` steps.

    On 0 .. step the density (gamma + 1) t^gamma / step^(gamma + 1), cut into steps.
    """

    step: int
    gamma: float


class Reconstruction(NamedTuple):
    """An average as a sum of stored ones."""

    coefficients: np.ndarray
    """float64 ``[n]``, adding up to 1, some of them negative."""
    error: float
    """Distance of the profile that is had from that wanted, as a share of the latter's norm: 0 or more, as good
    as 0 below 1e-7, above 1 where nothing stored lies near."""


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """The sum of the averages ``stored`` whose profile comes closest to that ``wanted``, in the mean square.

    Among the sums whose coefficients add up to 1, so that weights which do not move are reconstructed as they are:
    plain least squares, as published, is off by the error. Inner products of profiles are integrals in closed form.

    Raises:
        ValueError: nothing stored, or a profile that is none.
    """
    if not stored:
        raise ValueError("need at least one stored average to reconstruct another")
    for profile in (*stored, wanted):
        if not (profile.step >= 1 and 0 <= profile.gamma < math.inf):
            raise ValueError(f"a profile needs step >= 1 and a finite gamma >= 0, got {profile}")
    if wanted in stored:
        return Reconstruction(np.eye(len(stored))[stored.index(wanted)], 0.0)
    gram, right = _cosines(stored, stored), _cosines(stored, [wanted])[:, 0]
    size = _norms([wanted]) / _norms(stored)
    values, vectors = np.linalg.eigh(gram)
    # Stored often, averages are nearly the same: what they differ in by rounding alone is left out.
    kept = values > 1e-14 * values[-1]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    free, slope = inverse @ right, inverse @ size
    units = free + slope * (1 - size @ free) / (size @ slope)  # coefficients of profiles of norm 1
    square = 1 - 2 * units @ right + units @ gram @ units
    return Reconstruction(units * size, math.sqrt(max(0.0, float(square))))


def _norms(profiles: Sequence[Profile]) -> np.ndarray:
    """L2 norms ``[n]``."""
    step, gamma = np.array(profiles, float).T
    norms: np.ndarray = (gamma + 1) / np.sqrt((2 * gamma + 1) * step)
    return norms


def _cosines(one: Sequence[Profile], two: Sequence[Profile]) -> np.ndarray:
    """Inner products ``[n, m]`` of the profiles, each divided by its norm.

    Of two, the earlier one ends inside the later one, whose power alone then says how much of it lies there.
    """
    (step, gamma), (other_step, other_gamma) = np.array(one, float).T[..., None], np.array(two, float).T[:, None]
    shared = np.minimum(step, other_step) / np.maximum(step, other_step)
    later = np.where(step < other_step, other_gamma, gamma)
    alike = np.sqrt((2 * gamma + 1) * (2 * other_gamma + 1)) / (gamma + other_gamma + 1)
    cosines: np.ndarray = alike * shared ** (later + 0.5)
    return cosines
