"""Exact box statistics against numpy, scipy and matplotlib; the tail index on known laws."""

import itertools
import json
import math
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.cbook import boxplot_stats

from robustcm.tails import (
    BoxStatistics,
    TailStream,
    box_statistics,
    box_statistics_along,
    box_statistics_by,
    chunked,
    guess,
    tail_count,
    tail_shape,
)
from robustcm.tails.boxes import fences

NUMBERS = ("count", "min", "q1", "median", "q3", "max", "iqr", "whiskers", "beyond_inner", "beyond_outer")
floats = st.floats(-1e6, 1e6, width=32) | st.sampled_from([-1.0, 0.0, 0.5, 3.0, 1e6])  # ties on purpose


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 values, a sample of 5 and narrow brackets: many pieces, many unlucky guesses."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "SAMPLE", (5, 5))
    monkeypatch.setattr(guess, "BRACKET", 0.3)


def draw(law: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if law == "gaussian":
        return rng.standard_normal(n)
    if law.startswith("t"):
        return rng.standard_t(float(law[1:]), n)
    share = float(law.removeprefix("contaminated "))  # this share of the values is ten times wider
    return rng.standard_normal(n) * np.where(rng.random(n) < share, 10, 1)


def by_hand(x: np.ndarray) -> dict[str, object]:
    """The definitions, on a sorted float64 copy."""
    x = np.sort(x.astype(np.float64), axis=None)
    q1, median, q3 = (float(q) for q in np.quantile(x, [0.25, 0.5, 0.75]))
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    within = x[(x >= low) & (x <= high)]
    outer = (x < q1 - 3 * (q3 - q1)) | (x > q3 + 3 * (q3 - q1))
    whiskers = min(q1, *within[:1]), max(q3, *within[-1:])
    shares = 1 - len(within) / len(x), np.mean(outer)
    return dict(zip(NUMBERS, (len(x), x[0], q1, median, q3, x[-1], q3 - q1, whiskers, *shares), strict=True))


def agrees(b: BoxStatistics, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        if name.startswith("beyond"):
            assert getattr(b, name) == pytest.approx(value, abs=1e-15), name
        else:
            assert getattr(b, name) == value, name


# --- exact ---


@pytest.mark.parametrize("law", ["gaussian", "t2", "contaminated 0.01"])
@pytest.mark.parametrize("n", [20, 1001, chunked.SAMPLE[0] + 3, 600_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_numpy_scipy_and_matplotlib(law: str, n: int, dtype: type) -> None:
    x = draw(law, n).astype(dtype)
    b, wide = box_statistics(x), x.astype(np.float64)
    agrees(b, by_hand(x))
    m = boxplot_stats(wide)[0]
    assert (b.q1, b.median, b.q3, b.whiskers) == (m["q1"], m["med"], m["q3"], (m["whislo"], m["whishi"]))
    assert round(b.beyond_inner * n) == len(m["fliers"])
    assert b.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-12)
    assert b.std == pytest.approx(wide.std(), rel=1e-12)
    assert b.kurtosis == pytest.approx(scipy.stats.kurtosis(wide, fisher=False), rel=1e-10)
    assert b.max_z == pytest.approx(np.abs(scipy.stats.zscore(wide)).max(), rel=1e-10)
    q1, q3, iqr = b.q1, b.q3, b.iqr
    assert b.inner_fences == (q1 - 1.5 * iqr, q3 + 1.5 * iqr)
    assert b.outer_fences == (q1 - 3 * iqr, q3 + 3 * iqr)


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=150, deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=200),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1, 9, 30, 2**20]),
)
@example([0.0] * 50 + [1.0], np.float32, 1)
@example([-0.0, 0.0, -1.0], np.float64, 1)
def test_is_exact_however_bad_the_sample_and_heavy_the_ties(values: list[float], dtype: type, kept: int) -> None:
    x = np.array(values, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "KEPT", kept)  # 1: every bracket overflows into the bisection; 9, 30: some do
        agrees(box_statistics(x), by_hand(x))


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=50, deadline=None)
@given(st.lists(floats, min_size=1, max_size=200), st.integers(1, 30))
def test_far_finds_the_largest_distances(values: list[float], top: int) -> None:
    x = np.array(values, np.float32)
    chunks = chunked.Chunks(x)
    sample = chunks.sample()
    b = chunked.body(chunks, sample, top)
    found = chunked.far(chunks, sample, b, (-math.inf, math.inf), (-math.inf, math.inf), top).distances
    np.testing.assert_array_equal(found, np.sort(np.abs(x.astype(np.float64) - b.quartiles[1]))[::-1][:top])


@pytest.mark.parametrize("law", ["gaussian", "t3"])
def test_everything_is_read_once_where_the_sample_is_right(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, read = draw(law, 2_000_000).astype(np.float32), []
    get = chunked.Chunks.__getitem__
    monkeypatch.setattr(chunked.Chunks, "__getitem__", lambda chunks, i: read.append(chunks.size) or get(chunks, i))
    agrees(box_statistics(x), by_hand(x))
    assert read.count(x.size) == len(chunked.Chunks(x))
    assert sum(read) < 1.3 * x.size * len(chunked.Chunks(x))  # and the far values once more


@pytest.mark.parametrize("side", [0, 1])
def test_far_reads_everything_where_the_ends_kept_do_not_reach_in_far_enough(side: int) -> None:
    x = draw("gaussian", 100_000)
    chunks, sample = chunked.Chunks(x), chunked.Chunks(x).sample()
    b = chunked.body(chunks, sample, 10)
    inner, outer = fences(b.quartiles)
    expected = asdict(chunked.far(chunks, sample, replace(b, ends=None), inner, outer, 10))
    for reach in (b.reach, (-3.0, b.reach[1]) if side == 0 else (b.reach[0], 3.0)):
        short = replace(b, reach=reach, ends=x[(x <= reach[0]) | (x > reach[1])])
        found = asdict(chunked.far(chunks, sample, short, inner, outer, 10))
        np.testing.assert_array_equal(found.pop("distances"), expected["distances"])
        assert found == {name: value for name, value in expected.items() if name != "distances"}


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(sorted).map(tuple), max_size=6))
def test_a_union_of_intervals_holds_the_same_values(intervals: list[tuple[int, int]]) -> None:
    found = guess.union(intervals)
    for x in range(-10, 11):
        assert any(low < x <= high for low, high in found) == any(low < x <= high for low, high in intervals)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


def test_far_looks_again_when_the_sample_promised_too_much() -> None:
    x = np.r_[draw("gaussian", 5000), 100.0]
    chunks, inside = chunked.Chunks(x), (-math.inf, math.inf)
    b = chunked.body(chunks, np.sort(x), 10)
    found = chunked.far(chunks, np.full(5000, 99.0), b, inside, inside, 10)
    np.testing.assert_array_equal(found.distances, np.sort(np.abs(x - b.quartiles[1]))[::-1][:10])
    assert found.extremes == (x.min(), 100)


@settings(max_examples=50, deadline=None)
@given(st.lists(floats, min_size=4, max_size=60), st.integers(-8, 8), st.integers(-1000, 1000), st.booleans())
def test_follows_an_affine_map_and_ignores_the_order(values: list[float], power: int, shift: int, flip: bool) -> None:
    x = np.array(values)
    scale = 2.0**power * (-1 if flip else 1)
    a, b = box_statistics(x), box_statistics(np.random.default_rng(0).permutation(x) * scale + shift)
    sides = ("q3", "q1") if flip else ("q1", "q3")
    tolerance = 1e-9 * (np.abs(x).max() * abs(scale) + abs(shift)) + 1e-12
    for ours, theirs in [("median", "median"), ("q1", sides[0]), ("q3", sides[1]), ("mean", "mean")]:
        assert getattr(b, ours) == pytest.approx(getattr(a, theirs) * scale + shift, abs=tolerance)
    assert b.std == pytest.approx(a.std * abs(scale), abs=tolerance)
    assert b.iqr == pytest.approx(a.iqr * abs(scale), abs=2 * tolerance)


def test_result_depends_neither_on_order_of_memory_nor_on_threads() -> None:
    x = draw("t3", 500_000).reshape(50, 100, 100).astype(np.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(asdict(box_statistics(x)))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]
    for other in (x[:, ::-1], np.asfortranarray(x), torch.from_numpy(x).permute(2, 0, 1), torch.from_numpy(x).double()):
        agrees(box_statistics(other), by_hand(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
def test_takes_every_real_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) * 20 + 100).to(dtype)
    agrees(box_statistics(x), by_hand(x.double().numpy()))
    agrees(box_statistics(x[:, 2:5]), by_hand(x[:, 2:5].double().numpy()))


def test_input_is_left_alone_and_memory_stays_small() -> None:
    x = np.random.default_rng(0).standard_normal(8_000_000, dtype=np.float32)
    x[::1000] = np.nan
    before = x.copy()
    box_statistics(x)
    tracemalloc.start()
    box_statistics(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(x, before)
    assert peak < 24e6  # a float32 copy alone would be 32 MB
    tracemalloc.start()
    box_statistics(before.reshape(1000, 2, 4000)[:, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # and one of this view 16 MB


def test_mean_far_from_zero_costs_no_digits() -> None:
    x = draw("t5", 100_000)
    b = box_statistics(x + 1e6)
    assert b.std == pytest.approx((x + 1e6).std(), rel=1e-12)
    assert b.kurtosis == pytest.approx(scipy.stats.kurtosis(x + 1e6, fisher=False), rel=1e-9)


def test_along_an_axis_and_by_group_equal_the_parts() -> None:
    x = draw("gaussian", 6 * 3 * 40).reshape(6, 3, 40)
    level = np.array([4, 0, 4, 4, 0, 9])
    channels = box_statistics_along(x, 1)
    assert channels == [box_statistics(np.ascontiguousarray(x[:, c])) for c in range(3)]
    assert box_statistics_along(torch.from_numpy(x), axis=1) == channels
    groups = box_statistics_by(x, level)
    assert groups == {g: box_statistics(x[level == g]) for g in (0, 4, 9)}
    assert box_statistics_by(torch.from_numpy(x), torch.from_numpy(level)) == groups
    x[5] = np.nan
    assert (box_statistics_by(x, level)[9].count, box_statistics_by(x, level)[9].nan_count) == (0, 120)
    with pytest.raises(ValueError, match="leading shape"):
        box_statistics_by(x, level[:4])


# --- degenerate input ---


@pytest.mark.parametrize("values", [np.empty(0), torch.empty(3, 0), np.full(7, np.nan), np.array([np.inf])])
def test_nothing_finite_is_one_clear_error(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        box_statistics(values)


def test_complex_values_are_refused() -> None:
    with pytest.raises(ValueError, match="real"):
        box_statistics(np.ones(30, np.complex64))


@pytest.mark.parametrize("n", [60, 700_000])
def test_nan_and_infinities_are_counted_said_and_left_out(n: int) -> None:
    x = draw("gaussian", n).astype(np.float32)
    bad = [3, 4, n // 2, n - 1]
    clean = box_statistics(np.delete(x, bad))
    x[bad] = [np.nan, np.inf, -np.inf, np.nan]
    b = box_statistics(x)
    assert (b.count, b.nan_count) == (n - 4, 4)
    assert any(f"4 of {n} values are NaN or infinite" in note for note in b.notes)
    assert {name: getattr(b, name) for name in NUMBERS} == {name: getattr(clean, name) for name in NUMBERS}
    assert b.kurtosis == pytest.approx(clean.kurtosis, rel=1e-12)


def test_one_finite_value_among_many_nan_is_found() -> None:
    x = np.full(1_000_000, np.nan, np.float32)
    x[1000] = 5
    chunks = chunked.Chunks(x)
    assert chunks.sample().tolist() == [5]
    assert (box_statistics(x).median, box_statistics(x).nan_count) == (5, len(x) - 1)


def test_degenerate_cases_are_said_in_words() -> None:
    constant = box_statistics(np.full(100, 0.1))
    assert (constant.std, constant.min, constant.max) == (0, 0.1, 0.1)
    assert any("constant" in note for note in constant.notes)
    pixels = box_statistics(np.r_[np.zeros(800), np.linspace(0.1, 1, 200)])  # MNIST: four fifths black
    assert pixels.beyond_inner == 0.2
    assert any("IQR = 0" in note for note in pixels.notes)
    few = box_statistics(np.arange(19.0))
    assert math.isnan(few.tail_index)
    assert any("only 19 values" in note for note in few.notes)
    assert not box_statistics(np.arange(25.0) ** 2).notes
    clipped = box_statistics(np.clip(draw("gaussian", 10_000), -1, 1))
    assert math.isnan(clipped.xi)
    assert any("tied" in note for note in clipped.notes)
    huge = box_statistics(draw("gaussian", 100) * 1e200)
    assert any("fourth powers" in note for note in huge.notes)
    assert not any(b.power_law for b in (constant, few, clipped, huge))


@pytest.mark.parametrize("x", [np.full(30, 2.0), np.r_[np.nan, np.arange(5.0)], draw("t2", 1000), np.r_[-1e200, 1e200]])
def test_dictionary_is_strict_json(x: np.ndarray) -> None:
    b = box_statistics(x)
    read = json.loads(json.dumps(b.as_dict(), allow_nan=False))
    assert read["median"] == b.median
    assert read["inner_fences"] == list(b.inner_fences)
    assert (read["tail_index"] is None) == math.isnan(b.tail_index)
    json.dumps(TailStream().statistics(TailStream().empty())[0].as_dict(), allow_nan=False)


# --- the tail index ---


@pytest.mark.parametrize(
    ("law", "index", "alpha", "xi"),
    [
        # (true index), alpha and xi at n = 1e5 with the bias that tail_shape documents
        ("t2", 2, 1.97, 0.50),
        ("t3", 3, 2.91, 0.33),
        ("t5", 5, 4.25, 0.19),
        ("gaussian", math.inf, 9.0, -0.07),
    ],
)
def test_tail_index_of_known_laws(law: str, index: float, alpha: float, xi: float) -> None:
    found = [box_statistics(draw(law, 100_000, seed)) for seed in range(6)]
    assert np.mean([b.tail_index for b in found]) == pytest.approx(alpha, abs=2.5 * alpha / math.sqrt(1000 * 6))
    assert np.mean([b.xi for b in found]) == pytest.approx(xi, abs=2.5 / math.sqrt(1000 * 6))
    for b in found:
        assert b.tail_count == tail_count(100_000) == 1000
        assert abs(b.xi - 1 / index) < 3.5 * b.xi_error
        assert b.power_law == (index < math.inf)
        assert b.tail_index_error == pytest.approx(b.tail_index / math.sqrt(1000))
        assert not b.notes


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
def test_contamination_shows_beyond_the_outer_fences_whatever_the_index_says(share: float) -> None:
    b = box_statistics(draw(f"contaminated {share}", 100_000))
    expected = share * 2 * scipy.stats.norm.sf(b.outer_fences[1] / 10)
    assert b.beyond_outer == pytest.approx(expected, rel=0.25)
    assert b.beyond_outer > 100 * 2.3e-6  # of a Gaussian
    assert b.power_law == (share < 0.02)  # documented: at 5 % the top 1000 are a wide Gaussian's, without a power law


def test_mixture_is_noticed_where_the_index_moves() -> None:
    assert any("no single index" in note for note in box_statistics(draw("contaminated 0.05", 10_000)).notes)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_standard_errors_are_the_scatter(alpha: float) -> None:
    shapes = [tail_shape(np.sort(np.random.default_rng(s).pareto(alpha, 2000) + 1)[::-1]) for s in range(150)]
    assert np.std([s.alpha for s in shapes]) == pytest.approx(np.mean([s.alpha_error for s in shapes]), rel=0.2)
    assert np.std([s.xi for s in shapes]) == pytest.approx(np.mean([s.xi_error for s in shapes]), rel=0.2)
    assert np.mean([s.alpha for s in shapes]) == pytest.approx(alpha, rel=0.03)  # no bias on an exact power law


def test_bounded_tail_has_its_negative_index_and_error() -> None:
    shapes = [tail_shape(1 - np.sort(np.sqrt(np.random.default_rng(s).random(20_000)))) for s in range(100)]
    assert np.mean([s.xi for s in shapes]) == pytest.approx(-0.5, abs=0.03)
    assert np.std([s.xi for s in shapes]) == pytest.approx(np.mean([s.xi_error for s in shapes]), rel=0.25)


@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.integers(1, 4)), min_size=40, max_size=80))
@settings(max_examples=30, deadline=None)
def test_weights_are_repetitions(pairs: list[tuple[float, int]]) -> None:
    pairs.sort(reverse=True)
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    a, b = tail_shape(values, weights.astype(float)), tail_shape(np.repeat(values, weights))
    for name in ("k", "alpha", "alpha_error", "xi", "xi_error"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6, nan_ok=True)
