"""A histogram of positive numbers on a nearly logarithmic grid: quantiles with a relative error, merged by adding.

The counts are plain tensors the caller owns, so they live on any device, go into a checkpoint, and all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from robustcm.checks import need_order, need_real

SIGNIFICAND_BITS = 52  # of a float64


@dataclass(frozen=True)
class LogHistogram:
    """Bins from ``smallest`` to ``largest``: every octave cut into ``2 ** octave_bits`` bins of equal width.

    A quantile read from the counts lies within ``relative_error`` of a value of that rank, for values inside the
    range; values outside count in the end bins. Same bound as DDSketch (Masson et al. 2019, arXiv 1908.10693).
    The bin of a value is read off its bits (exponent and leading significand), so there is no logarithm whose last
    digit could differ between devices, and it costs three integer operations. Up to 2 / ln 2 = 2.9 times the bins of
    an exactly logarithmic grid pay for that.
    Adding whole numbers is exact in float64 up to 2^53, so the result does not depend on the order of the values.
    """

    smallest: float = 1e-9
    """Values below count as this one, above 0."""
    largest: float = 1e9
    """Values above count as this one."""
    relative_error: float = 0.01
    """Of a quantile, in (0, 1)."""

    def __post_init__(self) -> None:
        need_real(self, "smallest", "largest", least=1e-300, most=1e300)
        need_order(self, "smallest", "largest")
        need_real(self, "relative_error", least=1e-4, below=1)  # at 1e-4 an octave has 8192 bins

    @cached_property
    def octave_bits(self) -> int:
        """The fewest for which the first, relatively widest bin of an octave keeps the bound at its representative."""
        return max(0, math.ceil(math.log2((1 - self.relative_error) / (2 * self.relative_error))))

    @cached_property
    def num_bins(self) -> int:
        return self._cell(self.largest) - self._first + 1

    def empty(self, groups: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Counts ``[groups, num_bins]``, float64, all zero."""
        return torch.zeros(groups, self.num_bins, dtype=torch.float64, device=device)

    def bins(self, values: Tensor) -> Tensor:
        """Index of the bin of each value, int64, the shape of ``values``; zeros and NaN fall in the first bin."""
        return self.cells(values.nan_to_num(nan=0.0, posinf=math.inf, neginf=0.0)).clamp_(0, self.num_bins - 1)

    def cells(self, values: Tensor) -> Tensor:
        """As ``bins``, for finite values >= 0, but going on below 0 and beyond ``num_bins - 1``."""
        return (values.double().view(torch.int64) >> self._shift).sub_(self._first)

    def representatives(self, index: Tensor) -> Tensor:
        """The value that stands for each bin, float64: it has the same relative error to both edges of the bin."""
        low = (index + self._first << self._shift).view(torch.float64)
        high = (index + self._first + 1 << self._shift).view(torch.float64)
        return low * (2 * high / (low + high))

    def count(self, values: Tensor, group: Tensor | None = None, groups: int = 1) -> Tensor:
        """The counts ``[groups, num_bins]`` of these values alone; add them to what was counted before.

        Args:
            values: ``[n]``, >= 0; NaN and infinities are not counted.
            group: ``[n]`` int64 in ``0 .. groups - 1``; None puts all in group 0.
        """
        index = self.bins(values)
        if group is not None:
            index = index + group * self.num_bins
        counts = self.empty(groups, values.device)
        counts.view(-1).index_add_(0, index.reshape(-1), values.isfinite().double().reshape(-1))
        return counts

    def quantile(self, counts: Tensor, q: float) -> Tensor:
        """The ``q`` quantile of each group: ``[groups, num_bins] -> [groups]``, NaN where nothing was counted."""
        cumulated = counts.cumsum(-1)
        total = cumulated[..., -1:].contiguous()
        # The first bin whose cumulated count exceeds q * total; for q = 1 the last one that holds anything.
        index = torch.searchsorted(cumulated, q * total, right=True)
        last = torch.searchsorted(cumulated, total)
        value = self.representatives(torch.minimum(index, last).squeeze(-1).clamp(max=self.num_bins - 1))
        return torch.where(total.squeeze(-1) > 0, value, torch.nan)

    @cached_property
    def _shift(self) -> int:
        return SIGNIFICAND_BITS - self.octave_bits

    @cached_property
    def _first(self) -> int:
        return self._cell(self.smallest)

    def _cell(self, value: float) -> int:
        return int(np.float64(value).view(np.int64)) >> self._shift
