"""What the teacher is shown keeps the variance of Gaussian data, whatever the levels, the coupling and the gate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustcm.consistency import add_noise, temporal_difference
from robustcm.couplers import exact, independent
from robustcm.gates import Above, ShareAbove, everywhere
from robustcm.noise import NoiseRange
from robustcm.objective import Objective, draw
from robustcm.schedules import DenoiseFirst, FixedCurriculum, LevelGrid, LevelPairs, RatioLevels
from robustcm.teacher_input import CovarianceKept, KeepCovariance

levels = st.floats(0.002, 80)
shares = st.floats(0, 1)
variance = st.floats(1e-6, 1e2)
correlation = st.floats(0, 1)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kept(v: Tensor, r: Tensor) -> CovarianceKept:
    d = len(v)
    return CovarianceKept(torch.zeros(d), torch.eye(d), v, r)


def gaussian(n: int, d: int = 3, seed: int = 0) -> Tensor:
    """Correlated, with a mean, of variances between 0.02 and 1."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return torch.randn(n, d, generator=generator) * torch.logspace(0, -0.85, d) @ turn + 0.3


def pairs_of(t_hi: Tensor, t_lo: Tensor) -> LevelPairs:
    return LevelPairs(t_hi, t_lo, torch.zeros_like(t_hi), 41)


@given(levels, levels, shares, shares, variance, correlation)
def test_the_scaled_regression_is_the_probability_flow(a: float, b: float, p: float, q: float, v: float, rho: float):
    lo, hi = sorted((a, b))
    r = rho * math.sqrt(v)
    factor = float(kept(column(v), column(r)).factor(column(hi), column(lo), column(p), column(q)))
    above, below = v + hi**2 + 2 * hi * p * r, v + lo**2 + 2 * lo * q * r
    learned = factor * (v + hi * lo + p * r * (hi + lo)) / above  # E[factor x_lo | x_hi] over x_hi
    assert learned == pytest.approx(math.sqrt(below / above), rel=1e-9)


@given(levels, levels, shares, variance, correlation)
def test_within_one_coupling_a_step_loses_variance_and_an_empty_step_none(
    a: float, b: float, p: float, v: float, rho: float
):
    lo, hi = sorted((a, b))
    teacher = kept(column(v), column(rho * math.sqrt(v)))
    assert float(teacher.factor(column(hi), column(lo), column(p), column(p))) >= 1 - 1e-12
    assert float(teacher.factor(column(hi), column(hi), column(p), column(p))) == pytest.approx(1, rel=1e-12)


@given(levels, levels, variance)
def test_without_a_coupling_the_factor_is_bounded_by_the_ratio_of_the_levels(a: float, b: float, v: float):
    lo, hi = sorted((a, b))
    bound = (hi + lo) / (2 * math.sqrt(hi * lo))
    found = [
        float(kept(column(of), column(0)).factor(column(hi), column(lo), column(0), column(0))) for of in (v, hi * lo)
    ]
    assert found[0] <= bound * (1 + 1e-9)
    assert found[1] == pytest.approx(bound)


def test_of_gaussian_data_the_flow_is_what_the_first_and_widest_pairs_of_ratio_levels_teach():
    """Its squared error has no gradient at the flow, whichever levels are looked at; with x_lo as it is, it has."""
    n, v = 200_000, torch.tensor([0.25, 0.003])
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 2, generator=generator) for _ in range(2))
    x = x * v.sqrt()
    pairs = RatioLevels()(0, 8, torch.rand(n, generator=generator))
    assert float((pairs.t_hi / pairs.t_lo).max()) > 100

    def away(shown: Tensor) -> Tensor:
        """By level, how many standard errors the regression of what is taught lies from the flow: ``[2, levels]``."""
        flow_lo, flow_hi = (((v + 0.002**2) / (v + t[:, None] ** 2)).sqrt() for t in (pairs.t_lo, pairs.t_hi))
        x_hi = add_noise(x, z, pairs.t_hi)
        gradient = (flow_lo * shown - flow_hi * x_hi) * x_hi / (v + pairs.t_hi[:, None] ** 2)
        parts = gradient[pairs.t_hi.argsort()].split(n // 8)
        return torch.stack([part.mean(0) / (part.std(0) / math.sqrt(len(part))) for part in parts], 1)

    none = torch.zeros(n)
    assert away(kept(v.double(), 0 * v.double())(x, z, pairs, none, none)).abs().max() < 4
    assert (away(add_noise(x, z, pairs.t_lo))[0, 3:] < -5).all()


@given(levels, variance, st.floats(0.01, 1))
def test_where_the_coupling_ends_the_input_shrinks(gate: float, v: float, rho: float):
    r = rho * math.sqrt(v)
    factor = float(kept(column(v), column(r)).factor(column(gate), column(gate), column(1), column(0)))
    assert factor == pytest.approx(math.sqrt((v + gate**2) / (v + gate**2 + 2 * gate * r)))
    assert factor < 1


@pytest.mark.parametrize("gate", [None, everywhere, Above(1.3), ShareAbove(0.5, 0.4)])
@pytest.mark.parametrize("num_levels", [4, 12])
def test_a_chain_of_regressions_ends_with_the_variance_of_the_data(gate: object, num_levels: int):
    """Fitted by least squares on samples, level by level, as consistency training fits them; nothing assumed."""
    v, r = column(1.0, 0.1), column(0.4, 0.1)
    teacher = kept(v, r if gate else torch.zeros(2))
    share = gate or (lambda t, progress: torch.zeros_like(t))
    grid = NoiseRange().levels(num_levels)
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64) * v.sqrt()
    own = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    coupled = (r / v) * x + (1 - r.square() / v).sqrt() * own  # standard, with E[x z] = r
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    plain, slope = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for t_lo, t_hi in zip(grid.flip(0)[:-1], grid.flip(0)[1:], strict=True):
        hi, lo = t_hi.expand(n), t_lo.expand(n)
        p_hi, p_lo = share(hi, 0.0).double(), share(lo, 0.0).double()
        z = torch.where((uniform < p_hi)[:, None], coupled, own)
        x_hi = x + t_hi * z
        shown = teacher(x, z, pairs_of(hi, lo), p_hi, p_lo)
        slope = slope * (shown * x_hi).mean(0) / x_hi.square().mean(0)
        plain = plain * ((x + t_lo * z) * x_hi).mean(0) / x_hi.square().mean(0)
    at_start = 1 + (v + 2 * 80 * (teacher.along if gate else 0)) / 80**2  # x + 80 z, of which the sampler shows 80 z
    torch.testing.assert_close((80 * slope).square() / v * at_start, torch.ones_like(v), rtol=0.05, atol=0)
    p_of_grid = share(grid, 0.0).double()
    foretold = teacher.spread_of_samples(grid, p_of_grid)
    torch.testing.assert_close((80 * plain).square() / v, foretold, rtol=0.05, atol=0)
    assert float((foretold - 1).abs().max()) > 0.05  # so that there was something to mend


def test_what_is_measured_is_the_covariance_of_the_data_and_of_its_noise():
    x = gaussian(4000)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 3, generator=generator)
    z = torch.cat([block[exact(part, block)] for part, block in zip(x.split(200), z.split(200), strict=True)])
    found = KeepCovariance().on(x, (x, z))
    centred = (x - x.mean(0)).double()
    covariance = centred.T @ centred / len(x)
    turned = found.axes.double()
    torch.testing.assert_close(turned @ torch.diag(found.variances) @ turned.T, covariance, atol=1e-6, rtol=1e-5)
    along = torch.diagonal(turned.T @ (centred.T @ z.double() / len(x)) @ turned)
    torch.testing.assert_close(found.along, along, atol=1e-5, rtol=1e-4)
    assert (found.along > 0.05).all()
    assert torch.equal(KeepCovariance().on(x).along, torch.zeros(3, dtype=torch.float64))


def test_few_components_and_a_rest_are_all_of_them_where_the_rest_is_isotropic():
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    white = torch.linalg.qr(torch.randn(400, 9, generator=generator) - 0.1).Q  # 8 of them uncorrelated once centred
    white = torch.linalg.qr(white - white.mean(0)).Q[:, :8] * 20
    x = white * column(3, 2, *[0.5] * 6).float().sqrt() @ turn.T
    noise = 0.7 * x + torch.randn(400, 8, generator=generator)
    noise = noise - noise.mean(0)
    whole = KeepCovariance(components=8).on(x, (x, x))
    part = KeepCovariance(components=2).on(x, (x, x))
    assert part.axes.shape == (8, 2)
    assert len(part.variances) == 3
    pairs = pairs_of(torch.full((400,), 2.0), torch.full((400,), 0.7))
    ones = torch.ones(400)
    torch.testing.assert_close(part(x, noise, pairs, ones, 0 * ones), whole(x, noise, pairs, ones, 0 * ones))


def test_more_elements_than_samples():
    x = gaussian(20, d=60)
    found = KeepCovariance().on(x)
    assert found.axes.shape[1] <= 19
    torch.testing.assert_close(found.axes.T @ found.axes, torch.eye(found.axes.shape[1]), atol=1e-5, rtol=0)
    pairs = pairs_of(torch.full((20,), 2.0), torch.full((20,), 0.7))
    shown = found(x, torch.ones_like(x), pairs, torch.zeros(20), torch.zeros(20))
    assert shown.isfinite().all()


def test_small_noise_is_shown_as_it_is():
    x, z = gaussian(50), torch.randn(50, 3, generator=torch.Generator().manual_seed(3))
    pairs = pairs_of(torch.full((50,), 0.004), torch.full((50,), 0.002))
    shown = KeepCovariance().on(gaussian(500))(x, z, pairs, torch.zeros(50), torch.zeros(50))
    torch.testing.assert_close(shown, add_noise(x, z, pairs.t_lo), atol=1e-3, rtol=0)


def test_a_teacher_that_is_the_data_is_shown_as_it_is():
    x, z = gaussian(50), torch.randn(50, 3, generator=torch.Generator().manual_seed(3))
    pairs = DenoiseFirst()(0, 100, torch.rand(50, generator=torch.Generator().manual_seed(4)))
    shown = KeepCovariance().on(gaussian(500))(x, z, pairs, torch.zeros(50), torch.zeros(50))
    assert torch.equal(shown, add_noise(x, z, pairs.t_lo))


def test_turned_data_give_the_same_turned():
    x, z = gaussian(300), torch.randn(300, 3, generator=torch.Generator().manual_seed(4))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5))).Q
    pairs = pairs_of(torch.full((300,), 1.5), torch.full((300,), 0.5))
    p = torch.zeros(300)
    one = KeepCovariance().on(x)(x, z, pairs, p, p) @ turn
    other = KeepCovariance().on(x @ turn)(x @ turn, z @ turn, pairs, p, p)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_objective_shows_its_teacher_what_it_says():
    x = gaussian(64)
    teacher = KeepCovariance().on(gaussian(500))
    grid = LevelGrid(curriculum=FixedCurriculum(num_levels=11))
    objective = Objective(levels=grid, coupler=exact, gate=Above(1.0), teacher_input=teacher)
    batch = objective.prepare(x, draw(0, 0, x.shape), 0, 10)
    p_hi, p_lo = ((t > 1.0).float() for t in (batch.pairs.t_hi, batch.pairs.t_lo))
    expected = teacher(x, batch.z, batch.pairs, p_hi, p_lo)
    assert batch.x_lo is not None
    assert torch.equal(batch.x_lo, expected)
    seen: list[Tensor] = []

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return x_t

    objective(f, batch.to("cpu"), objective.init())
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], add_noise(x, batch.z, batch.pairs.t_hi))
    assert Objective(levels=grid, coupler=independent).prepare(x, draw(0, 0, x.shape), 0, 10).x_lo is None
    student, target = temporal_difference(f, x, batch.z, batch.pairs.t_hi, batch.pairs.t_lo, x_lo=expected)
    assert torch.equal(target, expected)
    assert not torch.equal(student, target)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(1, 3), "two samples"),
        (torch.ones(5, 3), "the same"),
        (torch.full((5, 3), math.nan), "NaN or infinite"),
    ],
)
def test_data_without_a_covariance_are_refused(x: Tensor, says: str):
    with pytest.raises(ValueError, match=says):
        KeepCovariance().on(x)


def test_noise_that_points_away_from_its_data_counts_as_chance():
    x = gaussian(40)
    assert torch.equal(KeepCovariance(components=2).on(x, (x, -x)).along, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("which", [0, 1])
def test_pairs_that_are_not_finite_are_refused(which: int):
    x = gaussian(40)
    pair = [x, x.clone()]
    pair[which] = torch.full_like(x, math.inf)
    with pytest.raises(ValueError, match="paired has values that are NaN or infinite"):
        KeepCovariance().on(x, (pair[0], pair[1]))


def test_before_it_has_seen_data_it_is_no_teacher_input():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="has seen no data"):
        KeepCovariance()(x, x, pairs_of(torch.ones(2), torch.ones(2)), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="components"):
        KeepCovariance(components=0)


def test_equal_data_are_refused_though_their_mean_is_rounded():
    with pytest.raises(ValueError, match="all 3 samples are the same"):
        KeepCovariance().on(torch.full((3, 4), 0.1, dtype=torch.float64))
