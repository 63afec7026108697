"""Where a sample says that the values lie which decide box statistics; what it says costs time if wrong, no digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustcm.tails.boxes import Array

QUARTILES = 0.25, 0.5, 0.75
BRACKET = 4.5  # half width of a bracket in standard deviations of the rank in the sample

Interval = tuple[Any, Any]
"""(low, high]."""


@dataclass(frozen=True)
class Guess:
    """Intervals (low, high] of the values' own type."""

    brackets: tuple[Interval, ...]
    """One around each quartile."""
    reach: Interval
    """Outside lie the ends of the whiskers, all beyond the inner fences and the largest distances from the median."""

    @staticmethod
    def of(sample: Array, count: int, top: int) -> Guess:
        """From the sorted ``sample`` of ``count`` values, ``top`` of whose distances are wanted."""
        brackets = tuple(_bracket(sample, q) for q in QUARTILES)
        (_, q1), (low, high), (q3, _) = ((float(a), float(b)) for a, b in brackets)
        kind = sample.dtype.type
        with np.errstate(all="ignore"):
            middle, slack = low / 2 + high / 2, high - low
            least = least_distance(sample, middle, count, top)
            # The innermost the inner fences can be, and the whiskers of the sample there.
            first = int(np.searchsorted(sample, q1 - 1.5 * (q3 - q1)))
            last = int(np.searchsorted(sample, q3 + 1.5 * (q3 - q1), side="right")) - 1
            left = max(float(sample[min(first, len(sample) - 1)]), middle + slack - least)
            right = min(float(sample[max(last, 0)]), middle - slack + least)
            reach = np.nextafter(kind(left), kind(np.inf)), np.nextafter(kind(right), kind(-np.inf))
        return Guess(brackets, reach)


def least_distance(sample: Array, median: float, count: int, top: int) -> float:
    """A distance from the median low enough that ``top`` of ``count`` values lie beyond it almost surely."""
    expected = top * len(sample) / count
    place = len(sample) - math.ceil(expected + 5 * math.sqrt(expected) + 5)
    return float(np.partition(np.abs(sample.astype(np.float64) - median), place)[place]) if place > 0 else 0.0


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Disjoint intervals, rising, none touching another, that hold the same values."""
    out: list[Interval] = []
    for low, high in sorted(intervals):
        if out and low <= out[-1][1]:
            out[-1] = out[-1][0], max(high, out[-1][1])
        else:
            out.append((low, high))
    return out


def _bracket(sample: Array, q: float) -> Interval:
    """Holds the quantile unless the sorted sample is unlucky."""
    centre, spread = q * (len(sample) - 1), BRACKET * math.sqrt(q * (1 - q) * len(sample)) + 1
    low, high = sample[max(0, math.floor(centre - spread))], sample[min(len(sample) - 1, math.ceil(centre + spread))]
    return np.nextafter(low, low.dtype.type(-np.inf)), high
