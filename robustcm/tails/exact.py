"""Exact box statistics of all values, of each index of an axis, or of each group.

Shares are fractions of the finite values. Variance and kurtosis are those of the population (divisor n).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from robustcm.tails.boxes import Array, BoxStatistics, box, fences, moments, nothing, tail_count, tail_shape
from robustcm.tails.chunked import Chunks, body, far


def box_statistics(values: Array | Tensor) -> BoxStatistics:
    """Exact box statistics of all the values, whatever their shape; quantiles as ``numpy.quantile``'s default.

    float16, bfloat16 and float32 are compared as float32, all else as float64; moments are float64 throughout.
    Extra memory about 50 MB at 1e8 float32 values (``benchmarks/tails.py``), plus one piece where ``values`` is on a
    device or not contiguous. NaN and infinities are set aside, counted in ``nan_count`` and reported in ``notes``.

    Raises:
        ValueError: no values, no finite value, or not real numbers.
    """
    chunks = Chunks(values)
    sample = chunks.sample()
    if not len(sample):
        raise ValueError(f"need at least one finite value, got {chunks.size} values, none of them finite")
    return _exact(chunks, sample)


def _exact(chunks: Chunks, sample: Array) -> BoxStatistics:
    b = body(chunks, sample, top=4 * tail_count(chunks.size) + 1)
    inner, outer = fences(b.quartiles)
    f = far(chunks, sample, b, inner, outer, top=4 * tail_count(b.count) + 1)
    return box(
        n=b.count,
        not_finite=b.not_finite,
        moments=moments(b.count, b.shift, b.power_sums),
        five=(f.extremes[0], *b.quartiles, f.extremes[1]),
        whiskers=f.whiskers,
        beyond=(f.beyond_inner, f.beyond_outer),
        shape=tail_shape(f.distances, n=b.count),
    )


def _part(values: Array | Tensor) -> BoxStatistics:
    """As ``box_statistics``, but a part without finite values among others is a finding, not an error."""
    chunks = Chunks(values)
    sample = chunks.sample()
    return _exact(chunks, sample) if len(sample) else nothing(chunks.size)


def box_statistics_along(values: Array | Tensor, axis: int) -> list[BoxStatistics]:
    """Box statistics of each index of one axis: ``axis=1`` gives the channels of ``[b, ch, h, w]``."""
    moved = values.movedim(axis, 0) if isinstance(values, Tensor) else np.moveaxis(values, axis, 0)
    return [_part(part) for part in moved]


def box_statistics_by(values: Array | Tensor, group: Array | Tensor) -> dict[int, BoxStatistics]:
    """Box statistics of each group; copies one group at a time.

    Args:
        values: ``[n, ...]``
        group: ``[n]`` integers, for example the index of the noise level of each sample.
    """
    if tuple(group.shape) != tuple(values.shape[: group.ndim]) or group.ndim == 0:
        raise ValueError(
            f"group must have the leading shape of values, got {tuple(group.shape)} for {tuple(values.shape)}"
        )
    labels = np.unique(group.cpu().numpy() if isinstance(group, Tensor) else group)
    return {int(label): _part(values[group == int(label)]) for label in labels}
