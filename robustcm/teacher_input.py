"""What the teacher is shown: the data at the lower level, or that with the variance which a step would lose.

Consistency training is a chain of regressions: f(., t_hi) learns the mean of f(x_lo, t_lo) given x_hi, and a regression
shrinks towards the mean. What comes out of the chain varies less than the data, the more so the coarser the levels.
Where a gate ends the coupling it is the other way round: the student above has noise that goes with the data, whose
x_t varies more than that the teacher below was trained on. Of Gaussian data both are known. With eigenvalues l of the
data's covariance, r = E[x z] along each eigenvector, and p(t) the share of samples that take the coupled noise at t::

    V(t) = l + t^2 + 2 t p(t) r                                 variance of x_t
    C    = l + t_hi t_lo + p(t_hi) r (t_hi + t_lo)              covariance of x_hi and x_lo
    E[x_lo | x_hi] = C / V(t_hi) x_hi                           what the student learns to give
    sqrt(V(t_lo) / V(t_hi)) x_hi                                what would have variance V(t_lo): the probability flow

``KeepCovariance`` shows the teacher x_lo times ``sqrt(V(t_hi) V(t_lo)) / C``, component by component: then the two are
the same, for any levels, couplers and gates. As the levels grow dense the factor goes to 1, but for the one at a gate.

Without a coupling it is at most ``(t_hi + t_lo) / (2 sqrt(t_hi t_lo))``, where l = t_hi t_lo, and 1 for components far
above or below: pairs as far apart as those that ``RatioLevels`` begins with, down to sigma_min, are shown up to 16
times as much. That is right for them, too: f(., sigma_min) is the identity, so the target is the data scaled such that
its regression is the flow, and signal and noise of the regression grow alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from robustcm.checks import need_whole
from robustcm.consistency import add_noise
from robustcm.principal import principal
from robustcm.schedules import LevelPairs
from robustcm.shapes import same_shape

TeacherInput: TypeAlias = Callable[[Tensor, Tensor, LevelPairs, Tensor, Tensor], Tensor]
"""``(x [b, ...], z [b, ...], pairs, p_hi [b], p_lo [b]) -> x_lo [b, ...]``; p: what the gate gives at both levels."""


@dataclass(frozen=True, kw_only=True)
class KeepCovariance:
    """The teacher's input, scaled along the principal components of the data so that no step loses or adds variance.

    It becomes a ``TeacherInput`` with ``on``; not before it has seen data.

    Source: ours; derived above and tested in closed form, measured in docs/evidence.md. That coupled noise leaves x_t
    another variance, and that a gate has to mend that, has no paper that we know.
    """

    components: int = 256
    """Principal components that are scaled each by its own factor; what lies outside shares one."""

    def __post_init__(self) -> None:
        need_whole(self, "components", least=1)

    def on(self, x: Tensor, paired: tuple[Tensor, Tensor] | None = None) -> CovarianceKept:
        """The teacher's input for data ``x [n, ...]``; a few thousand samples of a larger set serve.

        Args:
            paired: samples ``[m, ...]`` and their coupled noise, as they are trained on; None: no coupling.
        Raises:
            ValueError: fewer than two samples, none that vary, or numbers that are not finite.
        """
        if len(x) < 2:
            raise ValueError(f"need at least two samples to know what varies, got {len(x)}")
        flat = x.detach().flatten(1).double().cpu()
        if not flat.isfinite().all():
            raise ValueError("x has values that are NaN or infinite: a covariance needs finite ones")
        mean = flat.mean(0)
        axes, variances = _principal(flat - mean, min(self.components, len(flat) - 1))
        total = float((flat - mean).square().sum() / len(flat))
        if (flat == flat[0]).all() or total <= 0:  # the mean of equal numbers need not be that number
            raise ValueError(f"all {len(x)} samples are the same: nothing varies")
        along, in_all = torch.zeros_like(variances), 0.0
        if paired is not None:
            data, noise = (of.detach().flatten(1).double().cpu() for of in paired)
            same_shape(data=data, noise=noise)
            if not (data.isfinite().all() and noise.isfinite().all()):
                raise ValueError("paired has values that are NaN or infinite: a covariance needs finite ones")
            data = data - mean
            along = ((data @ axes) * (noise @ axes)).mean(0)
            in_all = float((data * noise).sum(1).mean())
        rest = flat.shape[1] - len(variances)
        if rest:
            variances = torch.cat([variances, variances.new_tensor([max(0.0, total - float(variances.sum())) / rest])])
            along = torch.cat([along, along.new_tensor([(in_all - float(along.sum())) / rest])])
        # A covariance below 0 would be chance: a coupling never pairs data with noise that points away from it.
        return CovarianceKept(mean.float(), axes.float(), variances, along.clamp(min=0))

    def __call__(self, x: Tensor, z: Tensor, pairs: LevelPairs, p_hi: Tensor, p_lo: Tensor) -> Tensor:
        """Not yet a teacher's input.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self} has seen no data: use {self}.on(x, paired)")


@dataclass(frozen=True, eq=False)
class CovarianceKept:
    """What ``KeepCovariance`` measured, float32 and float64, CPU; d numbers a sample, k components."""

    mean: Tensor
    """``[d]``."""
    axes: Tensor
    """``[d, k]``, orthonormal columns."""
    variances: Tensor
    """l: ``[k]``; with k < d one more, that of each direction outside of the axes."""
    along: Tensor
    """r: the covariance of data and coupled noise, as ``variances``."""

    def factor(self, t_hi: Tensor, t_lo: Tensor, p_hi: Tensor, p_lo: Tensor) -> Tensor:
        """``[b]`` each -> ``[b, len(variances)]`` float64: by what x_lo is scaled.

        Not below 1 where p_hi = p_lo (Cauchy and Schwarz); 1 where also t_hi = t_lo.
        """
        hi, lo, p, q = (value.double().unsqueeze(1) for value in (t_hi, t_lo, p_hi, p_lo))
        above, below = self._variance(hi, p), self._variance(lo, q)
        together = self.variances + hi * lo + p * self.along * (hi + lo)
        return (above * below).sqrt() / together

    def __call__(self, x: Tensor, z: Tensor, pairs: LevelPairs, p_hi: Tensor, p_lo: Tensor) -> Tensor:
        """``x_lo [b, ...]``, scaled. Two products with the axes: ``4 b d k`` operations.

        Of two levels (N = 2) as it is: that is denoising, whose mean is wanted; the factor would be t_hi over the
        deviation of the data, and the teacher's noise with it.
        """
        x_lo = add_noise(x, z, pairs.t_lo)
        if pairs.num_levels == 2:
            return x_lo
        mean, axes = self.mean.to(x_lo.dtype), self.axes.to(x_lo.dtype)
        more = (self.factor(pairs.t_hi, pairs.t_lo, p_hi, p_lo) - 1).to(x_lo.dtype)
        away, k = x_lo.flatten(1) - mean, axes.shape[1]
        rest = more[:, k:].sum(1, keepdim=True)  # of the one entry, or of none
        change = ((away @ axes) * (more[:, :k] - rest)) @ axes.T + rest * away
        return x_lo + change.reshape(x_lo.shape)

    def spread_of_samples(self, levels: Tensor, shares: Tensor) -> Tensor:
        """Variance of one-step samples over that of the data ``[len(variances)]``, had the teacher been shown x_lo as
        it is, the data been Gaussian, and every step been learned perfectly.

        Args:
            levels: falling, ``[N]``, all that are trained at.
            shares: p at each.
        """
        t, p = levels.double(), shares.double()
        hi, lo, p_hi = t[:-1, None], t[1:, None], p[:-1, None]
        together = self.variances + hi * lo + p_hi * self.along * (hi + lo)
        kept = (together / self._variance(hi, p_hi)).log().sum(0).exp()
        return (kept * t[0]).square() / self.variances

    def _variance(self, t: Tensor, p: Tensor) -> Tensor:
        return self.variances + t * t + 2 * t * p * self.along


def _principal(centred: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``[d, k]`` and eigenvalues ``[k]``, falling, of the covariance of ``centred [n, d]``."""
    n, d = centred.shape
    k = min(most, d)
    if d <= n:
        axes, values, _ = principal(centred.T @ centred / n, k)
        return axes, values.clamp(min=0)
    rows, values, _ = principal(centred @ centred.T / n, k)  # n x n has the same ones
    real = values > 1e-10 * values[0]  # the others' directions would be those of rounding
    values, rows = values[real], rows[:, real]
    return centred.T @ rows / (n * values).sqrt(), values
