"""Noise levels: Karras sigmas, curricula N(k), the law that draws a level, and the weight of a pair of levels.

A step of consistency training needs, for each sample, a student level ``t_hi`` and a teacher level ``t_lo`` below
it. ``LevelGrid`` (iCT: a stage-wise finer grid) and ``RatioLevels`` (ECT: t -> r) both give them as ``LevelPairs``
from one uniform number a sample, so that the randomness stays in the caller's hands. Everything is a frozen
dataclass one calls; levels are in units of the data (sigma_data = 0.5), index 0 is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from robustcm.checks import LARGEST, SMALLEST, need_order, need_real, need_whole
from robustcm.noise import FlowRange, NoiseRange

SMALLEST_GAP = 2**-21  # of t_lo below t, relative: a few roundings of float32
MOST_LEVELS = 100_000  # beyond, neighbours of a narrow grid are one number in float32


class LevelPairs(NamedTuple):
    """The noise levels of one step."""

    t_hi: Tensor
    """Student level ``[b]``, float32."""
    t_lo: Tensor
    """Teacher level ``[b]``, float32, ``t_lo < t_hi``. (Of a flow map the end of the span, which may be empty.)"""
    depth: Tensor
    """Position of the student level, ``[b]`` in [0, 1): 0 is sigma_max, near 1 the smallest noise. On a grid: i / N, a
    little less than ``NoiseRange.depth``, which is i / (N - 1)."""
    num_levels: int
    """N of the current stage. For ``RatioLevels`` that of the Karras grid whose step in depth is theirs at the median
    level."""


def _need_lognormal(law: LognormalLaw | RatioLevels) -> None:
    need_real(law, "p_mean", least=-100, most=100)
    need_real(law, "p_std", least=1e-3, most=1e3)


# --- Curricula: (step, total_steps) -> N -----------------------------------------------------------------------------

Curriculum: TypeAlias = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class DoublingCurriculum:
    """iCT's exponential curriculum: N - 1 doubles from ``s0`` to ``s1`` in stages of equal length.

    ``N(k) = min(s0 * 2^floor(k / K'), s1) + 1``, ``K' = floor(K / (log2(floor(s1 / s0)) + 1))``.

    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.4; checked in the sLCT authors' code.
    """

    s0: int = 10
    """N - 1 at the start, 1 or more."""
    s1: int = 640
    """N - 1 at the end, s0 or more."""

    def __post_init__(self) -> None:
        need_whole(self, "s0", "s1", least=1, most=MOST_LEVELS - 1)
        need_order(self, "s0", "s1")

    def __call__(self, step: int, total_steps: int) -> int:
        stage_steps = max(1, math.floor(total_steps / (math.log2(self.s1 // self.s0) + 1)))
        doublings: int = min(step // stage_steps, self.s1.bit_length())  # 2^large would only be cut to s1 below
        return min(self.s0 << doublings, self.s1) + 1


@dataclass(frozen=True, kw_only=True)
class ProgressiveCurriculum:
    """CM's curriculum: N grows like a square root, from ``s0`` at the start to ``s1 + 1`` at the end.

    ``N(k) = ceil(sqrt(k / K * ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1``.

    Source: Song et al. 2023, arXiv 2303.01469, appendix C.
    """

    s0: int = 2
    """N at the start, 2 or more."""
    s1: int = 150
    """N - 1 at the end, s0 or more."""

    def __post_init__(self) -> None:
        need_whole(self, "s0", "s1", least=2, most=MOST_LEVELS - 1)
        need_order(self, "s0", "s1")

    def __call__(self, step: int, total_steps: int) -> int:
        grown = step / total_steps * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2
        return math.ceil(math.sqrt(grown) - 1) + 1


@dataclass(frozen=True, kw_only=True)
class FixedCurriculum:
    """The same N at every step."""

    num_levels: int = 21
    """N, 2 or more."""

    def __post_init__(self) -> None:
        need_whole(self, "num_levels", least=2, most=MOST_LEVELS)

    def __call__(self, step: int, total_steps: int) -> int:
        return self.num_levels


# --- Level laws: which of the N - 1 pairs a sample trains on ----------------------------------------------------------

LevelLaw: TypeAlias = Callable[[Tensor], Tensor]
"""``law(levels [N]) -> probabilities [N - 1]`` of drawing the pair (i, i + 1)."""


@dataclass(frozen=True, kw_only=True)
class LognormalLaw:
    """Discretised lognormal: the mass of N(p_mean, p_std^2) in ln t between neighbouring levels.

    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.5; the numbers checked in the sLCT code.
    """

    p_mean: float = -1.1
    """Mean of ln t."""
    p_std: float = 2.0
    """Standard deviation of ln t, above 0."""

    def __post_init__(self) -> None:
        _need_lognormal(self)

    def __call__(self, levels: Tensor) -> Tensor:
        z = (levels.double().log() - self.p_mean) / (math.sqrt(2) * self.p_std)
        cdf = torch.erf(z)
        mass = cdf[:-1] - cdf[1:]
        if not mass.any():  # the bell lies between two levels or far from all: the pair nearest to its middle
            mass[(z[:-1] + z[1:]).abs().argmin()] = 1
        return mass / mass.sum()


@dataclass(frozen=True)
class UniformLaw:
    """Every pair of neighbouring levels equally often (Song et al. 2023)."""

    def __call__(self, levels: Tensor) -> Tensor:
        return torch.full((len(levels) - 1,), 1 / (len(levels) - 1), dtype=torch.float64)


# --- Pairs of levels --------------------------------------------------------------------------------------------------


class PairLaw(Protocol):
    """Gives every sample its pair of noise levels."""

    @property
    def noise(self) -> NoiseRange | FlowRange:
        """The range the levels lie in."""
        ...

    def __call__(self, step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
        """``uniform``: ``[b]`` in [0, 1), the caller's randomness."""
        ...

    def nearest(self, sigma: float, step: int, total_steps: int) -> float:
        """The noise level nearest to ``sigma`` (in ln t) that f is trained at in ``step``: where to sample.

        Between the levels of a grid f is what its network makes of a time it never saw.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LevelGrid:
    """Pairs of neighbours on a Karras grid that a curriculum refines (CM, iCT, sLCT)."""

    curriculum: Curriculum = DoublingCurriculum()
    """How N grows over the run."""
    law: LevelLaw = LognormalLaw()
    """How often each pair of neighbouring levels is drawn."""
    noise: NoiseRange = NoiseRange()
    """The range of the levels."""

    def __call__(self, step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
        num_levels = self.curriculum(step, total_steps)
        levels = self.noise.levels(num_levels)
        cdf = self.law(levels).cumsum(0)
        i = torch.searchsorted(cdf, uniform.double().cpu(), right=True).clamp(max=num_levels - 2)
        t_hi, t_lo, depth = (v.float().to(uniform.device) for v in (levels[i], levels[i + 1], i / num_levels))
        return LevelPairs(t_hi, t_lo, depth, num_levels)

    def nearest(self, sigma: float, step: int, total_steps: int) -> float:
        """See ``PairLaw``."""
        levels = self.noise.levels(self.curriculum(step, total_steps))[:-1]  # at the last f is the identity
        return float(levels[(levels.log() - math.log(sigma)).abs().argmin()])


@dataclass(frozen=True, kw_only=True)
class RatioLevels:
    """ECT's continuous pairs: t lognormal, ``t_lo = t * (1 - n(t) / q^(stage + 1))``, so that t_lo / t rises to 1.

    ``n(t) = 1 + k * sigmoid(-b t)``. Where that would fall below ``sigma_min`` the teacher level is ``sigma_min``:
    early in training most samples learn to denoise, late ones to be consistent.

    Source: Geng et al. 2024, arXiv 2406.14548; n(t) and the decay checked in the authors' code, which cuts at 0
    instead (and takes the clean sample there). ``stages`` as equal parts of the run is ours.
    """

    q: float = 2.0
    """By which the relative gap shrinks a stage, above 1."""
    stages: int = 8
    """Equal parts of the run, 1 or more."""
    k: float = 8.0
    """How much wider the gap is at small noise."""
    b: float = 1.0
    """How fast that fades with t."""
    p_mean: float = -1.1
    """Mean of ln t."""
    p_std: float = 2.0
    """Standard deviation of ln t, above 0."""
    noise: NoiseRange = NoiseRange()
    """The range of the levels."""

    def __post_init__(self) -> None:
        need_real(self, "q", above=1, most=LARGEST)
        need_whole(self, "stages", least=1)
        need_real(self, "k", "b", least=0, most=LARGEST)
        _need_lognormal(self)

    def __call__(self, step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
        stage = min(step * self.stages // total_steps, self.stages - 1)
        t_hi = self._truncated(uniform.double())
        t_lo = (t_hi * (1 - self._gap(t_hi, stage))).clamp(min=self.noise.sigma_min)
        depth = self.noise.depth(t_hi)
        return LevelPairs(t_hi.float(), t_lo.float(), depth.clamp(0, 1).float(), self._num_levels(stage))

    def nearest(self, sigma: float, step: int, total_steps: int) -> float:
        """``sigma``, within the range of levels: all of them are trained at."""
        return min(max(sigma, self._lowest), self.noise.sigma_max)

    @property
    def _lowest(self) -> float:
        return self.noise.sigma_min * (1 + 1e-3)  # a student level: strictly above the teacher's lowest

    def _truncated(self, uniform: Tensor) -> Tensor:
        """The lognormal levels, truncated to the range by squeezing ``uniform`` between the ends' quantiles."""
        ends = self._lowest, self.noise.sigma_max
        # Of a bell below the range the quantiles round to 1; those from the other side do not.
        side = -1 if math.log(ends[0]) > self.p_mean else 1
        low, high = (self._quantile_of(t, side) for t in ends)
        if low == high:  # far from all: the end nearest to its middle
            return torch.full_like(uniform, ends[0] if side < 0 else ends[1])
        t = torch.exp(self.p_mean + side * self.p_std * torch.special.ndtri(low + (high - low) * uniform))
        return t.clamp(*ends)  # a quantile that rounds to 0 or 1 is infinite

    def _quantile_of(self, t: float, side: int) -> float:
        """Of ``t`` from below, with ``side`` -1 from above."""
        z = side * (math.log(t) - self.p_mean) / (math.sqrt(2) * self.p_std)
        return 0.5 * (1 + math.erf(z)) if z > -1 else 0.5 * math.erfc(-z)

    def _gap(self, t: Tensor, stage: int) -> Tensor:
        gap = (1 + self.k * torch.sigmoid(-self.b * t)) * self.q ** -(stage + 1)
        return gap.clamp(min=SMALLEST_GAP)

    def _num_levels(self, stage: int) -> int:
        # At the median level, so that c schedules that depend on N have an honest equivalent.
        median = min(max(math.exp(self.p_mean), self._lowest), self.noise.sigma_max)
        t = torch.tensor(median, dtype=torch.float64)
        low = (t * (1 - self._gap(t, stage))).clamp(min=self.noise.sigma_min)
        step = self.noise.depth(low) - self.noise.depth(t)
        return max(2, round(1 / float(step)) + 1)


@dataclass(frozen=True, kw_only=True)
class DenoiseFirst:
    """A ``share`` of the run with the data as the teacher, so that f learns to denoise; then the levels of ``then``.

    In the first part t_hi is drawn as at the end of ``then``, t_lo is sigma_min, where f is the identity, and N is 2.
    ``then`` has the rest of the steps for all of its stages.

    Beside a ``MeasuredC``: the residuals of the first part are those of a denoiser, not of neighbours, which shrink
    like 1 / (N - 1). Behind the turn c is too small for about a halflife of its counts (measured once: 5 times).

    Source: a start from a diffusion model, as Geng et al. 2024 (ECT), arXiv 2406.14548, have it; here of the same run.
    """

    share: float = 0.2
    """Of the steps, 0 to 1."""
    then: LevelGrid | RatioLevels = LevelGrid()
    """The levels behind it."""

    def __post_init__(self) -> None:
        need_real(self, "share", least=0, most=1)

    @property
    def noise(self) -> NoiseRange:
        """That of ``then``."""
        return self.then.noise

    def __call__(self, step: int, total_steps: int, uniform: Tensor) -> LevelPairs:
        first, rest = self._parts(total_steps)
        if step >= first:
            return self.then(step - first, rest, uniform)
        pairs = self.then(rest - 1, rest, uniform)
        return pairs._replace(t_lo=torch.full_like(pairs.t_lo, self.noise.sigma_min), num_levels=2)

    def nearest(self, sigma: float, step: int, total_steps: int) -> float:
        """See ``PairLaw``."""
        first, rest = self._parts(total_steps)
        return self.then.nearest(sigma, step - first if first <= step and first < total_steps else rest - 1, rest)

    def _parts(self, total_steps: int) -> tuple[int, int]:
        first = round(self.share * total_steps)
        return first, total_steps - first or total_steps  # a share of 1 leaves none


# --- Weights of a pair: (t_hi, t_lo) -> [b] ---------------------------------------------------------------------------

PairWeight: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def inverse_gap(t_hi: Tensor, t_lo: Tensor) -> Tensor:
    """``1 / (t_hi - t_lo)``: iCT's weight, per unit of noise (arXiv 2310.14189, section 3.1; checked)."""
    return 1 / (t_hi - t_lo)


def equal_weight(t_hi: Tensor, t_lo: Tensor) -> Tensor:
    """1 for every pair (Song et al. 2023)."""
    return torch.ones_like(t_hi)


@dataclass(frozen=True, kw_only=True)
class SnrPlusWeight:
    """``1 / t_hi^2 + 1 / sigma_data^2``: ECT's weight, of the student level alone (arXiv 2406.14548; checked)."""

    sigma_data: float = 0.5
    """Standard deviation of the data, above 0."""

    def __post_init__(self) -> None:
        need_real(self, "sigma_data", least=SMALLEST, most=LARGEST)

    def __call__(self, t_hi: Tensor, t_lo: Tensor) -> Tensor:
        return 1 / t_hi**2 + 1 / self.sigma_data**2


@dataclass(frozen=True, kw_only=True)
class BoundedInverseGap:
    """``1 / (t_hi - t_lo + floor)``: iCT's weight for gaps above ``floor``, constant below it.

    Under Pseudo-Huber and Cauchy nearly all of the gradient of iCT's weight comes from the smallest levels; this
    bounds their share. Ours, no paper.
    """

    floor: float = 0.05
    """The gap below which the weight no longer grows."""

    def __post_init__(self) -> None:
        need_real(self, "floor", least=0, most=LARGEST)

    def __call__(self, t_hi: Tensor, t_lo: Tensor) -> Tensor:
        return 1 / (t_hi - t_lo + self.floor)
