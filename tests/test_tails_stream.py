"""The streaming box statistics: their error bound, merging, groups, and that no update waits for the device."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ddsketch import LogCollapsingLowestDenseDDSketch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tails import NUMBERS, agrees, by_hand, draw

from robustcm.sketch import LogHistogram
from robustcm.tails import (
    BoxStatistics,
    TailStream,
    box_statistics,
)


def streamed(stream: TailStream, x: np.ndarray) -> BoxStatistics:
    return stream.statistics(stream.update(stream.empty(), torch.from_numpy(x)))[0]


def shares_bracket(x: np.ndarray, fences: tuple[float, float], share: float, move: Callable[[float], float]) -> None:
    """The share lies between the true shares for fences moved out and in."""
    (low, high), (dl, dh) = fences, map(move, fences)
    assert np.mean((x < low - dl) | (x > high + dh)) - 1e-12 <= share
    assert share <= np.mean((x < low + dl) | (x > high - dh)) + 1e-12


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100),
    st.sampled_from([0.1, 0.01, 0.003]),
    st.sampled_from([0.0, 0.7, -100.0]),
)
def test_stream_keeps_its_error_bound(values: list[float], error: float, centre: float) -> None:
    x = np.array(values)
    stream = TailStream(relative_error=error, centre=centre, smallest=1e-6)
    b, exact = streamed(stream, x), by_hand(x)

    def bound(*around: float) -> float:
        return error * max(abs(v - centre) for v in around) + 1e-6 + 1e-9

    assert b.min == pytest.approx(x.min(), abs=bound(x.min()))
    assert b.max == pytest.approx(x.max(), abs=bound(x.max()))
    for q, value in ((0.25, b.q1), (0.5, b.median), (0.75, b.q3)):
        ends = np.quantile(x, q, method="lower"), np.quantile(x, q, method="higher")
        assert value == pytest.approx(np.quantile(x, q), abs=bound(*ends))
    assert b.count == exact["count"]
    shares_bracket(x, b.inner_fences, b.beyond_inner, bound)
    shares_bracket(x, b.outer_fences, b.beyond_outer, bound)
    assert b.mean == pytest.approx(x.mean(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("law", ["gaussian", "t2", "t3", "t5", "contaminated 0.01"])
def test_stream_is_close_to_exact_on_real_sizes(law: str) -> None:
    x = draw(law, 200_000)
    a, b = box_statistics(x), streamed(TailStream(), x)
    for name in ("mean", "std", "kurtosis"):
        assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-9, abs=1e-12)
    for name in ("min", "q1", "q3", "max", "iqr", "max_z", "whiskers", "inner_fences", "outer_fences"):
        assert getattr(b, name) == pytest.approx(getattr(a, name), rel=0.01)
    assert b.beyond_inner == pytest.approx(a.beyond_inner, rel=0.05)
    assert b.beyond_outer == pytest.approx(a.beyond_outer, rel=0.1, abs=1e-5)
    assert b.tail_index == pytest.approx(a.tail_index, rel=2 * 0.005 * max(1, a.tail_index / 2))
    assert b.xi == pytest.approx(a.xi, abs=0.015)
    assert b.power_law == a.power_law


def test_stream_agrees_with_ddsketch() -> None:
    x = np.abs(draw("t2", 20_000)) + 1e-3
    error = 0.01
    other = LogCollapsingLowestDenseDDSketch(relative_accuracy=error, bin_limit=4096)
    for value in x:
        other.add(float(value))
    b = streamed(TailStream(relative_error=error), x)
    for q, value in ((0, b.min), (0.25, b.q1), (0.5, b.median), (0.75, b.q3), (1, b.max)):
        assert value == pytest.approx(other.get_quantile_value(q), rel=2 * error + 1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(math.nan), max_size=50), st.integers(0, 50))
def test_merging_is_concatenating(values: list[float], cut: int) -> None:
    stream = TailStream(groups=3, centre=0.25)
    x, group = torch.tensor(values, dtype=torch.float32), torch.arange(len(values)) % 3
    parts = [stream.update(stream.empty(), x[s], group[s]) for s in (slice(cut), slice(cut, None))]
    merged, whole = parts[0] + parts[1], stream.update(stream.empty(), x, group)
    assert torch.equal(merged[:, :-4], whole[:, :-4])  # counts: exactly
    torch.testing.assert_close(merged[:, -4:], whole[:, -4:], rtol=1e-12, atol=1e-12)
    followed = stream.update(parts[0], x[cut:], group[cut:])
    assert torch.equal(followed[:, :-4], whole[:, :-4])


def test_stream_groups_rows_elements_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(draw("t3", 12 * 100)).view(12, 4, 25)
    level = torch.tensor([0, 3, 3, 0, 1, 1, 1, 0, 3, 3, 0, 1])
    stream = TailStream(groups=5)
    state = stream.update(stream.empty(), x, level)
    alone = [streamed(stream, x[level == g].numpy()) for g in (0, 1, 3)]
    found = stream.statistics(state)
    for a, b in zip(alone, (found[0], found[1], found[3]), strict=True):
        assert b.mean == pytest.approx(a.mean)
        assert {n: getattr(a, n) for n in NUMBERS} == {n: getattr(b, n) for n in NUMBERS}
    assert (found[2].count, found[4].count) == (0, 0)
    assert "no finite values" in found[2].notes[0]
    for block, labels in itertools.product((7, 150, 1_000_000), (level, level[:, None, None].expand(x.shape))):
        monkeypatch.setattr("robustcm.tails.stream.BLOCK_CPU", block)
        torch.testing.assert_close(stream.update(stream.empty(), x, labels), state, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="leading shape"):
        stream.update(stream.empty(), x, level[:3])


def test_update_leaves_its_arguments_alone_and_repeats_bit_for_bit() -> None:
    stream, x = TailStream(), torch.from_numpy(draw("t3", 100_000)).requires_grad_()
    empty = stream.empty()
    state = stream.update(empty, x)
    assert not empty.any()
    assert not state.requires_grad
    assert torch.equal(state, stream.update(empty, x))
    assert state.numel() == stream.empty().numel()


def test_update_never_asks_the_device() -> None:
    # On the meta device there is no data: .item(), .cpu(), nonzero and boolean masks raise.
    stream = TailStream(groups=4)
    x, level = (
        torch.empty(8, 2, 5, device="meta", dtype=torch.bfloat16),
        torch.empty(8, device="meta", dtype=torch.int64),
    )
    state = stream.update(stream.empty("meta"), x, level)
    assert state.shape == stream.empty().shape


def test_stream_sets_aside_what_is_not_finite_and_announces_its_range() -> None:
    stream = TailStream(largest=100.0, smallest=1e-3)
    x = np.r_[np.linspace(-1, 1, 101), np.nan, np.inf, -np.inf, 1e5, -1e30]
    b = streamed(stream, x)
    assert (b.count, b.nan_count) == (103, 3)
    assert any("2 values at the end" in note for note in b.notes)
    assert any("3 of 106 values are NaN or infinite" in note for note in b.notes)
    assert b.max == pytest.approx(100, rel=0.02)
    for value, n in itertools.product((0.1, 0.3, 0.7, 1e5 / 3), (100, 1000, 777)):
        constant = streamed(TailStream(), np.full(n, value))
        assert (constant.std, constant.iqr) == (0, 0)
        assert any("constant" in note for note in constant.notes)
    assert streamed(TailStream(), np.zeros(30)).max == 0


@pytest.mark.parametrize("bad", [{"groups": 0}, {"smallest": 0.0}, {"relative_error": 1.0}, {"centre": math.nan}])
def test_bad_streams_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TailStream(**bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stream_on_the_gpu_equals_the_cpu_without_synchronising() -> None:
    stream = TailStream(groups=3)
    x, level = torch.from_numpy(draw("t3", 3 * 10**5)).view(300, 1000), torch.arange(300) % 3
    gpu, gpu_level, state = x.cuda(), level.cuda(), stream.empty("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = stream.update(state, gpu, gpu_level), stream.update(state, gpu, gpu_level)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    expected = stream.update(stream.empty(), x, level)
    assert torch.equal(first[:, :-4].cpu(), expected[:, :-4])
    torch.testing.assert_close(first.cpu(), expected, rtol=1e-10, atol=1e-10)
    agrees(box_statistics(gpu), by_hand(x.numpy()))


def test_histogram_puts_what_has_no_logarithm_into_its_end_bins() -> None:
    histogram = LogHistogram()
    found = histogram.bins(torch.tensor([0.0, -1.0, math.nan, -math.inf, math.inf, 1e30]))
    assert found.tolist() == [0, 0, 0, 0, histogram.num_bins - 1, histogram.num_bins - 1]
