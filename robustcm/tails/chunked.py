"""Exact quartiles, moments and far values of an array too large to copy: numpy over small pieces, mostly in one pass.

The first pass sums powers, counts around a guess of each quartile, taken from a sample, and keeps the few values
inside these brackets and those near and beyond the fences, which then tell the rest. A guess that failed, or a tie so
heavy that its bracket is full, is settled by bisection over the floats themselves, too many far values by a second
pass. So the sample decides the time and never the result. Beyond the input: about 50 MB at 1e8 values.
numpy releases the interpreter's lock, so pieces are shared by as many threads as torch uses; sums are added in the
order of the pieces, whoever computed them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from robustcm.tails.boxes import Array
from robustcm.tails.guess import QUARTILES, Guess, least_distance, union

T = TypeVar("T")

CHUNK = 2**17
SAMPLE = 2**14, 2**18  # values, at least and at most
ROW = 2**12
ONES = torch.ones(ROW, 1, dtype=torch.float64).numpy()  # see ``_reserve``
MOST_CUTS = 2 * len(QUARTILES) + 2  # the ends of the brackets and of the reach
KEPT = 2**20  # values a thread keeps of each bracket and of the far ones, or 1/64 of all values if that is more
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
        """Finite values, sorted, from pseudo-random places: one in 64, within the limits of ``SAMPLE``; all of few."""
        size = min(max(self.size // 64, SAMPLE[0]), SAMPLE[1])
        if self.size <= size:
            values = np.concatenate([np.empty(0, self.dtype), *map(self.__getitem__, range(len(self)))])
        else:
            flat = np.random.default_rng(0).integers(self.size, size=size)
            places = (flat,) if len(self.values.shape) == 1 else np.unravel_index(flat, self.values.shape)
            if isinstance(self.values, Tensor):
                places = tuple(torch.from_numpy(p).to(self.values.device) for p in places)
            values = self._numpy(self.values[places])
        values = np.sort(values[np.isfinite(values)])
        if not values.size:  # a few may hide where the sample did not look
            pieces = (piece[np.isfinite(piece)] for piece in map(self.__getitem__, range(len(self))))
            values = np.sort(next((piece for piece in pieces if piece.size), values))
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
    """What the first pass tells: counts, quartiles, the sums of (x - shift)^p for p = 1 .. 4, and perhaps the ends."""

    count: int
    not_finite: int
    shift: float
    power_sums: tuple[float, float, float, float]
    quartiles: tuple[float, float, float]
    reach: tuple[float, float]
    ends: Array | None
    """All the values <= ``reach[0]`` or > ``reach[1]``; None if they were too many to keep."""


class _Look:
    """What one thread gathers in the first pass over its pieces.

    Values within the brackets and outside the reach are kept, so that nobody has to look at the others again.
    """

    def __init__(self, guess: Guess, shift: float, kept: int) -> None:
        self.guess, self.shift, self.kept = guess, shift, kept
        self.not_finite = 0
        self.sums: list[tuple[float, ...]] = []  # of each piece: count, four power sums
        self.up_to = {low: 0 for low, _ in guess.brackets}  # how many values are <= the low end of a bracket
        self.within = [0 for _ in guess.brackets]  # and how many are in it
        self.full = [False] * (len(QUARTILES) + 1)  # too many in a bracket, or outside the reach, to keep them
        self.parts: list[list[Array]] = [[] for _ in self.full]  # the values kept of each
        self._gathered: list[Array] = []  # those not yet sorted into ``parts``
        self._waiting = 0  # how many these are
        self._nothing = np.empty(0, type(guess.reach[0]))
        self._scratch, self._masks, self._keep = np.empty((2, 0)), np.empty((0, 0), bool), np.empty(0, bool)
        self._plan()

    def over(self, chunks: Chunks, pieces: range) -> _Look:
        for i in pieces:
            piece = chunks[i]
            self._reserve(piece.size)
            moments = self._power_sums(piece)
            if not math.isfinite(moments[0]):  # NaN, infinity or overflow: cheaper than asking every value
                chunks.dirty.add(i)
                size, piece = piece.size, chunks[i]
                self.not_finite += size - piece.size
                moments = self._power_sums(piece)
            if piece.size:
                self.sums.append((piece.size, *moments))
                self._count(piece)
        self._settle()
        return self

    def _plan(self) -> None:
        """Where to compare: a value is kept if it is <= an odd number of cuts (even, if the last is open)."""
        intervals = [pair for pair, full in zip(self.guess.brackets, self.full, strict=False) if not full]
        if not self.full[-1]:
            intervals += [(-np.inf, self.guess.reach[0]), (self.guess.reach[1], np.inf)]
        ends = [end for pair in union(intervals) for end in pair]
        self._open = ends[-1:] == [np.inf]
        cuts = [end for end in ends if np.isfinite(end)]
        self._num_cuts = len(cuts)
        compared = cuts + [low for low in self.up_to if low not in cuts]
        self._compared = np.array(compared, self._nothing.dtype)[:, None]
        self._row_of = {low: compared.index(low) for low in self.up_to}

    def _count(self, piece: Array) -> None:
        # All comparisons in one call: between two calls a thread waits for the other to let go of the interpreter.
        masks, keep = self._masks[: len(self._compared), : piece.size], self._keep[: piece.size]
        np.less_equal(piece, self._compared, out=masks)
        np.bitwise_xor.reduce(masks[: self._num_cuts], axis=0, out=keep, initial=self._open)
        for low, row in self._row_of.items():
            self.up_to[low] += int(np.count_nonzero(masks[row]))
        for j, (low, high) in enumerate(self.guess.brackets):
            if self.full[j]:
                self.within[j] += int(np.count_nonzero((piece > low) & (piece <= high)))
        if self._num_cuts or self._open:
            self._gathered.append(piece[np.flatnonzero(keep)])  # twice as fast as the mask itself where few are set
            self._waiting += len(self._gathered[-1])
            if self._waiting > self.kept:
                self._settle()

    def _settle(self) -> None:
        """Sort what was gathered into the brackets and the rest; give up those that hold too many."""
        x = np.sort(np.concatenate([self._nothing, *self._gathered]))
        self._gathered, self._waiting = [], 0
        for j, interval in enumerate((*self.guess.brackets, self.guess.reach)):
            if self.full[j]:
                continue
            low, high = np.searchsorted(x, interval, side="right").tolist()
            if j < len(QUARTILES):
                self.within[j] += high - low
                self.parts[j].append(x[low:high])
            else:
                self.parts[j] += [x[:low], x[max(low, high) :]]
            if sum(map(len, self.parts[j])) > self.kept:
                self.full[j], self.parts[j] = True, []
        self._plan()

    def _reserve(self, size: int) -> None:
        """Two float64 rows and the masks; torch's memory begins at a cache line, numpy's not: 1.5 times slower."""
        if len(self._keep) < size:
            width = -(-size // 64) * 64  # so that the second row begins at one too
            self._scratch = torch.empty(2, width, dtype=torch.float64).numpy()
            self._masks = torch.empty(MOST_CUTS, width, dtype=torch.bool).numpy()
            self._keep = torch.empty(width, dtype=torch.bool).numpy()

    def _power_sums(self, piece: Array) -> tuple[float, float, float, float]:
        d, e = (x[: piece.size] for x in self._scratch)
        with np.errstate(all="ignore"):
            np.copyto(d, piece)  # and then in place: half the time of a subtraction that converts
            if self.shift:
                d -= self.shift
            np.multiply(d, d, out=e)
            return _dot(d), _dot(d, d), _dot(d, e), _dot(e, e)


def body(chunks: Chunks, sample: Array, top: int) -> Body:
    """Counts, moments, exact quartiles and what ``far`` may need for ``top`` distances.

    ``sample``: ``chunks.sample()``, sorted, not empty.
    """
    guess = Guess.of(sample, chunks.size, top)
    (low, _), (_, median), (_, high) = guess.brackets
    shift = float(median) if abs(median) > high - low else 0.0  # where cancellation threatens
    kept = max(KEPT, chunks.size // 64)
    looks = over_pieces(chunks, lambda pieces: _Look(guess, shift, kept).over(chunks, pieces))

    table = np.array([row for look in looks for row in look.sums])
    count = int(table[:, 0].sum())
    full = [any(look.full[j] for look in looks) for j in range(len(QUARTILES) + 1)]
    parts = [
        None if full[j] else np.concatenate([x for look in looks for x in look.parts[j]]) for j in range(len(full))
    ]
    value: dict[int, float] = {}  # by rank
    interval: dict[int, tuple[float, float]] = {}
    for j, q in enumerate(QUARTILES):
        low, high = guess.brackets[j]
        below, within = sum(look.up_to[low] for look in looks), sum(look.within[j] for look in looks)
        ranks = sorted(set(_neighbours(count, q)))
        if not below <= ranks[0] <= ranks[-1] < below + within:  # the sample was unlucky
            interval |= dict.fromkeys(ranks, (-LARGEST[chunks.dtype], LARGEST[chunks.dtype]))
        elif (inside := parts[j]) is None:
            interval |= dict.fromkeys(ranks, (float(low), float(high)))
        else:
            inside.partition(ranks[0] - below)  # two ranks at once take numpy ten times as long
            value |= {rank: float(inside[rank - below :].min()) for rank in ranks}
    value |= _bisect(chunks, interval)
    neighbours = [[value[rank] for rank in _neighbours(count, q)] for q in QUARTILES]
    q1, median, q3 = (_between(a, b, (count - 1) * q % 1) for (a, b), q in zip(neighbours, QUARTILES, strict=True))
    with np.errstate(all="ignore"):
        s1, s2, s3, s4 = table[:, 1:].sum(0).tolist()
    not_finite = sum(look.not_finite for look in looks)
    reach = float(guess.reach[0]), float(guess.reach[1])
    return Body(count, not_finite, shift, (s1, s2, s3, s4), (q1, median, q3), reach, parts[-1])


@dataclass(frozen=True)
class Far:
    """What the values near and beyond the fences tell."""

    extremes: tuple[float, float]
    beyond_inner: int
    beyond_outer: int
    whiskers: tuple[float, float]
    distances: Array  # the ``top`` largest |x - median|, descending


def far(chunks: Chunks, sample: Array, b: Body, inner: Sequence[float], outer: Sequence[float], top: int) -> Far:
    """Counts beyond the fences, the data values at the ends of the whiskers, the largest distances from the median.

    Whiskers as matplotlib draws them: the most extreme values within the inner fences, never inside the box.
    Reads the ends that the first pass kept, or everything once more where these do not suffice.
    """
    q1, median, q3 = b.quartiles
    within = sample[(sample >= inner[0]) & (sample <= inner[1])]
    start = (min(float(within.min()), q1), max(float(within.max()), q3)) if within.size else (q1, q3)
    least = least_distance(sample, median, b.count, top)
    sources = [chunks]
    if (
        b.ends is not None
        and b.reach[0] >= max(median - least, start[0])
        and b.reach[1] < min(median + least, start[1])
    ):
        sources.insert(0, Chunks(b.ends))

    def work(pieces: range, chunks: Chunks, least: float) -> tuple[Array, list[Array]]:
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

    for source, lowest in [(source, least) for source in sources] + [(chunks, 0.0)]:
        parts = over_pieces(source, partial(work, chunks=source, least=lowest))
        top_distances = _largest(np.concatenate([x for part in parts for x in part[1]]), top)
        if len(top_distances) >= min(top, b.count):
            break
    table = np.array([part[0] for part in parts])
    inner_count, outer_count = table[:, :2].sum(0)
    extremes, whiskers = ((float(table[:, j].min()), float(table[:, j + 1].max())) for j in (2, 4))
    return Far(extremes, int(inner_count), int(outer_count), whiskers, np.sort(top_distances)[::-1])


def _neighbours(count: int, q: float) -> tuple[int, int]:
    """The ranks between which the linear q quantile of ``count`` values lies."""
    return math.floor((count - 1) * q), math.ceil((count - 1) * q)


def _dot(a: Array, b: Array | None = None) -> float:
    """The sum of a b, or of a; a sum as a product with ones takes half the time of numpy's."""
    # In rows too short for BLAS to start threads of its own under each of ours; its sum would depend on their number.
    whole = len(a) // ROW * ROW
    rows, columns = a[:whole].reshape(-1, 1, ROW), ONES if b is None else b[:whole].reshape(-1, ROW, 1)
    rest = a[whole:].sum() if b is None else np.einsum("i,i->", a[whole:], b[whole:])
    return float((rows @ columns).sum() + rest)


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
