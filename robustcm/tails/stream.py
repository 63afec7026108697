"""Box statistics of a stream that cannot be held: one tensor of constant size, updated on the device.

``state_a + state_b`` is the state of both streams, so it all-reduces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from robustcm.checks import need_real, need_whole
from robustcm.sketch import LogHistogram
from robustcm.tails.boxes import Array, BoxStatistics, box, fences, moments, nothing, tail_shape

BLOCK_CPU, BLOCK_DEVICE = 2**14, 2**22  # values a block: below the size at which torch wakes its threads; few launches


@dataclass(frozen=True, kw_only=True)
class TailStream:
    """Box statistics of a stream, per group, in constant memory; deterministic; merging is adding.

    The state is a float64 tensor ``[groups, 2 * num_bins + 6]``: a histogram of x - centre, logarithmic on both sides
    and with one bin for |x - centre| < ``smallest``; the number of values that are not finite; the sums of
    (x - centre)^p, p = 1 .. 4. Counts are exact and independent of order and device up to 2^53.

    Errors, with e = ``relative_error`` and distances taken from ``centre``, for values within ``largest`` of it:
    extremes, quartiles and whiskers within e * distance + ``smallest`` of the true ones (of the farther of the two
    values numpy interpolates between); shares are the true ones for fences moved by that much; alpha and xi within
    about 2 e of themselves and 2 e; mean and moments carry only rounding, 1e-16 * (mean - centre)^2 in the variance,
    so choose a ``centre`` within some hundred std of the mean. Values farther than ``largest`` count in the end bins
    and are announced in ``notes``.
    """

    groups: int = 1
    centre: float = 0.0
    smallest: float = 1e-9
    largest: float = 1e9
    relative_error: float = 0.005

    def __post_init__(self) -> None:
        need_whole(self, "groups", least=1)
        need_real(self, "centre")
        _ = self.histogram.num_bins  # raises on a bad range

    @cached_property
    def histogram(self) -> LogHistogram:
        return LogHistogram(self.smallest, self.largest, self.relative_error)

    @property
    def _width(self) -> int:
        return 2 * self.histogram.num_bins + 6

    def empty(self, device: torch.device | str | None = None) -> Tensor:
        """The state before the first value."""
        return torch.zeros(self.groups, self._width, dtype=torch.float64, device=device)

    def update(self, state: Tensor, values: Tensor, group: Tensor | None = None) -> Tensor:
        """The state after these values; ``state`` itself is not changed. Nothing here waits for the device.

        Args:
            values: ``[...]``, or ``[b, ...]`` with ``group``.
            group: ``[b]`` (any leading shape of ``values``) int64 in ``0 .. groups - 1``, not validated here; None
                puts all in group 0.
        """
        state = state.clone()
        values = values.detach()
        if group is None:
            rows, labels = values.reshape(1, -1), torch.zeros(1, dtype=torch.int64, device=values.device)
        else:
            if values.shape[: group.ndim] != group.shape:
                raise ValueError(
                    f"group must have the leading shape of values, got {tuple(group.shape)} for {tuple(values.shape)}"
                )
            rows = values.reshape(group.numel(), math.prod(values.shape[group.ndim :]))
            labels = group.reshape(-1)
        block = BLOCK_CPU if values.device.type == "cpu" else BLOCK_DEVICE
        step = max(1, block // max(1, rows.shape[1]))
        for i in range(0, len(rows), step):
            for j in range(0, rows.shape[1], block):
                self._add(state, rows[i : i + step, j : j + block], labels[i : i + step])
        return state

    def _add(self, state: Tensor, x: Tensor, label: Tensor) -> None:
        """Adds ``x`` ``[rows, m]``, one label a row, to ``state`` in place."""
        bins = self.histogram.num_bins
        d = x.double() - self.centre
        size = d.abs()
        slot = self.histogram.cells(size).add_(1).clamp_(0, bins)  # 0: nearer to the centre than the first bin
        sign = d.view(torch.int64) >> 63  # -1 below the centre, else 0: (slot ^ sign) - sign is +-slot
        slot.bitwise_xor_(sign).sub_(sign).masked_fill_(~(size < math.inf), bins + 1)
        index = slot.add_((label * self._width + bins)[:, None]).reshape(-1)
        one = torch.ones((), dtype=torch.float64, device=x.device)
        state.view(-1).scatter_add_(0, index, one.expand_as(index))
        d.nan_to_num_(0.0, 0.0, 0.0)
        e = d * d
        sums = torch.stack([d.sum(1), e.sum(1), (d * e).sum(1), (e * e).sum(1)], 1)
        # A product with the one-hot labels: adding by index would sum in a different order at each run on a GPU.
        one_hot = label == torch.arange(self.groups, device=label.device)[:, None]
        state[:, -4:].add_(one_hot.double() @ sums)

    def statistics(self, state: Tensor) -> list[BoxStatistics]:
        """Box statistics of each group; one without finite values has count 0, NaN and a note. Waits for the device."""
        sizes = self.histogram.representatives(torch.arange(self.histogram.num_bins)).numpy()
        grid = np.concatenate([-sizes[::-1], [0.0], sizes]) + self.centre
        return [self._of_group(grid, row) for row in state.cpu().numpy()]

    def _of_group(self, grid: Array, row: Array) -> BoxStatistics:
        counts, not_finite, sums = row[:-5], round(row[-5]), row[-4:]
        n = round(counts.sum())
        if not n:
            return nothing(not_finite)
        outside = round(counts[0] + counts[-1])
        grid, counts = grid[counts > 0], counts[counts > 0]
        cumulated = np.cumsum(counts)

        def quantile(q: float) -> float:
            place = (n - 1) * q
            low, high = (
                grid[np.searchsorted(cumulated, r, side="right")] for r in (math.floor(place), math.ceil(place))
            )
            return float(low + (high - low) * (place - math.floor(place)))

        quartiles = quantile(0.25), quantile(0.5), quantile(0.75)
        inner, outer = fences(quartiles)
        beyond = [float(counts[(grid < low) | (grid > high)].sum()) for low, high in (inner, outer)]
        within = grid[(grid >= inner[0]) & (grid <= inner[1])]
        whiskers = min(quartiles[0], *within[:1]), max(quartiles[2], *within[-1:])
        distance = np.abs(grid - quartiles[1])
        order = np.argsort(distance)[::-1]
        notes: tuple[str, ...] = ()
        if outside:
            notes = (f"{outside} values at the end of the histogram, {self.largest:g} or more from its centre",)
        return box(
            n=n,
            not_finite=not_finite,
            moments=moments(n, self.centre, sums),
            five=(float(grid[0]), *quartiles, float(grid[-1])),
            whiskers=whiskers,
            beyond=(beyond[0], beyond[1]),
            shape=tail_shape(distance[order], counts[order], n),
            notes=notes,
        )
