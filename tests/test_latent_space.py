"""Distances in the latent space: closed forms of Gaussians, what changes nothing, and what is said of few samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation import latent_space
from reference_trainer.evaluation.latent_space import (
    Components,
    compare_latents,
    few_latents,
    variance_ratios,
    whitened_frechet,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(n: int, mean: Tensor, root: Tensor, seed: int = 0) -> Tensor:
    """``[n, d]`` whose own mean is ``mean [d]``, whose own covariance is ``root root^T``: no sampling error."""
    x = gaussian(n, len(mean), seed=seed)
    x -= x.mean(0)
    white = torch.linalg.qr(x).Q * math.sqrt(n - 1)
    return mean + white @ root.T


def invertible(d: int, seed: int) -> Tensor:
    """A map whose singular values lie in 0.5 .. 2: none of the components falls under the floor."""
    u, v = (torch.linalg.qr(gaussian(d, d, seed=seed + i)).Q for i in (1, 2))
    return u * torch.linspace(0.5, 2, d, dtype=torch.float64) @ v


@given(n=st.integers(2, 30), d=st.integers(1, 30), seed=st.integers(0, 1000))
def test_a_set_is_at_no_distance_from_itself_and_has_its_own_variance(n: int, d: int, seed: int):
    x = gaussian(n, d, seed=seed)
    data = Components.of(x)
    assert len(data.variances) <= min(n - 1, d)
    assert whitened_frechet(data, x) == pytest.approx(max(0, len(data.variances) - (n - 1)), abs=1e-6)
    assert list(variance_ratios(data, x).values()) == pytest.approx([1.0] * len(variance_ratios(data, x)))


@given(seed=st.integers(0, 1000), d=st.integers(1, 8))
def test_the_distance_is_that_of_gaussians_whitened_by_the_first(seed: int, d: int):
    """``|A^-1/2 (m - mu)|^2 + tr(1 + S - 2 S^1/2)`` with ``S = A^-1/2 B A^-1/2``."""
    root, spread = invertible(d, seed), torch.linspace(0.1, 3, d, dtype=torch.float64)
    shift = gaussian(d, seed=seed)
    data = exactly(40, gaussian(d, seed=seed + 9), root, seed)
    samples = exactly(30, gaussian(d, seed=seed + 9) + root @ shift, root * spread, seed + 1)
    expected = float(shift.square().sum() + (spread - 1).square().sum())
    assert whitened_frechet(Components.of(data), samples) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(10, 60))
def test_no_invertible_linear_map_of_both_sets_changes_the_distance(seed: int, n: int):
    d = 6
    data, samples = gaussian(n, d, seed=seed), 0.7 * gaussian(n + 5, d, seed=seed + 1) + 0.3
    change, shift = invertible(d, seed), gaussian(d, seed=seed + 5)
    before = whitened_frechet(Components.of(data), samples)
    after = whitened_frechet(Components.of(data @ change.T + shift), samples @ change.T + shift)
    assert after == pytest.approx(before, rel=1e-6)


def test_more_dimensions_than_samples_give_what_the_dimensions_they_vary_in_give():
    """The products of either side have one spectrum: [n, n] here, [d, d] in the space the data live in."""
    inside, samples = gaussian(20, 5), 1.5 * gaussian(30, 5, seed=1)
    embedding = torch.linalg.qr(gaussian(50, 5, seed=2)).Q.T  # isometric
    low, high = Components.of(inside), Components.of(inside @ embedding)
    assert (high.dimensions, len(high.variances)) == (50, 5)
    torch.testing.assert_close(high.variances, low.variances)
    torch.testing.assert_close(high.axes.T @ high.axes, torch.eye(5, dtype=torch.float64))
    expected = whitened_frechet(low, samples)
    assert whitened_frechet(high, samples @ embedding) == pytest.approx(expected, rel=1e-6)
    outside = samples @ embedding + 10 * (gaussian(50) - gaussian(50) @ embedding.T @ embedding)
    assert whitened_frechet(high, outside) == pytest.approx(expected, rel=1e-6)  # what lies outside is dropped


@pytest.mark.parametrize(("relative", "kept"), [(1e-5, 3), (2e-6, 3), (1e-7, 2), (0.0, 2)])
def test_components_under_the_floor_are_left_out_and_counted(relative: float, kept: int):
    std = torch.tensor([2.0, 1.0, 2.0 * math.sqrt(relative)], dtype=torch.float64)
    data = Components.of(exactly(50, torch.zeros(3, dtype=torch.float64), std.diag()))
    assert (data.dimensions, len(data.variances)) == (3, kept)
    far_in_the_last = exactly(50, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), std.diag())
    assert (whitened_frechet(data, far_in_the_last) > 1e4) == (kept == 3)


@pytest.mark.parametrize("d", [3, 4, 5, 16, 17, 20])
def test_variance_ratios_are_those_of_groups_of_components(d: int):
    """Scaled along the axes of the data by one factor a group."""
    std = torch.linspace(3, 1, d, dtype=torch.float64)
    factors = torch.tensor([2.0] * 4 + [0.5] * 12 + [1.5] * 4)[:d]
    data = exactly(60, torch.zeros(d, dtype=torch.float64), std.diag())
    samples = exactly(40, torch.ones(d, dtype=torch.float64), (std * factors).diag(), seed=1)
    expected = {"variance_first_4": 4.0}
    expected |= {"variance_next_12": 0.25} if d > 4 else {}
    expected |= {"variance_rest": 2.25} if d > 16 else {}
    assert variance_ratios(Components.of(data), samples) == pytest.approx(expected)


def test_a_ratio_is_the_sum_over_the_sum_of_a_group():
    """Where the factors within a group differ: (9 * 4 + 1 * 0) / (9 + 1)."""
    data = exactly(60, torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 1.0]).double().diag())
    samples = exactly(60, torch.zeros(2, dtype=torch.float64), torch.tensor([6.0, 0.0]).double().diag())
    assert variance_ratios(Components.of(data), samples) == pytest.approx({"variance_first_4": 3.6})


@pytest.mark.parametrize("m", [2, 3, 6])
def test_each_direction_that_few_samples_cannot_vary_in_adds_one(m: int):
    data = Components.of(exactly(50, torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)))
    few = torch.zeros(m, 6, dtype=torch.float64)
    few[:, 0] = math.sqrt(m - 1) * torch.nn.functional.normalize(gaussian(m) - gaussian(m).mean(), dim=0)
    assert whitened_frechet(data, few) == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize(("n", "said"), [(5, True), (6, True), (7, False)])
def test_no_more_latents_than_dimensions_is_said(n: int, said: bool):
    notes = few_latents(Components.of(gaussian(n, 1, 2, 3)))
    assert ["their 6 dimensions" in note for note in notes] == [True] * said


def test_draws_have_the_mean_and_the_covariance_and_are_the_generators():
    data = exactly(50, torch.tensor([1.0, -2.0, 0.5]).double(), invertible(3, 0)).reshape(50, 1, 1, 3)
    fitted = Components.of(data)
    drawn = fitted.draw((40_000, 1, 1, 3), torch.Generator().manual_seed(1))
    assert (drawn.shape, drawn.dtype) == ((40_000, 1, 1, 3), torch.float32)
    torch.testing.assert_close(drawn.mean(0).double(), data.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.flatten(1).T.cov().double(), data.flatten(1).T.cov(), atol=0.1, rtol=0)
    assert whitened_frechet(fitted, drawn) < 1e-3
    assert torch.equal(drawn, fitted.draw((40_000, 1, 1, 3), torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, fitted.draw((40_000, 1, 1, 3), torch.Generator().manual_seed(2)))


def test_all_figures_of_latents_are_those_of_the_flattened_ones():
    data, samples = gaussian(30, 2, 2, 2).float(), gaussian(25, 2, 2, 2, seed=1).float()
    fitted = Components.of(data)
    row = compare_latents(data, fitted, samples)
    assert row == compare_latents(data.flatten(1), Components.of(data.flatten(1)), samples.flatten(1))
    assert row["n"] == 25
    assert row["whitened_frechet"] == whitened_frechet(fitted, samples)
    collapsed = compare_latents(data, fitted, 1e-3 * samples)
    assert collapsed["recall"] < row["recall"]
    assert collapsed["kernel_x1000"] > row["kernel_x1000"]


def test_only_the_first_of_large_sets_count_and_the_row_says_how_many(monkeypatch: pytest.MonkeyPatch):
    data, samples = gaussian(40, 4), gaussian(40, 4, seed=1)
    whole = compare_latents(data[:10], Components.of(data[:10]), samples[:10])
    monkeypatch.setattr(latent_space, "MOST_ELEMENTS", 40)
    assert compare_latents(data, Components.of(data), samples) == whole
    assert (whole["n"], Components.of(data).count) == (10, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: Components.of(x[:1]), "1 latent: a covariance needs 2"),
        (lambda x: Components.of(x[:0]), "0 latent"),
        (lambda x: Components.of(torch.ones_like(x)), "all 20 latents are the same"),
        (lambda x: Components.of(x / torch.zeros(3)), "20 of 20 latents of the data are NaN or infinite"),
        (lambda x: compare_latents(x, Components.of(x), x[:1]), "1 latent: a distance between sets needs 2"),
        (lambda x: compare_latents(x, Components.of(x), x * torch.tensor([1, 1, torch.inf])), "has diverged"),
        (lambda x: compare_latents(x, Components.of(x), 1e60 * x), "not finite: the latents go up to"),
    ],
)
def test_what_cannot_be_measured_says_why(make, message: str):
    with pytest.raises(UserError, match=message):
        make(gaussian(20, 3))


def test_the_groups_leave_no_component_out_and_none_twice():
    assert [k for group in latent_space.GROUPS.values() for k in range(20)[group]] == list(range(20))


def test_latents_are_normalised_and_back(rng: torch.Generator):
    raw = 3 + 2 * torch.randn(50, 2, 4, 4, generator=rng) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1)
    space = LatentSpace.of(PixelSpace().build(2, {}), raw)
    latents = space.normalise(raw)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.full((2,), 0.5))
    torch.testing.assert_close(space.undo(latents), raw, atol=1e-5, rtol=1e-5)
