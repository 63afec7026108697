"""Robust distances between the student's and the teacher's output (technique 1).

Axes: b = batch, ch = channels, ... = everything that makes one sample.

Three layers, each usable alone::

    cauchy(student, teacher, c)                                  # [b], on the norm of the whole sample
    cauchy_of_r2(token_r2(student, teacher), c)                  # [b, h, w], one distance a pixel or token
    PerToken(cauchy_of_r2)(student, teacher, c)                  # [b], those summed: a distance again

``c`` has the units of the residual norm r = ||student - teacher|| *at the granularity of the call*, never
those of r^2: an element's residual is about sqrt(d) times smaller than the whole sample's, so a c that
suits one granularity is wrong by that factor for another.

Nothing here reduces over the batch, draws a random number, or synchronises the device. bfloat16 and float16
inputs are computed and returned in float32. r / c may lie anywhere in 1e-18 .. 1e18 in float32; Geman-McClure's
gradient is below the smallest float32, so 0, for r / c above 1e10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Scale: TypeAlias = float | Tensor
"""c: a positive number, or a tensor that broadcasts against r^2 (one scale a sample: ``[b]``)."""

Rho: TypeAlias = Callable[[Tensor, Scale], Tensor]
"""``rho(r2, c)``: elementwise in ``r2``, any shape, 0 at ``r2 = 0``."""

Distance: TypeAlias = Callable[[Tensor, Tensor, Scale], Tensor]
"""``distance(student, teacher, c) -> [b]``."""


def sample_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual norm of each whole sample: ``[b, ...] -> [b]``, the paper's granularity.

    Raises:
        ValueError: the shapes differ (broadcasting would silently pair every sample with every other).
    """
    return _squared_residual(student, teacher).flatten(1).sum(1)


def token_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual norm over the channel axis: ``[b, ch, h, w] -> [b, h, w]``, one value a pixel or token.

    Raises:
        ValueError: the shapes differ.
    """
    return _squared_residual(student, teacher).sum(1)


def element_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual of each element: ``[b, ...] -> [b, ...]``.

    Raises:
        ValueError: the shapes differ.
    """
    return _squared_residual(student, teacher)


def pseudo_huber_of_r2(r2: Tensor, c: Scale) -> Tensor:
    """Pseudo-Huber distance ``sqrt(r^2 + c^2) - c``.

    r^2 / (2 c) for r << c, r - c for r >> c; the influence |d/dr| rises to 1 and stays there.

    Args:
        r2: squared residual norm >= 0, any shape.
        c: scale > 0 in the units of r (checked when it is a number, not when it is a tensor: that would
            synchronise the device).
    Returns:
        The shape of ``r2``, in the units of r.
    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.3. Equals c * Barron's general loss at alpha = 1.
    """
    r2, c = _operands(r2, c)
    # Not sqrt(r2 + c^2) - c: that cancels (2.8 % off in float32 at r2 = 1e-9, c = 0.0345).
    return r2 / (torch.sqrt(r2 + c**2) + c)


def cauchy_of_r2(r2: Tensor, c: Scale) -> Tensor:
    """Cauchy distance ``log(1 + r^2 / (2 c^2))``.

    r^2 / (2 c^2) for r << c, 2 log(r / c) - log 2 for r >> c; the influence peaks at r = sqrt(2) c, where it is
    1 / (sqrt(2) c), and decays like 2 / r, whatever c is.

    Args:
        r2: squared residual norm >= 0, any shape.
        c: scale > 0 in the units of r.
    Returns:
        The shape of ``r2``, dimensionless.
    Source: Dao et al. 2025, arXiv 2502.01441. Equals Barron's general loss at alpha = 0.
    """
    r2, c = _operands(r2, c)
    return torch.log1p(r2 / (2 * c**2))


def geman_mcclure_of_r2(r2: Tensor, c: Scale) -> Tensor:
    """Geman-McClure distance ``r^2 / (r^2 + 4 c^2)``.

    r^2 / (4 c^2) for r << c, 1 for r >> c; the influence peaks at r = 2 c / sqrt(3) and decays like 8 c^2 / r^3:
    with a c far below the residuals there is next to no gradient, so give it a measured c.

    Args:
        r2: squared residual norm >= 0, any shape.
        c: scale > 0 in the units of r.
    Returns:
        The shape of ``r2``, dimensionless, below 1.
    Source: Dao et al. 2025, arXiv 2502.01441. Barron (alpha = -2) and kornia carry a factor 2 on top of this.
    """
    r2, c = _operands(r2, c)
    u = r2 / (4 * c**2)
    # Two writings of u / (1 + u): the first loses its gradient to cancellation above 1, the second its value below.
    return torch.where(u < 1, u / (1 + u), 1 - 1 / (1 + u))


def squared_l2_of_r2(r2: Tensor, c: Scale = 1.0) -> Tensor:
    """Squared Euclidean distance ``r^2``; ``c`` is accepted so that it fits where a ``Rho`` goes, and has no effect."""
    return _operands(r2, c)[0]


def pseudo_huber(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``pseudo_huber_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return pseudo_huber_of_r2(sample_r2(student, teacher), c)


def cauchy(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``cauchy_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return cauchy_of_r2(sample_r2(student, teacher), c)


def geman_mcclure(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``geman_mcclure_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return geman_mcclure_of_r2(sample_r2(student, teacher), c)


def squared_l2(student: Tensor, teacher: Tensor, c: Scale = 1.0) -> Tensor:
    """Squared Euclidean distance of the whole sample: ``[b, ...], [b, ...] -> [b]``; ``c`` has no effect."""
    return squared_l2_of_r2(sample_r2(student, teacher), c)


@dataclass(frozen=True)
class PerToken:
    """The distance that sums ``rho`` over the pixels or tokens of a sample; ``c`` is in units of a token's norm.

    A sum, so that the granularity makes no difference to ``squared_l2_of_r2``.
    """

    rho: Rho
    """The distance as a function of a token's squared residual norm and c."""

    def __call__(self, student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
        """``[b, ch, h, w], [b, ch, h, w] -> [b]``."""
        return _summed(self.rho, token_r2(student, teacher), c)

    def norms_per_sample(self, shape: torch.Size) -> int:
        """How many residual norms a sample of ``shape`` (ch, ...) has at this granularity."""
        return math.prod(shape[1:])


@dataclass(frozen=True)
class PerElement:
    """The distance that sums ``rho`` over the elements of a sample; ``c`` is in units of one element."""

    rho: Rho
    """The distance as a function of an element's squared residual and c."""

    def __call__(self, student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
        """``[b, ...], [b, ...] -> [b]``."""
        return _summed(self.rho, element_r2(student, teacher), c)

    def norms_per_sample(self, shape: torch.Size) -> int:
        """How many residual norms a sample of ``shape`` (ch, ...) has at this granularity."""
        return math.prod(shape)


def _summed(rho: Rho, r2: Tensor, c: Scale) -> Tensor:
    if isinstance(c, Tensor) and c.dim() == 1:  # one scale a sample
        c = c.reshape(-1, *[1] * (r2.dim() - 1))
    return rho(r2, c).flatten(1).sum(1)


def _squared_residual(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape or student.dim() < 2:
        raise ValueError(
            f"student and teacher must have one shape [b, ...], got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    td = _at_least_float32(student) - _at_least_float32(teacher)
    return td * td


def _operands(r2: Tensor, c: Scale) -> tuple[Tensor, Scale]:
    if not isinstance(c, Tensor) and not c > 0:
        raise ValueError(f"the scale c must be positive, got {c}; it has the units of the residual norm r")
    return _at_least_float32(r2), c


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
