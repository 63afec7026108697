"""Samples given the moments of the data: the moments are right, the move is the least one, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ot.gaussian import bures_wasserstein_mapping
from scipy.linalg import sqrtm
from torch import Tensor

from robustcm.moments import MomentMap, match_moments


def drawn(n: int, d: int, seed: int) -> Tensor:
    """``[n, d]`` float64 of random moments, condition 100; no more Gaussian than a cube of normals is."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=torch.float64)).Q
    mix = turns[0] * torch.logspace(-0.5, 0.5, d, dtype=torch.float64) @ turns[1]
    shift = torch.randn(d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) ** 3 @ mix + shift


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().flatten(1)
    return flat.mean(0), torch.cov(flat.T).reshape(flat.shape[1], -1)


@given(d=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_what_it_was_measured_on_gets_mean_and_covariance_of_the_data(d, seed):
    x, data = drawn(40 + d, d, seed), drawn(50 + d, d, seed + 1)
    mean, covariance = moments(data)
    there_mean, there = moments(match_moments(x, mean, covariance)(x))
    scale = float(covariance.diagonal().max())
    assert torch.allclose(there_mean, mean, atol=1e-4 * math.sqrt(scale))
    assert torch.allclose(there, covariance, atol=1e-4 * scale)


@given(d=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_it_is_the_optimal_transport_between_gaussians(d, seed):
    """POT's, which takes the matrix roots as they stand in the formula."""
    x, data = drawn(60, d, seed), drawn(60, d, seed + 1)
    (centre, own), (mean, covariance) = moments(x), moments(data)
    theirs = bures_wasserstein_mapping(*(of.numpy() for of in (centre, mean, own, covariance)))[0]
    ours = match_moments(x, mean, covariance)
    assert torch.allclose(ours.matrix.double(), torch.from_numpy(theirs), atol=1e-5 * float(ours.matrix.abs().max()))
    assert torch.allclose(ours.centre.double(), centre, atol=1e-5 * float(centre.abs().max()))


@given(seed=st.integers(0, 10**6))
def test_no_other_map_to_these_moments_moves_the_samples_less(seed):
    """A times any rotation in the data's own metric gives the same covariance, and moves further."""
    x, data = drawn(60, 4, seed), drawn(60, 4, seed + 1)
    (_, own), (mean, covariance) = moments(x), moments(data)
    moved = match_moments(x, mean, covariance)
    root = torch.from_numpy(sqrtm(covariance.numpy()).real)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    other = root @ turn @ torch.linalg.inv(root) @ moved.matrix.double()
    assert torch.allclose(other @ own @ other.T, covariance, atol=1e-3 * float(covariance.abs().max()))

    def far(matrix: Tensor) -> float:
        step = matrix - torch.eye(4, dtype=torch.float64)
        return float((step @ own @ step.T).trace())

    assert far(moved.matrix.double()) <= far(other) * (1 + 1e-5)


def test_samples_that_have_the_moments_stay_where_they_are():
    x = drawn(200, 5, 0)
    assert torch.allclose(match_moments(x, *moments(x))(x), x, atol=1e-4)


def test_there_and_back_is_where_it_began():
    x, data = drawn(200, 5, 0), drawn(200, 5, 1)
    there = match_moments(x, *moments(data))(x)
    back = match_moments(there, *moments(x))(there)
    assert torch.allclose(back, x, atol=1e-3 * float(x.abs().max()))


def test_further_samples_of_the_same_source_come_near_the_moments():
    data = drawn(20_000, 6, 1)
    mean, covariance = moments(data)
    source = drawn(40_000, 6, 0)
    _, there = moments(match_moments(source[:20_000], mean, covariance)(source[20_000:]))
    assert torch.linalg.matrix_norm(there - covariance) < 0.15 * torch.linalg.matrix_norm(covariance)


@pytest.mark.parametrize(("an_element", "over"), [(4, 1.166), (20, 1.029)])
def test_measured_on_few_samples_further_ones_are_spread_too_far(an_element: int, over: float):
    """Total variance of further samples over the data's: why the trainer takes 20 samples an element."""
    generator, variances = torch.Generator().manual_seed(0), torch.logspace(0, -2, 128, dtype=torch.float64)
    measured, further = (
        torch.randn(n, 128, generator=generator, dtype=torch.float64) * variances.sqrt()
        for n in (an_element * 128, 20_000)
    )
    moved = match_moments(measured, torch.zeros(128, dtype=torch.float64), torch.diag(variances))(further)
    assert float(moved.double().var(0).sum() / variances.sum()) == pytest.approx(over, abs=0.005)


def test_directions_without_variance_stay_as_they_are():
    x, data = drawn(50, 4, 0), drawn(50, 4, 1)
    x[:, 2] = 7.0
    moved = match_moments(x, *moments(data))
    assert torch.allclose(moved.matrix[2], torch.eye(4)[2], atol=1e-6)
    assert moved(x).isfinite().all()


def test_of_another_shape_and_dtype():
    x = drawn(100, 12, 0).float().reshape(100, 3, 2, 2)
    moved = match_moments(x, *moments(drawn(100, 12, 1)))
    assert moved(x[:7].bfloat16()).dtype == torch.bfloat16
    assert moved(x[:7]).shape == (7, 3, 2, 2)
    assert moved(x[:0]).shape == (0, 3, 2, 2)
    assert torch.equal(moved.to("cpu")(x), moved(x))


def test_one_map_of_one_batch_or_of_parts():
    x = drawn(64, 12, 0).float()
    moved = match_moments(x, *moments(drawn(100, 12, 1)))
    assert torch.allclose(moved(x), torch.cat([moved(part) for part in x.split(5)]), atol=1e-4)


GOOD = (drawn(50, 3, 0), torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((GOOD[0][:3], *GOOD[1:]), "3 samples are too few for the covariance of 3 numbers"),
        ((GOOD[0], torch.zeros(2), GOOD[2]), r"need a mean \[3\] and a covariance \[3, 3\]"),
        ((GOOD[0], GOOD[1], torch.eye(2)), r"got \[3\] and \[2, 2\]"),
        ((GOOD[0].where(GOOD[0] != GOOD[0][4, 1], math.nan), *GOOD[1:]), "samples has numbers that are NaN"),
        ((GOOD[0], GOOD[1] + math.inf, GOOD[2]), "mean has numbers"),
        ((GOOD[0], GOOD[1], GOOD[2] * math.nan), "covariance has numbers"),
        ((torch.ones(9, 3), *GOOD[1:]), "all 9 samples are the same"),
        ((torch.full((7, 3), 0.1, dtype=torch.float64), *GOOD[1:]), "all 7 samples are the same"),
        ((1e-200 * drawn(7, 3, 0).double(), *GOOD[1:]), "all 7 samples are the same"),  # as far as float64 knows
    ],
)
def test_what_cannot_be_had_is_said(given, says):
    with pytest.raises(ValueError, match=says):
        match_moments(*given)


def test_samples_of_another_size_are_refused():
    with pytest.raises(ValueError, match="samples of 4 numbers, and the map was measured on 3"):
        MomentMap(torch.zeros(3), torch.zeros(3), torch.eye(3))(torch.zeros(2, 4))


def test_the_map_is_no_less_precise_in_autocast():
    found, x = match_moments(drawn(200, 6, 0), *moments(drawn(200, 6, 1))), 10 * drawn(20, 6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = found(x)
    assert torch.equal(inside, found(x))
