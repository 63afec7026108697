"""Barron's general loss, and the adaptive weights of the few-step methods, which are that loss under another name.

::

    Objective(distance=Barron(alpha=0.5), c=MeasuredC())         # on whole samples
    PerToken(BarronOfR2(alpha=0.5))                              # on tokens or elements, as with any Rho
    distance, c = of_adaptive_weight(p=1, eps=0.01)              # MeanFlow's weight: Cauchy with c = 0.071
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcm.losses import Distance, Scale, operands, sample_r2, squared_l2


@dataclass(frozen=True)
class BarronOfR2:
    """Barron's general loss ``(b / alpha) ((r^2 / (b c^2) + 1)^(alpha / 2) - 1)`` with b = |alpha - 2|; a ``Rho``.

    r^2 / (2 c^2) for r << c whatever alpha is; r^alpha for r >> c and alpha > 0, a logarithm at 0, bounded below. It is
    left in Barron's own scaling, a function of r / c alone: then alpha changes nothing but what large residuals do, and
    a sweep over alpha compares like with like. In that scaling

    ========  ======================================  ====================================
    alpha     is                                      exactly
    ========  ======================================  ====================================
    2         squared L2                              ``squared_l2_of_r2 / (2 c^2)``
    1         Pseudo-Huber                            ``pseudo_huber_of_r2 / c``
    0         Cauchy                                  ``cauchy_of_r2``
    -2        Geman-McClure                           ``2 * geman_mcclure_of_r2``
    -inf      Welsch, the limit                       ``1 - exp(-r^2 / (2 c^2))``
    ========  ======================================  ====================================

    c is the same in all of them. Continuous in alpha, without cancellation near 0 and 2. In float32 the value is right
    to 1e-6 (to 3e-6 for r / c above 1e9, where the rounding of alpha shows); so is the influence, except that below
    alpha = -2 its tail magnifies rounding, and below 0 it is 0 where (r / c)^(alpha - 2) is under 1e-38.

    Args:
        alpha: at most 2, -inf included. Above 2 large residuals would pull more than under squared L2.
    Source: Barron 2019, arXiv 1701.03077, Eq. (8) and (13).
    """

    alpha: float
    """Shape of the tail, at most 2, where there is none; -inf is Welsch's."""

    def __post_init__(self) -> None:
        if not self.alpha <= 2:
            raise ValueError(f"alpha must be at most 2, which is squared L2, got {self.alpha}")

    def __call__(self, r2: Tensor, c: Scale) -> Tensor:
        """The shape of ``r2`` (>= 0, any shape), dimensionless; c > 0 in the units of r."""
        r2, c = operands(r2, c)
        u = r2 / c**2
        if self.alpha == 2:
            return u / 2
        if abs(self.alpha) < 1e-20:  # no float64 sees a difference
            return torch.log1p(u / 2)
        rho = _power(u, self.alpha) if self.alpha > -8 else _exponential(u, self.alpha)
        # u / 2 - u^2 / 8 for any alpha. Without it what depends on alpha is lost below the smallest float.
        return torch.where(u < torch.finfo(u.dtype).eps / 8, u / 2, rho)


@dataclass(frozen=True)
class Barron:
    """``BarronOfR2`` of the whole sample's residual: a ``Distance``."""

    alpha: float
    """Shape of the tail, at most 2, where there is none; -inf is Welsch's."""

    def __post_init__(self) -> None:
        BarronOfR2(self.alpha)  # raises

    def __call__(self, student: Tensor, teacher: Tensor, c: Scale) -> Tensor:
        """``[b, ...], [b, ...] -> [b]``."""
        return BarronOfR2(self.alpha)(sample_r2(student, teacher), c)


def of_adaptive_weight(p: float, eps: float) -> tuple[Distance, float]:
    """The distance and the c with the gradient of ``r^2 / sg(r^2 + eps)^p``, sg being the stop gradient.

    MeanFlow and its descendants weight their squared error so, with p and eps fixed by hand. It is Barron's loss with
    alpha = 2 - 2 p and c = sqrt(eps / (2 p)): the weighted loss has eps^(1 - p) / p times its gradient, the same factor
    for all samples. But its value falls when r does, where the weighted loss prints about 1 throughout.

    r is the norm of the whole sample, its squares summed over the d elements. Where p and eps weight their mean, give
    eps * d: the factor is then that of the eps before. p = 0 is ``squared_l2`` itself.

    Args:
        p: >= 0; 1/2 gives Pseudo-Huber, 1 Cauchy, 2 Geman-McClure (see ``BarronOfR2`` for their factors).
        eps: > 0, in the units of r^2.
    Raises:
        ValueError: p is negative, or eps not positive: without it the weight has no scale.
    """
    if not 0 <= p < math.inf:
        raise ValueError(f"p must be 0 or more and finite, got {p}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}: c is sqrt(eps / (2 p)), in the units of r")
    return (squared_l2, 1.0) if p == 0 else (Barron(2 - 2 * p), math.sqrt(eps / (2 * p)))


def _power(u: Tensor, alpha: float) -> Tensor:
    """Barron's loss of u = r^2 / c^2 for -8 < alpha < 2, not 0."""
    b = 2 - alpha
    # Up to where |alpha / 2 log(..)| is 1; for small alpha that is beyond every finite residual.
    near = u < (b * math.expm1(2 / abs(alpha)) if abs(alpha) > 0.03 else math.inf)
    small = torch.where(near, u, 0)  # the branch not taken must not overflow
    from_one = _expm1(alpha / 2 * torch.log1p(small / b)) * (b / alpha)  # does not cancel
    # Neither u / b, which overflows as alpha nears 2, nor exp(alpha / 2 log(..)), whose error grows with the logarithm.
    power = (b ** (b / 2) * (u + b) ** (alpha / 2) - b) / alpha
    return torch.where(near, from_one, power)


def _exponential(u: Tensor, alpha: float) -> Tensor:
    """The same for -inf <= alpha <= -8, where b^(b / 2) would overflow."""
    b = 2 - alpha
    # At 1e24 float64 no longer tells it from the limit.
    x = -u / 2 if alpha < -1e24 else alpha / 2 * torch.log1p(u / b)
    near = x > -1
    return (2 / alpha - 1) * torch.where(near, _expm1(torch.where(near, x, 0)), torch.exp(x) - 1)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 for |x| of about 1 and less. Not ``torch.expm1``: compiled for a CPU it cancels."""
    return 2 * torch.exp(x / 2) * torch.sinh(x / 2)
