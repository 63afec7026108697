"""Exact quartiles, moments and far values of an array too large to copy: two passes of numpy over small pieces.

The first pass counts around a guess of each quartile, taken from a sample, and keeps the few values inside the
bracket; a guess that failed, or a tie so heavy that its bracket is full, is settled by bisection over the floats
themselves. So the sample decides the time and never the result. Beyond the input: about 40 MB at 1e8 values.
numpy releases the interpreter's lock, so pieces are shared by as many threads as torch uses; sums are added in the
order of the pieces, whoever computed them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

CHUNK = 2**17
SAMPLE = 2**14, 2**18  # values, at least and at most
ROW = 2**12
QUARTILES = 0.25, 0.5, 0.75
BRACKET = 4.5  # half width of a bracket in standard deviations of the rank in the sample
KEPT = 2**20  # candidates a thread keeps for one quartile, or 1/64 of all values if that is more


LARGEST = {t: float(np.finfo(t).max) for t in (np.float32, np.float64)}


class Chunks:
    """The values as flat float32 or float64 numpy pieces, copied one piece at a time and only where that is needed."""

    def __init__(self, values: Array | Tensor) -> None:
        if not isinstance(values, Tensor):
            self.values: Any = np.asarray(values)
        elif values.device.type == "cpu" and values.dtype != torch.bfloat16:
            self.values = values.detach().numpy()  # a view; numpy has no bfloat16
        else:
            self.values = values.detach()
        name = str(self.values.dtype).removeprefix("torch.")
        if name.startswith("complex") or name == "object":
            raise ValueError(f"need real numbers, got dtype {name}; take real and imaginary parts apart")
        self.dtype = np.float32 if name in ("float32", "float16", "bfloat16") else np.float64
        self.size = math.prod(self.values.shape)
        if isinstance(self.values, Tensor):
            self.values = self.values.view(-1) if self.values.is_contiguous() else self.values
        elif self.values.flags.forc:
            self.values = self.values.ravel(order="K")  # the order does not matter here, a copy would
        self.step = max(1, CHUNK * len(self.values) // self.size) if self.size else 1
        self.dirty: set[int] = set()  # pieces found to hold NaN or infinities

    def __len__(self) -> int:
        return -(-len(self.values) // self.step) if self.size else 0

    def __getitem__(self, i: int) -> Array:
        """Piece ``i``, NaN and infinities included until they were found once."""
        part = self._numpy(self.values[i * self.step : (i + 1) * self.step])
        return part[np.isfinite(part)] if i in self.dirty else part

    def sample(self) -> Array:
        """Finite values from fixed pseudo-random places: one in 64, within the limits of ``SAMPLE``; all of few."""
        size = min(max(self.size // 64, SAMPLE[0]), SAMPLE[1])
        if self.size <= size:
            values = np.concatenate([np.empty(0, self.dtype), *map(self.__getitem__, range(len(self)))])
        else:
            flat = np.random.default_rng(0).integers(self.size, size=size)
            places = (flat,) if len(self.values.shape) == 1 else np.unravel_index(flat, self.values.shape)
            if isinstance(self.values, Tensor):
                places = tuple(torch.from_numpy(p).to(self.values.device) for p in places)
            values = self._numpy(self.values[places])
        values = values[np.isfinite(values)]
        if not values.size:  # a few may hide where the sample did not look
            pieces = (piece[np.isfinite(piece)] for piece in map(self.__getitem__, range(len(self))))
            values = next((piece for piece in pieces if piece.size), values)
        return values

    def _numpy(self, part: Any) -> Array:
        if isinstance(part, Tensor):
            part = part.to(torch.float32 if self.dtype is np.float32 else torch.float64).cpu().numpy()
        flat: Array = part.reshape(-1).astype(self.dtype, copy=False)
        return flat


def over_pieces(chunks: Chunks, work: Callable[[range], T]) -> list[T]:
    """``work`` on as many runs of neighbouring pieces as torch has threads."""
    workers = min(torch.get_num_threads(), len(chunks))
    if workers < 2:
        return [work(range(len(chunks)))]
    cuts = [len(chunks) * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, (range(a, b) for a, b in itertools.pairwise(cuts))))


@dataclass(frozen=True)
class Body:
    """What the first pass tells: counts, quartiles and the sums of (x - shift)^p for p = 1 .. 4."""

    count: int
    not_finite: int
    shift: float
    power_sums: tuple[float, float, float, float]
    quartiles: tuple[float, float, float]


class _Look:
    """What one thread gathers in the first pass over its pieces."""

    def __init__(self, brackets: Sequence[tuple[Any, Any]], shift: float, kept: int) -> None:
        self.brackets, self.shift, self.kept = brackets, shift, kept
        self.not_finite = 0
        self.sums: list[tuple[float, ...]] = []  # of each piece: count, four power sums
        self.up_to = [[0, 0] for _ in brackets]  # how many values are <= either end
        self.inside: list[Array] = []  # the values within any bracket that is not full
        self.full = [False] * len(brackets)  # too many within to keep them
        self._scratch = np.empty(0), np.empty(0)

    def over(self, chunks: Chunks, pieces: range) -> _Look:
        for i in pieces:
            piece = chunks[i]
            moments = self._power_sums(piece)
            if not math.isfinite(moments[0]):  # NaN, infinity or overflow: cheaper than asking every value
                chunks.dirty.add(i)
                size, piece = piece.size, chunks[i]
                self.not_finite += size - piece.size
                moments = self._power_sums(piece)
            if piece.size:
                self.sums.append((piece.size, *moments))
                self._count(piece)
        return self

    def _count(self, piece: Array) -> None:
        inside = None
        for j, (low, high) in enumerate(self.brackets):
            to_low, to_high = piece <= low, piece <= high
            self.up_to[j][0] += int(np.count_nonzero(to_low))
            self.up_to[j][1] += int(np.count_nonzero(to_high))
            if self.up_to[j][1] - self.up_to[j][0] > self.kept:
                self.full[j] = True
            else:
                within = np.not_equal(to_low, to_high, out=to_low)
                inside = within if inside is None else np.logical_or(inside, within, out=inside)
        if inside is not None:
            self.inside.append(piece[np.flatnonzero(inside)])  # twice as fast as the mask itself where few are set

    def _power_sums(self, piece: Array) -> tuple[float, float, float, float]:
        if self._scratch[0].size < piece.size:
            self._scratch = np.empty(piece.size), np.empty(piece.size)
        d, e = (x[: piece.size] for x in self._scratch)
        with np.errstate(all="ignore"):
            np.copyto(d, piece)  # and then in place: half the time of a subtraction that converts
            if self.shift:
                d -= self.shift
            np.multiply(d, d, out=e)
            return float(d.sum()), float(e.sum()), _dot(d, e), _dot(e, e)


def body(chunks: Chunks, sample: Array) -> Body:
    """Counts, moments, extremes and exact quartiles; ``sample`` is ``chunks.sample()``, not empty."""
    brackets = [_bracket(sample, q) for q in QUARTILES]
    (low, _), (_, median), (_, high) = brackets
    shift = float(median) if abs(median) > high - low else 0.0  # where cancellation threatens
    kept = max(KEPT, chunks.size // 64)
    looks = over_pieces(chunks, lambda pieces: _Look(brackets, shift, kept).over(chunks, pieces))

    table = np.array([row for look in looks for row in look.sums])
    count = int(table[:, 0].sum())
    inside = np.concatenate([x for look in looks for x in look.inside] or [sample[:0]])
    value: dict[int, float] = {}  # by rank
    interval: dict[int, tuple[float, float]] = {}
    for j, q in enumerate(QUARTILES):
        below, up_to = (sum(look.up_to[j][end] for look in looks) for end in (0, 1))
        low, high = brackets[j]
        ranks = sorted(set(_neighbours(count, q)))
        if not below <= ranks[0] <= ranks[-1] < up_to:  # the sample was unlucky
            interval |= dict.fromkeys(ranks, (-LARGEST[chunks.dtype], LARGEST[chunks.dtype]))
        elif any(look.full[j] for look in looks):
            interval |= dict.fromkeys(ranks, (float(low), float(high)))
        else:
            candidates = np.partition(inside[(inside > low) & (inside <= high)], [rank - below for rank in ranks])
            value |= {rank: float(candidates[rank - below]) for rank in ranks}
    value |= _bisect(chunks, interval)
    ends = [[value[rank] for rank in _neighbours(count, q)] for q in QUARTILES]
    q1, median, q3 = (_between(a, b, (count - 1) * q % 1) for (a, b), q in zip(ends, QUARTILES, strict=True))
    with np.errstate(all="ignore"):
        s1, s2, s3, s4 = table[:, 1:].sum(0).tolist()
    not_finite = sum(look.not_finite for look in looks)
    return Body(count, not_finite, shift, (s1, s2, s3, s4), (q1, median, q3))


@dataclass(frozen=True)
class Far:
    """What the second pass tells: the values near and beyond the fences."""

    extremes: tuple[float, float]
    beyond_inner: int
    beyond_outer: int
    whiskers: tuple[float, float]
    distances: Array  # the ``top`` largest |x - median|, descending


def far(chunks: Chunks, sample: Array, b: Body, inner: Sequence[float], outer: Sequence[float], top: int) -> Far:
    """Counts beyond the fences, the data values at the ends of the whiskers, the largest distances from the median.

    Whiskers as matplotlib draws them: the most extreme values within the inner fences, never inside the box.
    """
    q1, median, q3 = b.quartiles
    within = sample[(sample >= inner[0]) & (sample <= inner[1])]
    start = (min(float(within.min()), q1), max(float(within.max()), q3)) if within.size else (q1, q3)
    expected = top * len(sample) / b.count
    place = len(sample) - math.ceil(expected + 5 * math.sqrt(expected) + 5)  # low enough to hold ``top`` almost surely
    least = float(np.partition(np.abs(sample.astype(np.float64) - median), place)[place]) if place > 0 else 0.0

    def work(pieces: range) -> tuple[Array, list[Array]]:
        low, high = max(median - least, start[0]), min(median + least, start[1])
        ends = np.array([*start, *start])  # minimum, maximum, whiskers
        counts = np.zeros(2)
        largest: list[Array] = []
        waiting: list[Array] = []
        for i in pieces:
            piece = chunks[i]
            waiting.append(piece[np.flatnonzero((piece <= low) | (piece >= high))])
            if sum(map(len, waiting)) < CHUNK // 2 and i != pieces[-1]:
                continue
            x = np.concatenate(waiting).astype(np.float64)
            waiting = []
            left, right = x < inner[0], x > inner[1]
            counts += np.count_nonzero(left | right), np.count_nonzero((x < outer[0]) | (x > outer[1]))
            for j, y in ((0, x), (2, x[~left & ~right])):
                ends[j] = min(ends[j], y.min(initial=math.inf))
                ends[j + 1] = max(ends[j + 1], y.max(initial=-math.inf))
            d = np.abs(x - median)
            largest.append(_largest(d[d >= least], top))
            if sum(map(len, largest)) > 4 * top:
                largest = [_largest(np.concatenate(largest), top)]
        return np.concatenate([counts, ends]), largest

    while True:
        parts = over_pieces(chunks, work)
        top_distances = _largest(np.concatenate([x for part in parts for x in part[1]]), top)
        if len(top_distances) >= min(top, b.count) or least == 0:
            break
        least = 0.0
    table = np.array([part[0] for part in parts])
    inner_count, outer_count = table[:, :2].sum(0)
    extremes, whiskers = ((float(table[:, j].min()), float(table[:, j + 1].max())) for j in (2, 4))
    return Far(extremes, int(inner_count), int(outer_count), whiskers, np.sort(top_distances)[::-1])


def _bracket(sample: Array, q: float) -> tuple[Any, Any]:
    """An interval (low, high] of the values' own type that holds the quantile unless the sample is unlucky."""
    centre, spread = q * (len(sample) - 1), BRACKET * math.sqrt(q * (1 - q) * len(sample)) + 1
    places = max(0, math.floor(centre - spread)), min(len(sample) - 1, math.ceil(centre + spread))
    low, high = np.partition(sample, places)[list(places)]
    return np.nextafter(low, low.dtype.type(-np.inf)), high


def _neighbours(count: int, q: float) -> tuple[int, int]:
    """The ranks between which the linear q quantile of ``count`` values lies."""
    return math.floor((count - 1) * q), math.ceil((count - 1) * q)


def _dot(a: Array, b: Array) -> float:
    # In rows too short for BLAS to start threads of its own under each of ours; its sum would depend on their number.
    whole = len(a) // ROW * ROW
    rows, columns = a[:whole].reshape(-1, 1, ROW), b[:whole].reshape(-1, ROW, 1)
    return float((rows @ columns).sum() + np.einsum("i,i->", a[whole:], b[whole:]))


def _largest(values: Array, top: int) -> Array:
    return values if len(values) <= top else np.partition(values, len(values) - top)[len(values) - top :]


def _between(a: float, b: float, t: float) -> float:
    # The two forms numpy.quantile uses, so that results agree to the last bit.
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t


def _bisect(chunks: Chunks, intervals: dict[int, tuple[float, float]]) -> dict[int, float]:
    """The values of the given ranks, each known to lie in its closed interval, by counting: at most 64 passes."""
    signed = np.int32 if chunks.dtype is np.float32 else np.int64
    magnitude = np.iinfo(signed).max

    def key(value: float) -> int:  # neighbouring floats have neighbouring keys
        bits = int(chunks.dtype(value).view(signed))
        return bits if bits >= 0 else -(bits & magnitude)

    def value_of(k: int) -> Any:
        return np.copysign(signed(abs(k)).view(chunks.dtype), chunks.dtype(k))

    low = {rank: key(a) for rank, (a, _) in intervals.items()}
    high = {rank: key(b) for rank, (_, b) in intervals.items()}
    while open_ranks := [rank for rank in low if low[rank] < high[rank]]:
        middle = {rank: (low[rank] + high[rank]) // 2 for rank in open_ranks}
        limits = [value_of(k) for k in middle.values()]

        def work(pieces: range, limits: list[Any] = limits) -> list[list[int]]:
            return [[int(np.count_nonzero(piece <= v)) for v in limits] for piece in map(chunks.__getitem__, pieces)]

        counts = np.sum([row for part in over_pieces(chunks, work) for row in part], axis=0)
        for rank, n in zip(open_ranks, counts, strict=True):
            if n > rank:
                high[rank] = middle[rank]
            else:
                low[rank] = middle[rank] + 1
    return {rank: float(value_of(k)) for rank, k in low.items()}
