"""Noise levels, curricula, the law that draws a level, and weights: against diffusers, scipy and the papers' tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustcm.noise import NoiseRange
from robustcm.schedules import (
    BoundedInverseGap,
    DenoiseFirst,
    DoublingCurriculum,
    FixedCurriculum,
    LevelGrid,
    LognormalLaw,
    ProgressiveCurriculum,
    RatioLevels,
    SnrPlusWeight,
    UniformLaw,
    equal_weight,
    inverse_gap,
)

STAGES = [11, 21, 41, 81, 161, 321, 641]
JUST_BELOW_ONE = 1 - 2**-53
# The largest and smallest numbers that torch.rand can give are among them.
UNIFORM = st.one_of(st.sampled_from([0.0, JUST_BELOW_ONE]), st.floats(0, JUST_BELOW_ONE))


def uniform_numbers(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- Curricula -------------------------------------------------------------------------------------------------------


def test_icts_curriculum_has_the_published_stages_of_equal_length():
    counts = np.unique([DoublingCurriculum()(k, 7000) for k in range(7000)], return_counts=True)
    assert counts[0].tolist() == STAGES
    assert counts[1].tolist() == [1000] * 7


@given(s0=st.integers(1, 50), s1=st.integers(50, 2000), total=st.integers(1, 10**7), part=st.floats(0, 1))
def test_icts_curriculum_equals_the_formula(s0, s1, total, part):
    k = round(part * total)
    stage_steps = max(1, math.floor(total / (math.log2(s1 // s0) + 1)))
    expected = min(s0 * 2 ** min(k // stage_steps, 100), s1) + 1
    assert DoublingCurriculum(s0=s0, s1=s1)(k, total) == expected


@pytest.mark.parametrize("curriculum", [DoublingCurriculum(), ProgressiveCurriculum(), FixedCurriculum()], ids=repr)
@pytest.mark.parametrize("total", [1, 3, 100, 5000])
def test_number_of_levels_never_falls_and_has_two_at_least(curriculum, total):
    numbers = [curriculum(k, total) for k in range(total)]
    assert numbers == sorted(numbers)
    assert numbers[0] >= 2


def test_progressive_curriculum_goes_from_s0_to_s1_plus_one_as_a_square_root():
    curriculum = ProgressiveCurriculum()
    assert (curriculum(0, 1000), curriculum(1000, 1000)) == (2, 151)
    # sqrt(1/4 * (151^2 - 2^2) + 2^2) = 75.52
    assert curriculum(250, 1000) == 76


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DoublingCurriculum(s0=20, s1=10), "s1 must be at least s0, got s0 = 20 and s1 = 10"),
        (lambda: ProgressiveCurriculum(s0=1), r"s0 must be a whole number in 2 \.\. 99999, got 1"),
        (lambda: FixedCurriculum(num_levels=1), r"num_levels must be a whole number in 2 \.\. 100000, got 1"),
        (lambda: LognormalLaw(p_std=0), "p_std must be a finite number >= 0.001 and <= 1000, got 0"),
        (lambda: RatioLevels(q=1), "q must be a finite number > 1 .*, got 1"),
    ],
)
def test_parameters_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- Laws and pairs on the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", STAGES)
@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.1, 2.0), (0.4, 0.7)])
def test_lognormal_law_is_scipys_mass_between_neighbouring_levels(num_levels, p_mean, p_std):
    levels = NoiseRange().levels(num_levels)
    cdf = scipy.stats.lognorm(s=p_std, scale=math.exp(p_mean)).cdf(levels.numpy())
    expected = -np.diff(cdf) / (cdf[0] - cdf[-1])
    ours = LognormalLaw(p_mean=p_mean, p_std=p_std)(levels).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("law", [LognormalLaw(), UniformLaw()], ids=repr)
def test_sampled_levels_have_the_frequencies_of_the_law(law):
    levels = NoiseRange().levels(21)
    grid = LevelGrid(curriculum=FixedCurriculum(num_levels=21), law=law)
    pairs = grid(0, 1, uniform_numbers(100_000))
    index = torch.round(pairs.depth * 21).long()
    observed = torch.bincount(index, minlength=20)
    assert scipy.stats.chisquare(observed.numpy(), 100_000 * law(levels).numpy()).pvalue > 1e-3


@given(
    uniform=st.lists(UNIFORM, min_size=1), step=st.integers(0, 99), law=st.sampled_from([LognormalLaw(), UniformLaw()])
)
def test_pairs_are_neighbours_of_the_current_grid(uniform, step, law):
    grid = LevelGrid(law=law)
    pairs = grid(step, 100, torch.tensor(uniform, dtype=torch.float64))
    assert pairs.num_levels == DoublingCurriculum()(step, 100)
    levels = NoiseRange().levels(pairs.num_levels).float()
    index = torch.round(pairs.depth * pairs.num_levels).long()
    assert torch.equal(pairs.t_hi, levels[index])
    assert torch.equal(pairs.t_lo, levels[index + 1])
    assert (pairs.depth < 1).all()
    assert {v.dtype for v in pairs[:3]} == {torch.float32}


def test_a_pair_without_mass_is_never_drawn_whatever_the_uniform_number():
    grid = LevelGrid(
        curriculum=FixedCurriculum(num_levels=5),
        law=lambda levels: torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64),
    )
    uniform = torch.tensor([0.0, 0.5 - 2**-53, 0.5, JUST_BELOW_ONE], dtype=torch.float64)
    torch.testing.assert_close(grid(0, 1, uniform).depth * 5, torch.tensor([1.0, 1.0, 3.0, 3.0]))


def test_larger_uniform_numbers_give_smaller_noise():
    pairs = LevelGrid()(0, 1, torch.linspace(0, JUST_BELOW_ONE, 1000, dtype=torch.float64))
    assert (pairs.t_hi.diff() <= 0).all()
    assert pairs.t_hi[0] == NoiseRange().sigma_max
    assert pairs.t_lo[-1] == torch.tensor(NoiseRange().sigma_min)


# --- Ratio levels ----------------------------------------------------------------------------------------------------


@given(uniform=UNIFORM, step=st.integers(0, 799), p_mean=st.floats(-3, 1), p_std=st.floats(0.1, 3), q=st.floats(1.1, 8))
def test_ratio_levels_lie_in_the_range_with_the_teacher_below_the_student(uniform, step, p_mean, p_std, q):
    levels = RatioLevels(p_mean=p_mean, p_std=p_std, q=q)
    t_hi, t_lo, depth, num_levels = levels(step, 800, torch.tensor([uniform], dtype=torch.float64))
    assert torch.tensor(NoiseRange().sigma_min) <= t_lo < t_hi <= NoiseRange().sigma_max
    assert 0 <= depth < 1
    assert num_levels >= 2


def test_student_levels_of_ratio_levels_are_lognormal_within_the_range():
    t_hi = RatioLevels()(0, 1, uniform_numbers(20_000)).t_hi.double()
    ends = [(math.log(t) + 1.1) / 2.0 for t in (NoiseRange().sigma_min, NoiseRange().sigma_max)]
    law = scipy.stats.truncnorm(*ends, loc=-1.1, scale=2.0)
    assert scipy.stats.kstest(t_hi.log().numpy(), law.cdf).pvalue > 1e-3


def test_ratio_levels_equal_ects_formula_where_the_teacher_is_above_sigma_min():
    t_hi, t_lo, _, _ = RatioLevels()(500, 800, torch.tensor([0.9, 0.99], dtype=torch.float64))  # stage 5
    expected = [t * (1 - (1 + 8 / (1 + math.exp(t))) / 2**6) for t in t_hi.double().tolist()]
    torch.testing.assert_close(t_lo.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_ratio_of_the_levels_rises_to_one():
    many = RatioLevels(stages=20)
    ratios = torch.stack([torch.div(*reversed(many(k, 20, uniform_numbers(1000))[:2])) for k in range(20)])
    assert (ratios.diff(dim=0) >= 0).all()
    assert ratios[-1].min() > 0.999


def test_number_of_levels_of_ratio_levels_is_that_of_a_grid_as_fine_at_the_median():
    for k in range(3, 8):
        num_levels = RatioLevels()(k, 8, torch.tensor([0.5])).num_levels
        median, gap = math.exp(-1.1), (1 + 8 / (1 + math.exp(math.exp(-1.1)))) / 2 ** (k + 1)
        grid = NoiseRange().levels(num_levels)
        i = int((grid > median).sum()) - 1
        assert float(grid[i] - grid[i + 1]) == pytest.approx(median * gap, rel=0.25)


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "formula"),
    [
        (inverse_gap, lambda hi, lo: 1 / (hi - lo)),
        (equal_weight, lambda hi, lo: 1.0),
        (SnrPlusWeight(), lambda hi, lo: 1 / hi**2 + 4),
        (SnrPlusWeight(sigma_data=1.0), lambda hi, lo: 1 / hi**2 + 1),
        (BoundedInverseGap(floor=0.2), lambda hi, lo: 1 / (hi - lo + 0.2)),
    ],
)
def test_weights_equal_their_formulas(weight, formula):
    t_hi, t_lo = torch.tensor([0.5, 4.0]), torch.tensor([0.25, 1.0])
    torch.testing.assert_close(weight(t_hi, t_lo), torch.tensor([formula(0.5, 0.25), formula(4.0, 1.0)]))


def test_bounded_inverse_gap_bounds_what_inverse_gap_does_not():
    pairs = LevelGrid(curriculum=FixedCurriculum(num_levels=641))(0, 1, uniform_numbers(1000))
    assert inverse_gap(pairs.t_hi, pairs.t_lo).max() > 1e3
    assert BoundedInverseGap(floor=0.05)(pairs.t_hi, pairs.t_lo).max() <= 20


@given(sigma=st.floats(1e-3, 100), step=st.integers(0, 99))
def test_the_nearest_level_is_one_of_the_grid_and_none_is_nearer(sigma, step):
    grid = LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=40))
    levels = NoiseRange().levels(grid.curriculum(step, 100)).tolist()[:-1]  # at the last f is the identity
    found = grid.nearest(sigma, step, 100)
    assert found in levels
    assert all(abs(math.log(found / sigma)) <= abs(math.log(t / sigma)) for t in levels)


def test_continuous_levels_take_every_level_of_their_range():
    levels = RatioLevels()
    lowest = levels(0, 10, torch.zeros(1)).t_hi.item()
    assert [levels.nearest(t, 0, 10) for t in (1e-4, 0.37, 500.0)] == [pytest.approx(lowest), 0.37, 80.0]


@pytest.mark.parametrize("then", [LevelGrid(), RatioLevels()])
def test_a_run_that_only_denoises_has_the_levels_of_one_that_nearly_does(then, rng):
    uniform = torch.rand(2000, generator=rng)
    only, nearly = (DenoiseFirst(share=s, then=then)(3, 10_000, uniform) for s in (1.0, 0.99))
    torch.testing.assert_close(only.t_hi, nearly.t_hi, rtol=1e-3, atol=0)
    assert only.num_levels == 2
    assert (only.t_lo == then.noise.sigma_min).all()
    found = [DenoiseFirst(share=s, then=then).nearest(0.821, 10_000, 10_000) for s in (1.0, 0.99)]
    assert found == pytest.approx([found[0]] * 2)


@pytest.mark.parametrize(("p_mean", "nearest"), [(-100.0, -1), (100.0, 0), (0.1, None)])
def test_a_law_whose_bell_misses_every_pair_draws_the_one_nearest_to_it(p_mean: float, nearest: int | None):
    levels = NoiseRange().levels(11)
    probabilities = LognormalLaw(p_mean=p_mean, p_std=1e-3)(levels)
    if nearest is None:
        nearest = int((levels.log() > p_mean).sum()) - 1
    assert probabilities[nearest] == probabilities.sum() == 1


def test_the_teacher_stays_below_the_student_where_their_gap_would_round_away():
    t_hi, t_lo, _, num_levels = RatioLevels(q=1e6, stages=9)(8, 9, uniform_numbers(1000))
    assert (t_lo < t_hi).all()
    assert num_levels > 1e6


@pytest.mark.parametrize("p_mean", [-100.0, math.log(NoiseRange().sigma_min), 100.0])
def test_ratio_levels_whose_median_is_no_level_have_a_number_of_levels(p_mean: float):
    pairs = RatioLevels(p_mean=p_mean)(3, 8, uniform_numbers(10))
    assert pairs.num_levels >= 2
    assert (pairs.t_lo < pairs.t_hi).all()


# --- A start as a denoiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [LevelGrid(), RatioLevels()])
def test_a_run_that_denoises_first_has_all_its_stages_behind_that(then: LevelGrid | RatioLevels):
    levels, uniform = DenoiseFirst(share=0.25, then=then), uniform_numbers(1000)
    for step in (0, 24):
        pairs = levels(step, 100, uniform)
        assert pairs.num_levels == 2
        assert (pairs.t_lo == np.float32(then.noise.sigma_min)).all()
        assert torch.equal(pairs.t_hi, then(74, 75, uniform).t_hi)  # as at the end of the run
        assert levels.nearest(1.0, step, 100) == then.nearest(1.0, 74, 75)
    for step in (25, 60, 99):
        pairs, those = levels(step, 100, uniform), then(step - 25, 75, uniform)
        assert all(torch.equal(a, b) for a, b in zip(pairs[:3], those[:3], strict=True))
        assert pairs.num_levels == those.num_levels
        assert levels.nearest(1.0, step, 100) == then.nearest(1.0, step - 25, 75)
    assert levels.noise == then.noise


def test_a_share_of_nothing_is_no_start_and_one_of_all_only_denoises():
    uniform = uniform_numbers(50)
    none, all_of_it = DenoiseFirst(share=0.0)(0, 10, uniform), DenoiseFirst(share=1.0)(9, 10, uniform)
    assert torch.equal(none.t_lo, LevelGrid()(0, 10, uniform).t_lo)
    assert all_of_it.num_levels == 2
    with pytest.raises(ValueError, match="share must be"):
        DenoiseFirst(share=1.1)


@pytest.mark.parametrize("p_mean", [-100.0, -40.0, -12.0, -6.5, -1.1, 4.0, 9.0, 30.0, 100.0])
@pytest.mark.parametrize("p_std", [0.5, 2.0])
def test_continuous_levels_are_the_truncated_lognormal_wherever_its_bell_is(p_mean: float, p_std: float):
    """Against scipy; so far off that its tails are zero in float64, the end nearest to the bell."""
    levels, uniform = RatioLevels(p_mean=p_mean, p_std=p_std), torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    t = levels(0, 8, uniform).t_hi.double().log()
    ends = [math.log(levels.noise.sigma_min * 1.001), math.log(levels.noise.sigma_max)]
    low, high = ((end - p_mean) / p_std for end in ends)
    if low > 38 or high < -38:
        expected = torch.full_like(t, ends[0] if low > 0 else ends[1])
    else:
        expected = torch.as_tensor(scipy.stats.truncnorm.ppf(uniform, low, high, p_mean, p_std))
    torch.testing.assert_close(t, expected, atol=1e-4, rtol=1e-4)
