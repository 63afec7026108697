"""A histogram of positive numbers on a logarithmic grid: quantiles with a relative error bound, merged by adding.

The counts are plain tensors the caller owns, so they live on any device, go into a checkpoint, and all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogHistogram:
    """Bins whose edges grow by a constant factor from ``smallest`` to ``largest``.

    A quantile read from the counts lies within ``relative_error`` of a value of that rank, for values inside the
    range; values outside count in the end bins. Same bound as DDSketch (Masson et al. 2019, arXiv 1908.10693).
    Adding whole numbers is exact in float64 up to 2^53, so the result does not depend on the order of the values.
    """

    smallest: float = 1e-9
    largest: float = 1e9
    relative_error: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.smallest < self.largest and 0 < self.relative_error < 1):
            raise ValueError(
                "need 0 < smallest < largest and 0 < relative_error < 1, got "
                f"{self.smallest}, {self.largest}, {self.relative_error}"
            )

    @cached_property
    def log_growth(self) -> float:
        """ln of the ratio of neighbouring edges: the widest that keeps the bound at the bin's representative."""
        return math.log((1 + self.relative_error) / (1 - self.relative_error))

    @cached_property
    def num_bins(self) -> int:
        return math.ceil(math.log(self.largest / self.smallest) / self.log_growth)

    def empty(self, groups: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Counts ``[groups, num_bins]``, float64, all zero."""
        return torch.zeros(groups, self.num_bins, dtype=torch.float64, device=device)

    def bins(self, values: Tensor) -> Tensor:
        """Index of the bin of each value, int64, the shape of ``values``; zeros fall in the first bin."""
        position = (values.double().log() - math.log(self.smallest)) / self.log_growth
        return position.nan_to_num(neginf=0.0).clamp(0, self.num_bins - 1).long()

    def count(self, values: Tensor, group: Tensor | None = None, groups: int = 1) -> Tensor:
        """The counts ``[groups, num_bins]`` of these values alone; add them to what was counted before.

        Args:
            values: ``[n]``, >= 0.
            group: ``[n]`` int64 in ``0 .. groups - 1``; None puts all in group 0.
        """
        index = self.bins(values)
        if group is not None:
            index = index + group * self.num_bins
        counts = self.empty(groups, values.device)
        counts.view(-1).index_add_(0, index.reshape(-1), torch.ones_like(index.reshape(-1), dtype=torch.float64))
        return counts

    def quantile(self, counts: Tensor, q: float) -> Tensor:
        """The ``q`` quantile of each group: ``[groups, num_bins] -> [groups]``, NaN where nothing was counted."""
        cumulated = counts.cumsum(-1)
        total = cumulated[..., -1:]
        # The first bin whose cumulated count exceeds q * total; for q = 1 the last one that holds anything.
        index = (cumulated <= q * total).sum(-1, keepdim=True)
        last = (cumulated < total).sum(-1, keepdim=True)
        centre = torch.minimum(index, last).squeeze(-1).double() + 0.5
        # 2 e / (1 + e) is the point of [1, e] with equal relative error to both ends; close to the middle in ln.
        value = torch.exp(math.log(self.smallest) + centre * self.log_growth) / math.cosh(self.log_growth / 2)
        return torch.where(total.squeeze(-1) > 0, value, torch.nan)
