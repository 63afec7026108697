"""The advice finds the tails that were put in, and says so only then."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from synthetic_tails import synthetic

from robustcm.losses import cauchy, cauchy_of_r2, pseudo_huber, squared_l2_of_r2
from robustcm.scales import MeasuredC
from robustcm.schedules import FixedCurriculum, LevelGrid
from robustcm.tails.advice import CANDIDATES, advise, gaussian_beyond, quadratic_share, relative_efficiency

D = 64


def advice_on(law, where="whole", n=2000, d=D, seed=0, with_td=False):
    td, level = synthetic(law, where, n, d, np.random.default_rng(seed))
    return advise(np.linalg.norm(td, axis=1), level, 21, d, td if with_td else None)


def test_gaussian_residuals_expect_no_gain_and_get_the_mildest_distance():
    a = advice_on("Gaussian", with_td=True)
    assert a.verdict == "none"
    assert not a.matters
    assert a.distance is pseudo_huber
    assert "no heavier than Gaussian" in a.in_words()[1]
    assert not any("single elements" in said for said in a.in_words())


@pytest.mark.parametrize("law", ["Student t 2", "Student t 3", "Student t 5", "1 % x10", "5 % x10"])
@pytest.mark.parametrize("d", [64, 1024])
def test_heavy_samples_are_called_outliers(law, d):
    a = advice_on(law, d=d)
    assert a.verdict == "outliers"
    assert a.gain > 1.1


def test_a_robust_distance_gains_more_the_heavier_the_tail():
    gains = [advice_on(f"Student t {df}").gain for df in (5, 3, 2)]
    assert gains == sorted(gains)
    gains = [advice_on(f"{share} % x10").gain for share in (0.1, 1, 5)]
    assert gains == sorted(gains)


def test_student_t_asks_for_cauchy_whose_influence_falls():
    assert advice_on("Student t 2").distance is cauchy  # its likelihood, up to c


@pytest.mark.parametrize("df", [2, 3])
def test_xi_of_the_normalised_residuals_is_that_of_the_law(df):
    a = advice_on(f"Student t {df}", n=20000)
    assert a.xi == pytest.approx(1 / df, abs=max(0.1, 3 * a.xi_error))


@pytest.mark.parametrize("law", ["1 % x10", "5 % x10", "Student t 5"])
def test_outliers_in_single_elements_are_seen_where_the_norm_averages_them_away(law):
    a = advice_on(law, "elements", d=1024, with_td=True)
    assert a.verdict == "none"
    assert a.element_gain > 1.2
    assert any("PerElement" in said for said in a.in_words())


@pytest.mark.parametrize(("share", "gain"), [(0.01, 1.99), (0.05, 5.95)])
def test_the_gain_of_contamination_is_that_of_theory(share, gain):
    """Rejecting a share e of samples 10 times wider leaves variance 1 / (1 - e) of 1 + 99 e."""
    a = advice_on(f"{100 * share:g} % x10", n=40000)
    assert (1 + 99 * share) * (1 - share) == pytest.approx(gain, rel=0.06)
    assert max(a.gains.values()) == pytest.approx((1 + 99 * share) * (1 - share), rel=0.06)


def test_levels_of_different_size_are_no_tail():
    td, level = synthetic("Gaussian", "whole", 2000, D, np.random.default_rng(0))
    r = np.linalg.norm(td, axis=1)
    assert advise(r, level, 21, D).verdict == "none"
    assert advise(r, np.zeros_like(level), 21, D).matters  # the same pooled: a mixture
    assert advise(r, level, 21, D).level_spread == pytest.approx(100, rel=0.1)


def test_the_advice_scales_with_the_residuals():
    td, level = synthetic("Student t 3", "whole", 2000, D, np.random.default_rng(0))
    r = np.linalg.norm(td, axis=1)
    a, b = advise(r, level, 21, D), advise(8 * r, level, 21, D)
    assert b.c == pytest.approx(8 * a.c, rel=1e-12)
    assert (b.multiple, b.verdict, b.distance) == (pytest.approx(a.multiple, rel=1e-12), a.verdict, a.distance)


def test_tensors_and_arrays_give_the_same():
    td, level = synthetic("Student t 3", "whole", 500, D, np.random.default_rng(0))
    r = np.linalg.norm(td, axis=1)
    tensors = advise(torch.from_numpy(r), torch.from_numpy(level), 21, D, torch.from_numpy(td))
    assert tensors == advise(r, level, 21, D, td)


def test_the_multiple_gives_the_advised_c_when_measured_in_training():
    a = advice_on("Student t 3", n=4000)
    td, _ = synthetic("Student t 3", "whole", 4000, D, np.random.default_rng(0))
    r = torch.from_numpy(np.linalg.norm(td, axis=1))
    pairs = LevelGrid(curriculum=FixedCurriculum(num_levels=21))(0, 1, torch.rand(4000))
    scale = MeasuredC(multiple=a.multiple)
    c = scale(scale.init(), scale.count(r, pairs.depth, pairs.num_levels), pairs.depth, pairs.num_levels, D)
    assert float(c[0]) == pytest.approx(a.c, rel=scale.histogram.relative_error + 0.01)


def test_the_quadratic_zones_end_where_the_influence_bends():
    """Beyond Pseudo-Huber's c its influence is within 30 % of its limit; the others peak at their bend."""
    for candidate in CANDIDATES[1:]:
        r = torch.linspace(0.1, 5, 4901, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(candidate.rho(r * r, 1.0).sum(), r)
        assert float(r.detach()[slope.argmax()]) == pytest.approx(candidate.bend, abs=2e-3)
    share = quadratic_share(np.array([0.5, 1.1, 1.3, 2.0]), 1.0)
    assert share == {"pseudo_huber": 0.25, "geman_mcclure": 0.5, "cauchy": 0.75}


def test_the_advised_c_puts_the_clean_bound_at_the_bend():
    a = advice_on("5 % x10")
    bend = next(x.bend for x in CANDIDATES if x.distance is a.distance)
    assert a.multiple * bend == pytest.approx(a.clean_bound)
    assert a.c == pytest.approx(a.multiple * a.median)
    assert a.quadratic_share_by_level[a.distance.__name__] == pytest.approx(1 - a.beyond)
    assert 0.93 < 1 - a.beyond < 0.96


def test_squared_l2_and_any_distance_with_a_huge_scale_are_as_efficient_as_squared_l2():
    r = np.random.default_rng(0).standard_cauchy(1000)
    assert relative_efficiency(squared_l2_of_r2, np.abs(r), 1.0, 1) == pytest.approx(1)
    assert relative_efficiency(cauchy_of_r2, np.abs(r), 1e9, 3) == pytest.approx(1)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda x: x.distance.__name__)
def test_the_efficiency_is_that_of_the_estimator_it_predicts(candidate):
    """Simulated: the variance of the location that minimises the mean distance, over many samples, d = 2."""
    rng, c = np.random.default_rng(0), 1.5
    x = rng.standard_normal((4000, 200, 2)) / np.sqrt(rng.chisquare(3, (4000, 200, 1)) / 3)
    centre = x.mean(1)
    for _ in range(30):  # reweighted means
        r2 = torch.from_numpy(((x - centre[:, None]) ** 2).sum(-1)).requires_grad_()
        (w,) = torch.autograd.grad(candidate.rho(r2, c).sum(), r2)
        weights = w.numpy()[..., None]
        centre = (weights * x).sum(1) / weights.sum(1)
    simulated = x.mean(1).var() / centre.var()
    r = np.linalg.norm(x, axis=-1).ravel()
    assert relative_efficiency(candidate.rho, r, c, 2) == pytest.approx(simulated, rel=0.05)


def test_the_efficiency_against_a_gaussian_never_exceeds_one():
    r = np.linalg.norm(np.random.default_rng(0).standard_normal((20000, 3)), axis=1)
    for candidate in CANDIDATES:
        for c in (0.3, 1, 3):
            assert relative_efficiency(candidate.rho, r, c, 3) < 1.01


@pytest.mark.parametrize("d", [1, 16, 4096])
def test_the_gaussian_share_is_that_of_gaussians(d):
    rng = np.random.default_rng(0)
    r = np.sqrt(rng.chisquare(d, 400_000))
    median = np.median(r)
    share = (r > median + 3 * 1.4826 * np.median(np.abs(r - median))).mean()
    assert gaussian_beyond(d) == pytest.approx(share, abs=3e-4)


def test_not_finite_residuals_and_small_levels_are_counted_and_left_out():
    td, level = synthetic("Gaussian", "whole", 2000, D, np.random.default_rng(0))
    r = np.linalg.norm(td, axis=1)
    clean = advise(r, level, 21, D)
    spoilt = np.concatenate([r, [math.nan, math.inf, 0.0], np.full(19, 1e6)])
    a = advise(spoilt, np.concatenate([level, [0, 1, 2], np.full(19, 99)]), 21, D)
    assert a.left_out == 22
    assert "22 residuals left out" in a.notes[-1]
    assert (a.c, a.gains) == (clean.c, clean.gains)


@pytest.mark.parametrize(
    ("r", "level", "message"),
    [
        (np.ones(19), np.zeros(19, int), "at least 20"),
        (np.ones(100), np.arange(100), "at least 20"),
        (np.full(100, np.nan), np.zeros(100, int), "at least 20"),
        (np.ones(100), np.zeros(100, int), "do not vary"),
        (np.ones(100), np.zeros(99, int), "one level"),
    ],
)
def test_bad_input_is_refused_with_a_reason(r, level, message):
    with pytest.raises(ValueError, match=message):
        advise(r, level, 21, D)


def test_the_record_is_json():
    text = json.dumps(advice_on("Student t 2").as_dict(), allow_nan=False)
    data = json.loads(text)
    assert data["distance"] == "cauchy"
    assert data["element_gain"] is None
    assert data["matters"] is True
