"""The record of a box plot and its tail, and the arithmetic that fills it; ``robustcm.tails`` is what a user calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FEW = 20
SMALLEST_XI = 0.05  # moments up to order 20 exist: no practical difference from a tail lighter than any power law


@dataclass(frozen=True, kw_only=True)
class BoxStatistics:
    """What a box plot shows and what it hides. Lengths have the unit of the values, shares and ratios have none.

    ``count`` counts finite values; ``nan_count`` NaN and infinities, which nothing else here includes. Fences are
    ``(low, high)``: 1.5 IQR (inner) and 3 IQR (outer) outside the quartiles; "beyond" means strictly; a Gaussian has
    0.70 % beyond the inner and 2.3e-6 beyond the outer fences. ``whiskers`` are the outermost values within the
    inner fences. ``kurtosis`` is Pearson's, 3 for a Gaussian. ``max_z`` is max |x - mean| / std.

    The tail is that of |x - median|, both sides together, above its ``tail_count``-th largest value. ``tail_index``
    is Hill's alpha (P(|x| > u) ~ u^-alpha) +- alpha / sqrt(k); it presumes a power law. ``xi`` is the extreme-value
    index of Dekkers, Einmahl and de Haan (1989), which does not: 1 / alpha for a power law, 0 for Gaussian,
    exponential and lognormal tails, negative for bounded ones. See ``tail_shape`` for how they err.
    NaN stands for what cannot be said; ``notes`` says why, in words.
    """

    count: int
    nan_count: int
    mean: float
    std: float
    min: float
    q1: float
    median: float
    q3: float
    max: float
    iqr: float
    inner_fences: tuple[float, float]
    outer_fences: tuple[float, float]
    whiskers: tuple[float, float]
    beyond_inner: float
    beyond_outer: float
    max_z: float
    kurtosis: float
    tail_count: int
    tail_index: float
    tail_index_error: float
    xi: float
    xi_error: float
    notes: tuple[str, ...] = ()

    @property
    def power_law(self) -> bool:
        """Whether the tail is heavier than every exponential beyond doubt: xi > 2 standard errors, and > 0.05."""
        return self.xi > max(2 * self.xi_error, SMALLEST_XI)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: lists for tuples, None for NaN and infinities, ``power_law`` included."""
        values = dataclasses.asdict(self) | {"power_law": self.power_law}
        return {name: _plain(value) for name, value in values.items()}


@dataclass(frozen=True)
class TailShape:
    """The tail above the k-th largest distance: Hill's alpha and the extreme-value index, with standard errors."""

    k: int
    alpha: float = math.nan
    alpha_error: float = math.nan
    xi: float = math.nan
    xi_error: float = math.nan
    notes: tuple[str, ...] = ()


def tail_count(n: int) -> int:
    """How many of ``n`` values make the tail: n^0.6, 251 of 1e4, 3981 of 1e6.

    Grows slower than the n^(2/3) that is best for Student's t with 2 degrees of freedom and faster than the n^0.44
    for 5 (bias of the order (k/n)^(2/df)).
    """
    return int(n**0.6 + 1e-9)


def tail_shape(distances: Array, weights: Array | None = None, n: int | None = None) -> TailShape:
    """Tail index and extreme-value index of the largest of ``n`` distances.

    Args:
        distances: ``[m]`` descending, >= 0, at least the ``4 * tail_count(n) + 1`` largest (or all) of n values.
        weights: ``[m]`` how often each counts; None means once.
        n: default the sum of the weights.

    Errors, simulated, mean at n = 1e4 / 1e5 / 1e6 (the standard errors cover the scatter, 4.0 / 3.2 / 1.6 % of alpha,
    but not this bias, and presume independent values, which the pixels of one picture are not):

    ================  ===================  =====================
    tail              alpha (Hill)         xi
    ================  ===================  =====================
    Student t, 2      1.96  1.97  2.01     0.51  0.50  0.50
    Student t, 3      2.82  2.91  2.93     0.33  0.33  0.33
    Student t, 5      3.95  4.24  4.49     0.15  0.19  0.19
    Student t, 10     5.27  6.07  6.74     0.05  0.06  0.07
    lognormal(0, 1)   2.35  2.72  3.11     0.26  0.25  0.24
    Laplace           4.48  5.48  6.35     0.00  0.02  0.01
    Gaussian          7.3   9.0   10.7    -0.09 -0.07 -0.06
    ================  ===================  =====================

    So Hill never says "lighter than any power law", it only grows with n; read xi for that. ``power_law`` (xi > 2
    errors) recognised Student's t 2 / 3 / 5 in 100 / 90 / 70 % of samples of 1e4 and always from 1e5, was never wrong
    on Gaussians, up to 10 % of the time on Laplace, and takes a lognormal for a power law.
    Contamination (a share e of the values, ten times wider) has no index: xi is about 0.4 to 0.7 while k/n > e / 3 or
    so, where wide and narrow mix, and that of the wide Gaussian, slightly negative, where k/n is below (e = 5 % from
    n = 1e4, 1 % from n = 1e6): then the share beyond the outer fences tells, not the index. ``notes`` speaks up when
    xi at k and at 4 k differ by more than 4 standard errors and 0.15: in a third to all of the contaminated samples
    near that change and in no sample of the laws in the table.
    """
    weights = np.ones(len(distances)) if weights is None else weights
    n = round(float(weights.sum())) if n is None else n
    if n < FEW:
        return TailShape(0)
    k = tail_count(n)
    hill, xi = _hill_and_moment(distances, weights, k)
    if not math.isfinite(xi):
        return TailShape(k, notes=(f"no tail index: the {k} largest distances from the median are tied or zero",))
    notes: tuple[str, ...] = ()
    error = _xi_error(xi) / math.sqrt(k)
    further = _hill_and_moment(distances, weights, 4 * k)[1] if 4 * k < n / 4 else math.nan
    if abs(further - xi) > max(4 * error, 0.15):
        notes = (
            f"the tail has no single index: xi is {xi:.2f} above the {k} largest distances, {further:.2f} above "
            f"the {4 * k} largest, as in a mixture",
        )
    return TailShape(k, 1 / hill, 1 / hill / math.sqrt(k), xi, error, notes)


def box(
    *,
    n: int,
    not_finite: int,
    moments: tuple[float, float, float],
    five: tuple[float, float, float, float, float],
    whiskers: tuple[float, float],
    beyond: tuple[float, float],
    shape: TailShape,
    notes: tuple[str, ...] = (),
) -> BoxStatistics:
    low, q1, median, q3, high = five
    mean, std, kurtosis = moments
    said = [*notes]
    if not_finite:
        said.append(f"{not_finite} of {n + not_finite} values are NaN or infinite and left out")
    if n < FEW:
        said.append(f"only {n} values: no tail index, and the quartiles and shares are coarse")
    if std == 0:
        said.append("constant, or spread less than float64 resolves: no kurtosis, no z")
    elif q1 == q3:
        said.append(
            f"IQR = 0: half of the values or more are {median:g}, so the fences fall on it and every other value "
            "counts as an outlier; the shares beyond say nothing about tails"
        )
    if std != 0 and not math.isfinite(kurtosis):
        said.append("values too large or too small for their fourth powers in float64: no kurtosis, perhaps no std")
    inner, outer = fences((q1, median, q3))
    return BoxStatistics(
        count=n,
        nan_count=not_finite,
        mean=mean,
        std=std,
        min=low,
        q1=q1,
        median=median,
        q3=q3,
        max=high,
        iqr=q3 - q1,
        inner_fences=inner,
        outer_fences=outer,
        whiskers=whiskers,
        beyond_inner=beyond[0] / n,
        beyond_outer=beyond[1] / n,
        max_z=max(high - mean, mean - low) / std if std > 0 else math.nan,
        kurtosis=kurtosis,
        tail_count=shape.k,
        tail_index=shape.alpha,
        tail_index_error=shape.alpha_error,
        xi=shape.xi,
        xi_error=shape.xi_error,
        notes=(*said, *shape.notes),
    )


def nothing(not_finite: int) -> BoxStatistics:
    """The record of no finite values at all: every number NaN, and a note."""
    pairs = dict.fromkeys(("inner_fences", "outer_fences", "whiskers"), (math.nan, math.nan))
    fields: dict[str, Any] = {f.name: math.nan for f in dataclasses.fields(BoxStatistics)} | pairs
    notes = (f"no finite values, {not_finite} NaN or infinite",)
    return BoxStatistics(**fields | {"count": 0, "nan_count": not_finite, "tail_count": 0, "notes": notes})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fences(quartiles: tuple[float, float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    q1, _, q3 = quartiles
    iqr = q3 - q1
    return (q1 - 1.5 * iqr, q3 + 1.5 * iqr), (q1 - 3 * iqr, q3 + 3 * iqr)


def moments(n: int, shift: float, power_sums: Sequence[float] | Array) -> tuple[float, float, float]:
    """Mean, std and kurtosis of n values from the sums of (x - shift)^p, p = 1 .. 4."""
    a, b, c, d = (float(s) / n for s in power_sums)
    variance = b - a * a
    if not variance > 1e-14 * b:  # nothing but rounding
        return shift + a, 0.0 if math.isfinite(b) else math.nan, math.nan
    fourth = d - 4 * a * c + 6 * a * a * b - 3 * a**4
    square = variance * variance
    return shift + a, math.sqrt(variance), fourth / square if square > 1e-290 else math.nan


def _hill_and_moment(distances: Array, weights: Array, k: int) -> tuple[float, float]:
    """1 / alpha and xi from the k largest of the descending, weighted distances; NaN where they are tied or zero."""
    cumulated = np.cumsum(weights)
    threshold = distances[np.searchsorted(cumulated, k, side="right")]
    if not threshold > 0:
        return math.nan, math.nan
    above = cumulated <= k  # a value that straddles k is the threshold itself and would add ln 1
    logs, share = np.log(distances[above] / threshold), weights[above] / k
    # Not a product of vectors: BLAS wakes its threads, and they cost more than the sum.
    one, two = float((share * logs).sum()), float((share * logs * logs).sum())
    if not two > one * one * (1 + 1e-12):
        return math.nan, math.nan
    return one, one + 1 - 0.5 / (1 - one * one / two)


def _xi_error(xi: float) -> float:
    """Asymptotic standard error of xi times sqrt(k), Dekkers, Einmahl and de Haan (1989), theorem 3.1."""
    if xi >= 0:
        return math.sqrt(1 + xi * xi)
    one, two, three, four = (1 - i * xi for i in (1, 2, 3, 4))
    return math.sqrt(one**2 * two * (4 - 8 * two / three + (5 - 11 * xi) * two / (three * four)))
