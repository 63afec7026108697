"""Which distance and which c suit these residuals, and can a robust distance matter here at all?

A pure rule: residual norms in, a frozen record out. In words:

1. **Normalise** each residual norm r by the median of its own noise level; pooled tails are partly a mixture of
   levels, which no robust distance is meant to cure. Levels with fewer than 20 residuals are set aside.
2. **Bound the clean ones**: u = median + 3 * 1.4826 * MAD of the normalised r (3 sigma, were they Gaussian).
3. **Choose c** so that the bend of the distance, where its influence stops growing, lies at u: c = u for
   Pseudo-Huber, u / sqrt(2) for Cauchy, u sqrt(3) / 2 for Geman-McClure, in units of the median, so the same number
   is the ``multiple`` of ``MeasuredC`` and times the median it is c.
4. **Predict the gain**: how many times more samples squared L2 would need for an update of the same variance, by the
   asymptotic variance of an M-estimator of location in d dimensions (``relative_efficiency``) on these residuals.
5. **Choose the distance** with the largest gain, or a milder one (Pseudo-Huber, then Cauchy, then Geman-McClure) that
   comes within 5 % of it. A gain below 1.05 is none: then the mildest is named, and it matters little.
6. **Name the cause** of a gain: outliers if significantly more residuals lie beyond u than Gaussian elements would put
   there (Poisson, p < 0.001), or beyond twice that distance from the median, where even one counts; else spread:
   samples whose residuals differ in size.

What the rule cannot know: whether large residuals carry what is still to be learnt. It prices noise, not signal; and
how a distance weighs the noise levels against each other (``level_spread``) can matter more than its robustness.

Errors, simulated (`tests/synthetic_tails.py`): n residuals over 20 levels, 100 repeats; verdicts outliers / spread /
none in %, median gain of the distance advised, median element gain. "whole": each sample has one scale (Student's t) or
is, with that probability, ten times wider; "elements": each of its d elements.

============  ========  =======================  =======================  =====================
law           where     n = 2000, d = 64         n = 2000, d = 1024       n = 400, d = 64
============  ========  =======================  =======================  =====================
Gaussian      whole       0/0/100  1.00  0.97      0/0/100  1.00  0.97      0/0/100  1.00  0.97
Student t 2   whole       100/0/0  4.58  4.65      100/0/0  4.87  5.05      100/0/0  3.66  3.66
Student t 3   whole       100/0/0  1.87  1.75      100/0/0  1.87  1.78      100/0/0  1.80  1.71
Student t 5   whole       100/0/0  1.30  1.23      100/0/0  1.32  1.22      100/0/0  1.30  1.21
0.1 % x10     whole       72/0/28  1.09  1.05      71/0/29  1.10  1.11      30/0/70  1.00  0.97
1 % x10       whole       100/0/0  1.93  1.89      100/0/0  1.95  1.89       99/0/1  1.88  1.86
5 % x10       whole       100/0/0  5.65  5.03      100/0/0  5.63  4.94      100/0/0  5.70  5.01
Student t 2   elements    100/0/0  2.39  6.15      100/0/0  1.86  7.91      100/0/0  2.12  6.11
Student t 3   elements    100/0/0  1.11  1.83      28/0/72  1.03  1.84      100/0/0  1.09  1.84
Student t 5   elements    0/0/100  1.02  1.23      0/0/100  1.00  1.23       2/0/98  1.02  1.22
0.1 % x10     elements    84/0/16  1.05  1.06      0/0/100  1.01  1.07      65/0/35  1.05  1.08
1 % x10       elements    100/0/0  1.42  1.92      0/0/100  1.02  1.89      100/0/0  1.39  1.86
5 % x10       elements    33/67/0  1.20  5.17      0/0/100  1.01  5.06      25/75/0  1.21  5.07
============  ========  =======================  =======================  =====================

So it never promised a gain on Gaussian residuals, never missed Student's t of whole samples or contamination of 5 %,
missed 1 % up to three times in a hundred at n = 400, and 0.1 %, two samples of 2000, in 3 cases of 10. Outliers in
single elements fade from the norm of a sample as d grows, and the verdict with them; the element gain keeps seeing
them. Pseudo-Huber was named where it comes within 5 % of the best (contamination up to 1 %), Cauchy for the rest,
Geman-McClure never.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from robustcm.losses import (
    Distance,
    Rho,
    cauchy,
    cauchy_of_r2,
    geman_mcclure,
    geman_mcclure_of_r2,
    pseudo_huber,
    pseudo_huber_of_r2,
)
from robustcm.tails.boxes import FEW, BoxStatistics
from robustcm.tails.exact import box_statistics

Array = np.ndarray[Any, np.dtype[Any]]

CLEAN_MADS = 3 * 1.4826  # 3 sigma of a Gaussian
WORTHWHILE = 1.05  # a smaller gain is called none
SIGNIFICANT = 1e-3
MOST_ELEMENTS = 2**22  # the gain on elements is computed from; autograd holds half a dozen float64 copies of them


@dataclass(frozen=True)
class Candidate:
    """A distance the rule chooses among."""

    distance: Distance
    rho: Rho
    bend: float
    """r / c where the influence stops growing: below it a sample is in the quadratic zone."""


CANDIDATES = (  # mildest first
    Candidate(pseudo_huber, pseudo_huber_of_r2, 1.0),
    Candidate(cauchy, cauchy_of_r2, math.sqrt(2)),
    Candidate(geman_mcclure, geman_mcclure_of_r2, 2 / math.sqrt(3)),
)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What ``advise`` found. c has the unit of r; shares, gains and multiples have none. NaN: nothing can be said."""

    count: int
    """Residuals used: finite, above 0, in a level of at least 20."""
    left_out: int
    num_levels: int
    d: int
    distance: Distance
    """A callable of ``robustcm.losses``."""
    c: float
    """``multiple`` times the median of all residuals: valid at this N; it shrinks about as 1 / (N - 1)."""
    multiple: float
    """For ``MeasuredC(multiple=...)``."""
    median: float
    """Of r, over all levels."""
    clean_bound: float
    """u: the largest normalised r of a clean sample."""
    derivation: str
    """How c came about, in words."""
    quadratic_share: dict[str, float]
    """By distance: share of the samples in its quadratic zone at this one c."""
    quadratic_share_by_level: dict[str, float]
    """The same with c following each level's median, as ``MeasuredC(bins=...)`` does."""
    gains: dict[str, float]
    """By distance, each at its own c: see step 4. An underestimate where the variance is infinite."""
    verdict: Literal["outliers", "spread", "none"]
    beyond: float
    """Share of the normalised residuals beyond u."""
    gaussian_beyond: float
    """The same for Gaussian elements, in d dimensions."""
    xi: float
    """Extreme-value index of the normalised r; xi of ``BoxStatistics``, read it there."""
    xi_error: float
    level_spread: float
    """Largest over smallest median of r among the levels."""
    element_gain: float
    """Gain of Cauchy on single elements, normalised per level; NaN without ``td``."""
    element_xi: float
    """Extreme-value index of the elements, normalised per level; NaN without ``td``."""
    notes: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Of the distance advised."""
        return self.gains[_name(self.distance)]

    @property
    def matters(self) -> bool:
        """Whether a robust distance can be expected to gain anything within a noise level."""
        return self.verdict != "none"

    @property
    def sees_elements(self) -> bool:
        """Whether single elements have outliers that the norm of a sample averages away; needs ``td``."""
        return self.element_gain > 1.15 * max(1.0, self.gain)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the distance by name, None for NaN, with gain, matters and the sentences."""
        fields = asdict(self) | {"gain": self.gain, "matters": self.matters, "in_words": self.in_words()}
        fields["distance"] = _name(self.distance)
        return {name: _plain(value) for name, value in fields.items()}

    def in_words(self) -> list[str]:
        """The advice in a few sentences, each beginning with what it is about."""
        name, robust = _name(self.distance), 100 * self.quadratic_share[_name(self.distance)]
        said = [
            f"distance and c: use {name} with c = {self.c:.3g} at N = {self.num_levels}, or "
            f"MeasuredC(multiple={self.multiple:.2f}): {self.derivation}; {robust:.0f} % of the samples then sit in "
            "its quadratic zone"
        ]
        if self.verdict == "none":
            heavy = "tails no heavier than Gaussian" if self.beyond <= 2 * self.gaussian_beyond else "few outliers"
            said.append(
                f"whole samples: the norms r of one noise level have {heavy}, so expect no gain from a robust distance "
                f"(predicted {self.gain:.2f}x in samples); it still reweights noise levels"
            )
        else:
            cause = {
                "outliers": f"{self.beyond:.2%} of the norms r lie beyond the clean bound of their noise level "
                f"(Gaussian: {self.gaussian_beyond:.2%})",
                "spread": "norms r of one noise level differ in size, without distinct outliers",
            }[self.verdict]
            said.append(f"whole samples: {cause}; predicted gain over squared L2 {self.gain:.2f}x in samples")
        if self.sees_elements:
            said.append(
                f"single elements: outliers sit here (gain {self.element_gain:.2f}x), which the norm of a whole sample "
                "averages away; PerElement(cauchy_of_r2) sees them"
            )
        if self.level_spread > 3:
            said.append(
                f"noise levels: the median of r differs {self.level_spread:.0f}-fold between them, so with one c for "
                "all the distance mainly reweights levels; MeasuredC(bins=12) gives each its own"
            )
        return said


def advise(
    r: Tensor | Array, level: Tensor | Array, num_levels: int, d: int, td: Tensor | Array | None = None
) -> Advice:
    """Advice for residuals as training sees them, by the rule of this module.

    Args:
        r: ``[n]`` residual norms of whole samples, in the frequencies of the levels used for training.
        level: ``[n]`` integers, the noise level of each.
        num_levels: N, to label c with.
        d: elements of a sample.
        td: ``[n, ...]`` the temporal differences themselves, to see outliers in single elements.

    Raises:
        ValueError: shapes that differ, or fewer than 20 usable residuals, or residuals that do not vary.
    """
    r, level = _flat(r).astype(np.float64), _flat(level)
    if r.shape != level.shape or (td is not None and len(td) != len(r)):
        raise ValueError(f"need one level and one td a residual, got {len(r)} residuals and {len(level)} levels")
    usable = np.isfinite(r) & (r > 0)
    labels, index, counts = np.unique(level[usable], return_inverse=True, return_counts=True)
    usable[usable] = (counts >= FEW)[index]
    if usable.sum() < FEW:
        raise ValueError(f"need at least {FEW} positive finite residuals in one level, got {usable.sum()} of {len(r)}")
    left_out, r, level = len(r) - int(usable.sum()), r[usable], level[usable]
    labels = np.unique(level)
    medians = np.array([np.median(r[level == label]) for label in labels])
    normalised = r / medians[np.searchsorted(labels, level)]
    bound = _clean_bound(normalised)
    if not bound > np.median(normalised):
        raise ValueError("the residuals do not vary (their MAD is 0): there is no scale to measure")

    gains = {_name(x.distance): relative_efficiency(x.rho, normalised, bound / x.bend, d) for x in CANDIDATES}
    best = max(gains.values())
    chosen = next(x for x in CANDIDATES if best < WORTHWHILE or gains[_name(x.distance)] >= best / 1.05)
    multiple, median = bound / chosen.bend, float(np.median(r))
    num_beyond = int((normalised > bound).sum())
    verdict: Literal["outliers", "spread", "none"] = "none"
    if best >= WORTHWHILE:
        verdict = "outliers" if _more_than_gaussian(normalised, bound, d) else "spread"
    box = box_statistics(normalised)
    notes = tuple(box.notes)
    if left_out:
        notes += (f"{left_out} residuals left out: not finite, 0, or in a level with fewer than {FEW}",)
    elements = None if td is None else _normalised_elements(td, usable, level)
    element_box = _box_or_none(elements)
    return Advice(
        count=len(r),
        left_out=left_out,
        num_levels=num_levels,
        d=d,
        distance=chosen.distance,
        c=multiple * median,
        multiple=multiple,
        median=median,
        clean_bound=bound,
        derivation=f"its bend, r = {chosen.bend:.3g} c, is put at the clean bound {bound:.2f} x median "
        "(median + 3 x 1.4826 MAD within a level)",
        quadratic_share=quadratic_share(r, multiple * median),
        quadratic_share_by_level=quadratic_share(normalised, multiple),
        gains=gains,
        verdict=verdict,
        beyond=num_beyond / len(r),
        gaussian_beyond=gaussian_beyond(d),
        xi=box.xi,
        xi_error=box.xi_error,
        level_spread=float(medians.max() / medians.min()),
        element_gain=_element_gain(elements),
        element_xi=element_box.xi if element_box else math.nan,
        notes=notes,
    )


def relative_efficiency(rho: Rho, r: Array, c: float, d: int) -> float:
    """Variance of squared L2 over that of ``rho`` when both estimate a location from residuals of norm ``r [n]``.

    For spherical residuals in d dimensions and weights w(r) = psi(r) / r the asymptotic variance is V = a / b^2 with
    a = E[psi^2] / d and b = E[(1 - 1/d) w + psi' / d]; for squared L2 it is E[r^2] / d. 1 means no gain, 0 that the
    distance repels more than it attracts (b <= 0).

    Source: Huber 1964 (d = 1); Maronna 1976, "Robust M-estimators of multivariate location and scatter".
    """
    r2 = torch.as_tensor(np.asarray(r, dtype=np.float64) ** 2).requires_grad_()
    (w,) = torch.autograd.grad(2 * rho(r2, c).sum(), r2, create_graph=True)
    # A weight that does not depend on r2, squared L2's, has no graph.
    slope = torch.autograd.grad(w.sum(), r2)[0] if w.requires_grad else torch.zeros_like(w)
    with torch.no_grad():
        b = (w + 2 * r2 * slope / d).mean()
        gain = r2.mean() * b**2 / (w**2 * r2).mean() if b > 0 else torch.zeros(())
    return float(gain)


def quadratic_share(r: Tensor | Array, c: float) -> dict[str, float]:
    """By distance, the share of residuals ``r [n]`` in its quadratic zone at scale ``c``.

    Below c for Pseudo-Huber, sqrt(2) c for Cauchy, 2 c / sqrt(3) for Geman-McClure.
    """
    norms = _flat(r)
    return {_name(x.distance): float((norms < x.bend * c).mean()) for x in CANDIDATES}


def gaussian_beyond(d: int, mads: float = CLEAN_MADS) -> float:
    """Share of the norms of d independent Gaussians beyond median + ``mads`` * MAD of those norms."""
    norm = stats.chi(d)
    median = norm.median()
    mad = optimize.brentq(lambda m: norm.cdf(median + m) - norm.cdf(median - m) - 0.5, 0, 3)
    return float(norm.sf(median + mads * mad))


def _more_than_gaussian(x: Array, bound: float, d: int) -> bool:
    far = 2 * bound - np.median(x)
    for limit, mads in ((bound, CLEAN_MADS), (far, 2 * CLEAN_MADS)):
        if stats.poisson.sf((x > limit).sum() - 1, gaussian_beyond(d, mads) * len(x)) < SIGNIFICANT:
            return True
    return False


def _clean_bound(x: Array) -> float:
    median = np.median(x)
    return float(median + CLEAN_MADS * np.median(np.abs(x - median)))


def _normalised_elements(td: Tensor | Array, usable: Array, level: Array) -> Array:
    """Elements of all usable samples about the median of their level, in units of the median |distance| from it."""
    values, parts = _array(td)[usable].reshape(len(level), -1), list[Array]()
    for label in np.unique(level):
        x = values[level == label].ravel().astype(np.float32)
        x = x - np.median(x)
        mad = np.median(np.abs(x))
        if mad > 0:
            parts.append(x / mad)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _element_gain(elements: Array | None) -> float:
    if elements is None or len(elements) < FEW:
        return math.nan
    some = elements[:: -(-len(elements) // MOST_ELEMENTS)]
    # The clean bound is CLEAN_MADS: in units of the MAD, about a median of 0.
    return relative_efficiency(cauchy_of_r2, np.abs(some), CLEAN_MADS / math.sqrt(2), 1)


def _box_or_none(elements: Array | None) -> BoxStatistics | None:
    return None if elements is None or len(elements) < FEW else box_statistics(elements)


def _flat(values: Tensor | Array) -> Array:
    return _array(values).reshape(-1)


def _array(values: Tensor | Array) -> Array:
    """For numpy, which has no bfloat16."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    array: Array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array


def _name(distance: Any) -> str:
    return str(distance.__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
