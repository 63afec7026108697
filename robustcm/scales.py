"""The scale c of the robust distances (technique 4): constant, the authors' law, or measured from the residuals.

A scale is a frozen dataclass. What it learns while training lives in a tensor the caller passes in and gets back
(``[0]`` for the scales that learn nothing), so it can be checkpointed, all-reduced or thrown away::

    state = scale.init(device)
    state = scale.observe(state, r, pairs)        # r: [b] residual norms of this step; no synchronisation
    c = scale(state, pairs, d)                    # a number, or [b]

c has the units of the residual norm r of a whole sample. d is the number of elements of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustcm.losses import Scale
from robustcm.schedules import LevelPairs
from robustcm.sketch import LogHistogram

AUTHORS_D = 4096  # elements of the latents that the numbers of the paper and of the authors' code belong to


class CSchedule(Protocol):
    """Gives c for the samples of one step."""

    def init(self, device: torch.device | str | None = None) -> Tensor:
        """The state before the first step."""
        ...

    def observe(self, state: Tensor, r: Tensor, pairs: LevelPairs) -> Tensor:
        """The state after seeing the residual norms ``r`` ``[b]`` of one step; ``state`` itself is not changed."""
        ...

    def __call__(self, state: Tensor, pairs: LevelPairs, d: int) -> Scale:
        """c for each sample of the step: a number or ``[b]``."""
        ...


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


class _NothingLearnt:
    def init(self, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(0, device=device)

    def observe(self, state: Tensor, r: Tensor, pairs: LevelPairs) -> Tensor:
        return state


@dataclass(frozen=True, kw_only=True)
class ConstantC(_NothingLearnt):
    """``c = per_sqrt_d * sqrt(d)`` at every step: iCT's (0.0345 at d = 4096).

    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.3; checked in the sLCT code.
    """

    per_sqrt_d: float = 0.00054
    """c of a sample of one element, above 0."""

    def __post_init__(self) -> None:
        _positive("per_sqrt_d", self.per_sqrt_d)

    def __call__(self, state: Tensor, pairs: LevelPairs, d: int) -> float:
        return self.per_sqrt_d * math.sqrt(d)


@dataclass(frozen=True, kw_only=True)
class PowerLawC(_NothingLearnt):
    """``c(N) = exp(slope * ln(N - 1) + offset) * sqrt(d / 4096)``, and iCT's constant while N <= ``constant_until``.

    A straight line in log-log, fitted by the authors to the spread of the temporal difference per stage. The
    defaults are those of their code (checked); the paper prints -1.18 and -0.72 (from memory). Scaling to other d by
    sqrt(d) is ours and keeps the ratio to iCT's constant.
    """

    slope: float = -1.15
    """Of ln c over ln(N - 1)."""
    offset: float = -0.85
    """ln c at N = 2 and d = 4096."""
    constant_until: int = 11
    """Largest N that still takes ``constant``."""
    constant: ConstantC = ConstantC()
    """c while there are few noise levels."""

    def __call__(self, state: Tensor, pairs: LevelPairs, d: int) -> float:
        if pairs.num_levels <= self.constant_until:
            return self.constant(state, pairs, d)
        return math.exp(self.slope * math.log(pairs.num_levels - 1) + self.offset) * math.sqrt(d / AUTHORS_D)


@dataclass(frozen=True, kw_only=True)
class MeasuredC:
    """``c = multiple * quantile(r)``, measured while training over all levels (``bins = 1``) or per noise level.

    What is measured is r * (N - 1), which hardly moves when N doubles, in a ``LogHistogram`` for each of ``bins``
    equal ranges of the levels' depth; old counts fade with ``halflife_steps``. The residuals of the present step are
    in the measurement, so no first guess is needed. Deterministic, on the device, the state is the histogram.

    Ours; the paper fits its law by hand once. In a prototype the median of r was about 25 / (N - 1) at
    d = 256, 36 to 450 times the authors' c.
    """

    multiple: float = 1.0
    """c over the quantile of the residuals, above 0."""
    q: float = 0.5
    """Which quantile, between 0 and 1; 0.5 is the median."""
    bins: int = 1
    """Ranges of the noise levels that get a c of their own; 1: one c for all."""
    at_least_pooled: bool = False
    """No level's c below the one of all levels together. One c for all leaves a level behind whose residuals are far
    above it, where Geman-McClure has no gradient; a c for each weighs the levels of small residuals up. This does
    neither."""
    halflife_steps: float = 100.0
    """Steps after which a residual counts half, above 0."""
    histogram: LogHistogram = LogHistogram(smallest=1e-8, largest=1e8, relative_error=0.02)
    """What the residuals are counted in."""

    def __post_init__(self) -> None:
        _positive("multiple", self.multiple)
        _positive("halflife_steps", self.halflife_steps)
        if not (0 < self.q < 1 and self.bins >= 1):
            raise ValueError(f"need 0 < q < 1 and bins >= 1, got q = {self.q}, bins = {self.bins}")

    def init(self, device: torch.device | str | None = None) -> Tensor:
        return self.histogram.empty(self.bins, device)

    def observe(self, state: Tensor, r: Tensor, pairs: LevelPairs) -> Tensor:
        seen = self.histogram.count(r.detach() * (pairs.num_levels - 1), self._bin(pairs), self.bins)
        fade: float = 0.5 ** (1 / self.halflife_steps)
        return state * fade + seen

    def __call__(self, state: Tensor, pairs: LevelPairs, d: int) -> Tensor:
        typical = self.histogram.quantile(state, self.q)
        if self.at_least_pooled:
            pooled = self.histogram.quantile(state.sum(0, keepdim=True), self.q)
            typical = torch.where(typical > pooled, typical, pooled)  # also where a level was never seen: NaN
        return (self.multiple / (pairs.num_levels - 1) * typical).float()[self._bin(pairs)]

    def _bin(self, pairs: LevelPairs) -> Tensor:
        return (pairs.depth * self.bins).long().clamp(0, self.bins - 1)
