"""The scale c of the robust distances (technique 4): constant, the authors' law, or measured from the residuals.

A scale is a frozen dataclass. What it learns while training lives in a tensor the caller passes in and gets back
(``[0]`` for the scales that learn nothing), so it can be checkpointed or thrown away::

    state = scale.init(device)
    seen = scale.count(r, depth, num_levels)               # r: [b] residual norms; no synchronisation
    c = scale(state, seen, depth, num_levels, d)           # a number, or [b]
    state = scale.observe(state, seen)                     # once an optimizer step

c of a step comes from the state before it; only where nothing was observed yet, from the step's own ``seen``. What a
step has seen is a sum: ``seen`` of its micro-batches and ranks are added, then observed together, once.

c has the units of the residual norm r of a whole sample. d is the number of elements of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustcm.checks import LARGEST, SMALLEST, need_real, need_whole
from robustcm.losses import Scale
from robustcm.sketch import LogHistogram

MOST_COUNTS = 2**24  # in all histograms of one scale: 128 MB
AUTHORS_D = 4096  # elements of the latents that the numbers of the paper and of the authors' code belong to


class CSchedule(Protocol):
    """Gives c for the samples of one step."""

    def init(self, device: torch.device | str | None = None) -> Tensor:
        """The state before the first step."""
        ...

    def count(self, r: Tensor, depth: Tensor, num_levels: int) -> Tensor:
        """What residual norms ``r [b]`` at ``depth [b]`` (0: largest noise, 1: smallest) of N levels add.

        Adding these over micro-batches and ranks gives those of the whole step, exactly.
        """
        ...

    def observe(self, state: Tensor, seen: Tensor) -> Tensor:
        """The state after a step in which ``seen`` was counted; ``state`` itself is not changed."""
        ...

    def __call__(self, state: Tensor, seen: Tensor, depth: Tensor, num_levels: int, d: int) -> Scale:
        """c for each sample of the step: a number or ``[b]``.

        Args:
            state: from before the step.
            seen: of this step, of use only in the first: where ``state`` has observed nothing.
        """
        ...


class _NothingLearnt:
    def init(self, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(0, device=device)

    def count(self, r: Tensor, depth: Tensor, num_levels: int) -> Tensor:
        return torch.zeros(0, device=r.device)

    def observe(self, state: Tensor, seen: Tensor) -> Tensor:
        return state


@dataclass(frozen=True, kw_only=True)
class ConstantC(_NothingLearnt):
    """``c = per_sqrt_d * sqrt(d)`` at every step: iCT's (0.0345 at d = 4096).

    Source: Song and Dhariwal 2023, arXiv 2310.14189, section 3.3; checked in the sLCT code.
    """

    per_sqrt_d: float = 0.00054
    """c of a sample of one element, above 0."""

    def __post_init__(self) -> None:
        need_real(self, "per_sqrt_d", least=1e-12, most=1e12)

    def __call__(self, state: Tensor, seen: Tensor, depth: Tensor, num_levels: int, d: int) -> float:
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

    def __post_init__(self) -> None:
        need_real(self, "slope", least=-3, most=3)  # beyond, c leaves what float32 can square
        need_real(self, "offset", least=-10, most=10)
        need_whole(self, "constant_until", least=0)

    def __call__(self, state: Tensor, seen: Tensor, depth: Tensor, num_levels: int, d: int) -> float:
        if num_levels <= self.constant_until:
            return self.constant(state, seen, depth, num_levels, d)
        return math.exp(self.slope * math.log(num_levels - 1) + self.offset) * math.sqrt(d / AUTHORS_D)


@dataclass(frozen=True, kw_only=True)
class MeasuredC:
    """``c = multiple * quantile(r)``, measured while training over all levels (``bins = 1``) or per noise level.

    What is measured is r * (N - 1), which hardly moves when N doubles, in a ``LogHistogram`` for each of ``bins``
    equal ranges of the levels' depth; old counts fade with ``halflife_steps``. The first step measures its own
    residuals, so no first guess is needed; a range nothing was seen in yet has the scale of all together. Residuals
    that are not finite are not counted. Deterministic, on the device; the state is the histogram.

    The state carries how many states it is the sum of, in its last column, and is read divided by that: summing the
    state over ranks, as an all-reduce of everything would, changes nothing.

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
        need_real(self, "multiple", least=SMALLEST, most=LARGEST)
        need_real(self, "q", above=0, below=1)
        need_real(self, "halflife_steps", above=0, or_inf=True)
        low, high = self.histogram.smallest, self.histogram.largest
        if not 1e-12 <= low <= 1 <= high <= 1e12:
            raise ValueError(f"histogram must reach from 1e-12 .. 1 (smallest) to 1 .. 1e12, got {low} to {high}")
        need_whole(self, "bins", least=1, most=max(1, MOST_COUNTS // self.histogram.num_bins))

    def init(self, device: torch.device | str | None = None) -> Tensor:
        """``[bins, histogram.num_bins + 1]`` float64."""
        return _with_copies(self.histogram.empty(self.bins, device))

    def count(self, r: Tensor, depth: Tensor, num_levels: int) -> Tensor:
        """``[bins, histogram.num_bins]`` float64: whole numbers, so sums of them are exact in any order."""
        return self.histogram.count(r.detach() * (num_levels - 1), self._bin(depth), self.bins)

    def observe(self, state: Tensor, seen: Tensor) -> Tensor:
        fade: float = 0.5 ** (1 / self.halflife_steps)
        return _with_copies(state[:, :-1] / state[:, -1:] * fade + seen)

    def __call__(self, state: Tensor, seen: Tensor, depth: Tensor, num_levels: int, d: int) -> Tensor:
        counts = state[:, :-1]  # a quantile does not mind how many copies were added
        counts = torch.where(counts.sum() > 0, counts, seen)
        typical = self.histogram.quantile(torch.cat([counts, counts.sum(0, keepdim=True)]), self.q)
        typical, pooled = typical[:-1], typical[-1:]
        lacking = typical.isnan()  # nothing seen there yet
        if self.at_least_pooled:
            lacking = lacking | (typical < pooled)
        typical = torch.where(lacking, pooled, typical)
        return (self.multiple / (num_levels - 1) * typical).float()[self._bin(depth)]

    def _bin(self, depth: Tensor) -> Tensor:
        return (depth * self.bins).long().clamp(0, self.bins - 1)


def _with_copies(counts: Tensor) -> Tensor:
    return torch.cat([counts, torch.ones_like(counts[:, :1])], 1)
