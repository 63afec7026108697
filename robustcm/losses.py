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
inputs are computed and returned in float32, beside float32 too. r / c may lie anywhere in 1e-18 .. 1e18 in float32;
Geman-McClure's gradient is below the smallest float32, so 0, for r / c above 1e10.

What is not finite: NaN gives NaN. An infinite residual gives the limit of the value (infinite, but 1 for
Geman-McClure) and no gradient (under squared L2 none in its infinite elements): one overflow does not spoil the
gradients of a batch, and stays visible. A number c must be positive; a tensor c is not looked at, as that would
synchronise the device: below 4e-19 (0 too) it counts as 4e-19, above 4e18 (infinity too) as 4e18, and a negative one
as NaN. These ends are float32's; in float64 they lie at the roots of its own range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcm.shapes import aligned

Scale: TypeAlias = float | Tensor
"""c: a positive number, or a tensor of one scale a sample (``[b]``, ``[b, 1, 1, 1]``) or of the shape of r^2."""

Rho: TypeAlias = Callable[[Tensor, Scale], Tensor]
"""``rho(r2, c)``: elementwise in ``r2``, any shape, 0 at ``r2 = 0``."""

Distance: TypeAlias = Callable[[Tensor, Tensor, Scale], Tensor]
"""``distance(student, teacher, c) -> [b]``."""


def sample_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual norm of each whole sample: ``[b, ...] -> [b]``, the paper's granularity.

    Raises:
        ValueError: the shapes differ (broadcasting would silently pair every sample with every other), or the devices,
            or something other than floating point (bytes would wrap around).
    """
    return _squared_residual(student, teacher).flatten(1).sum(1)


def token_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual norm over the channel axis: ``[b, ch, h, w] -> [b, h, w]``, one value a pixel or token.

    Raises:
        ValueError: as ``sample_r2``.
    """
    return _squared_residual(student, teacher).sum(1)


def element_r2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared residual of each element: ``[b, ...] -> [b, ...]``.

    Raises:
        ValueError: as ``sample_r2``.
    """
    return _squared_residual(student, teacher)


def pseudo_huber_of_r2(r2: Tensor, c: Scale) -> Tensor:
    """Pseudo-Huber distance ``sqrt(r^2 + c^2) - c``.

    r^2 / (2 c) for r << c, r - c for r >> c; the influence |d/dr| rises to 1 and stays there.

    Args:
        r2: squared residual norm >= 0, any shape.
        c: scale > 0 in the units of r (checked when it is a number, not when it is a tensor: that would
            synchronise the device), of a shape as ``Scale`` says.
    Returns:
        The shape of ``r2``, in the units of r.
    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.3. Equals c * Barron's general loss at alpha = 1.
    """
    r2, c = operands(r2, c)
    # An infinite r2 becomes a constant over a finite bound, which finite ones do not reach: no gradient, no inf / inf.
    r2 = torch.where(r2 == math.inf, math.inf, r2)
    bound = 2 * torch.finfo(r2.dtype).max ** 0.5
    # Not sqrt(r2 + c^2) - c: that cancels (2.8 % off in float32 at r2 = 1e-9, c = 0.0345).
    return r2 / _bounded(torch.sqrt(r2 + c**2) + c, bound)


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
    r2, c = operands(r2, c)
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
    r2, c = operands(r2, c)
    u = r2 / (4 * c**2)
    small = _bounded(u, 1)  # not inf / inf where u is infinite
    # Two writings of u / (1 + u): the first loses its gradient to cancellation above 1, the second its value below.
    return torch.where(u < 1, small / (1 + small), 1 - 1 / (1 + u))


def fair_of_r2(r2: Tensor, c: Scale) -> Tensor:
    """Fair distance ``r - c log(1 + r / c)``.

    r^2 / (2 c) for r << c, r - c log(r / c) for r >> c; the influence is r / (r + c): it rises to 1 like
    Pseudo-Huber's, but slowly, 1/2 at r = c and 9/10 at 9 c. It is the tangent normalisation g / (|g| + c) of sCM and
    rCM: their squared loss towards the normalised g has twice this gradient.

    Args:
        r2: squared residual norm >= 0, any shape.
        c: scale > 0 in the units of r.
    Returns:
        The shape of ``r2``, in the units of r.
    Source: Fair 1974, "On the robust estimation of econometric models"; Lu and Song 2024, arXiv 2410.11081.
    """
    r2, c = operands(r2, c)
    finfo = torch.finfo(r2.dtype)
    r = torch.sqrt(r2.clamp(min=finfo.tiny))  # the root has no derivative at 0
    y = _bounded(r / c, finfo.max)
    far = r - c * torch.log1p(y)
    # Below, that cancels; log(1 + y) = 2 artanh(z) = 2 (z + z^3 / 3 + z^5 / 5 + ...), and y - 2 z = y z.
    y = _bounded(y, 0.5)
    z = y / (2 + y)
    series = torch.zeros_like(z)
    for odd in range(21 if r2.dtype == torch.float64 else 11, 1, -2):
        series = series * z**2 + 1 / odd
    near = r2 / c * (1 - 2 * z / (2 + y) * series) / (2 + y)
    return torch.where(y < 0.5, near, far)


def squared_l2_of_r2(r2: Tensor, c: Scale = 1.0) -> Tensor:
    """Squared Euclidean distance ``r^2``; ``c`` is accepted so that it fits where a ``Rho`` goes, and has no effect."""
    return operands(r2, c)[0]


def pseudo_huber(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``pseudo_huber_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return pseudo_huber_of_r2(sample_r2(student, teacher), c)


def cauchy(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``cauchy_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return cauchy_of_r2(sample_r2(student, teacher), c)


def geman_mcclure(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``geman_mcclure_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return geman_mcclure_of_r2(sample_r2(student, teacher), c)


def fair(student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
    """``fair_of_r2`` of the whole sample's residual: ``[b, ...], [b, ...] -> [b]``."""
    return fair_of_r2(sample_r2(student, teacher), c)


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
class LikeSquares:
    """``rho`` of the whole sample, at the height of the squared norm: r^2 for r << c, whatever c is.

    In the place of a squared error the other distances change its size: their curvature is 1 / c^2 or 1 / c, and c
    falls while training. This one leaves a trainer's weights, its clip and its learning rate what they were, and cuts
    the influence of residuals above c as ``rho`` does.
    """

    rho: Rho

    def __call__(self, student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
        """``[b, ...], [b, ...] -> [b]``, in units of r^2."""
        r2, c = operands(sample_r2(student, teacher), c)
        smallest = 1e3 * _range_of_c(r2.dtype)[0]
        # A number is filled in there: a tensor made of it would wait for the device.
        bounded = c.clamp(min=smallest) if isinstance(c, Tensor) else r2.new_full((), max(c, smallest))
        small = 1e-6 * bounded**2  # deep in the quadratic zone, and a normal number
        return self.rho(r2, c) * (small / self.rho(small, c))


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


def operands(r2: Tensor, c: Scale) -> tuple[Tensor, Scale]:
    """What every ``Rho`` does first: r^2 in at least float32, c checked, shaped to fit and inside its range.

    Raises:
        ValueError: a number c that is not positive, a tensor c whose shape does not fit or that is on another device.
    """
    r2 = _at_least_float32(r2)
    if not isinstance(c, Tensor):
        if not c > 0:
            raise ValueError(f"the scale c must be positive, got {c}; it has the units of the residual norm r")
        low, high = _range_of_c(r2.dtype)
        return r2, min(max(c, low), high)
    if c.dim() > 0 and c.device != r2.device:
        raise ValueError(f"the scale c is on {c.device} and the residuals on {r2.device}: bring c there with .to")
    c = _at_least_float32(c) if c.is_floating_point() else c.to(r2.dtype)
    low, high = _range_of_c(torch.float32 if torch.float32 in (c.dtype, r2.dtype) else r2.dtype)
    c = aligned("the scale c", c, r2.shape)
    return r2, torch.where(c >= 0, c.clamp(low, high), math.nan)


def _summed(rho: Rho, r2: Tensor, c: Scale) -> Tensor:
    value = rho(r2, aligned("the scale c", c, r2.shape) if isinstance(c, Tensor) else c)
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def _squared_residual(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape or student.dim() < 2:
        raise ValueError(
            f"student and teacher must have one shape [b, ...], got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"the student is on {student.device} and the teacher on {teacher.device}: bring them together")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"student and teacher must be floating point, got {student.dtype} and {teacher.dtype}")
    td = _at_least_float32(student) - _at_least_float32(teacher)
    td = _bounded(td, torch.finfo(td.dtype).max)  # an infinite element gets the gradient 0, not 0 * inf
    return td * td


def _bounded(x: Tensor, bound: float) -> Tensor:
    """x cut at +-bound, with no gradient there; NaN passes, and so does its gradient.

    ``clamp`` by another name, whose backward is one kernel where that of ``clamp`` is five.
    """
    return F.hardtanh(x, -bound, bound)


def _range_of_c(dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest c whose square, and four times that, is a normal number."""
    finfo = torch.finfo(dtype)
    return 4 * finfo.tiny**0.5, finfo.max**0.5 / 4


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
