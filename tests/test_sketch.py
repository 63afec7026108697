"""The streaming histogram: its error bound, and that counting is a sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustcm.sketch import LogHistogram

POSITIVE = st.floats(1e-8, 1e8)
SOME = st.lists(POSITIVE, min_size=1, max_size=200)


def doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(values=SOME, q=st.floats(0, 1), error=st.sampled_from([0.001, 0.01, 0.02, 0.3]))
def test_quantile_is_within_the_relative_error_of_a_value_of_that_rank(values, q, error):
    histogram = LogHistogram(relative_error=error)
    measured = histogram.quantile(histogram.count(doubles(values)), q).item()
    below = np.quantile(values, q, method="inverted_cdf")
    above = sorted(values)[min(math.floor(q * len(values)), len(values) - 1)]  # differs where q n is whole
    slack = 1e-9  # of the arithmetic
    assert min(below, above) * (1 - error - slack) <= measured <= max(below, above) * (1 + error + slack)


@given(value=POSITIVE, error=st.sampled_from([0.001, 0.01, 0.3]))
def test_a_single_value_is_all_its_quantiles(value, error):
    histogram = LogHistogram(relative_error=error)
    measured = [histogram.quantile(histogram.count(doubles([value])), q).item() for q in (0.0, 0.5, 1.0)]
    assert measured == [pytest.approx(value, rel=error + 1e-9)] * 3


@pytest.mark.parametrize("error", [0.001, 0.01, 0.3])
def test_bound_is_kept_with_at_most_three_times_the_bins_of_a_logarithmic_grid(error):
    fewest = math.log(1e18) / math.log((1 + error) / (1 - error))
    assert fewest <= LogHistogram(relative_error=error).num_bins <= 3 * fewest + 2


@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_quantiles_of_many_values_are_numpys(q, device, rng):
    values = torch.randn(9_999, generator=rng).mul(3).exp()
    histogram = LogHistogram()
    measured = histogram.quantile(histogram.count(values.to(device)), q).item()
    assert measured == pytest.approx(np.quantile(values.numpy(), q, method="inverted_cdf"), rel=0.01)


@given(first=SOME, second=SOME)
def test_merging_is_adding(first, second):
    histogram = LogHistogram()
    merged = histogram.count(doubles(first)) + histogram.count(doubles(second))
    assert torch.equal(merged, histogram.count(doubles(first + second)))


@given(values=SOME, seed=st.integers(0, 2**31))
def test_order_does_not_matter(values, seed):
    shuffled = np.random.default_rng(seed).permutation(values)
    histogram = LogHistogram()
    assert torch.equal(histogram.count(doubles(values)), histogram.count(torch.from_numpy(shuffled)))


def test_each_group_is_counted_by_itself(rng, device):
    values, group = torch.rand(300, generator=rng) + 0.1, torch.randint(3, (300,), generator=rng)
    histogram = LogHistogram()
    counts = histogram.count(values.to(device), group.to(device), groups=3).cpu()
    assert torch.equal(counts, torch.cat([histogram.count(values[group == g]) for g in range(3)]))


def test_an_empty_group_has_no_quantile():
    histogram = LogHistogram()
    counts = histogram.count(doubles([1.0, 2.0]), torch.tensor([0, 2]), groups=3)
    assert histogram.quantile(counts, 0.5).isnan().tolist() == [False, True, False]


def test_values_outside_the_range_count_in_the_end_bins():
    histogram = LogHistogram(smallest=1e-3, largest=1e3)
    last = histogram.num_bins - 1
    assert histogram.bins(doubles([0.0, 1e-9, 1e9, math.inf])).tolist() == [0, 0, last, last]
    assert histogram.count(doubles([0.0, 1e-9, 1e9])).sum() == 3


def test_what_is_not_finite_is_not_counted():
    histogram = LogHistogram()
    counts = histogram.count(doubles([1.0, math.nan, math.inf, 2.0]), torch.tensor([0, 1, 1, 1]), groups=2)
    assert counts.sum(1).tolist() == [1, 1]


def test_a_scaled_histogram_has_the_same_quantiles(rng):
    histogram = LogHistogram()
    counts = histogram.count(torch.rand(99, generator=rng))
    assert torch.equal(histogram.quantile(counts, 0.3), histogram.quantile(counts / 64, 0.3))


@pytest.mark.parametrize(
    "parameters", [{"smallest": 0}, {"smallest": 2, "largest": 1}, {"relative_error": 1.0}], ids=str
)
def test_parameters_that_cannot_be_are_refused(parameters):
    with pytest.raises(ValueError, match=f"{list(parameters)[-1]} must be"):
        LogHistogram(**parameters)
