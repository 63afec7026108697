"""The range of noise levels: Karras' ramp, its inverse, and one range for levels, f and sampler."""

from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from hypothesis import given
from hypothesis import strategies as st

from robustcm.consistency import Preconditioned, Preconditioning, sample
from robustcm.noise import NoiseRange, TimestepIndex, flow_time, sigma_of_flow_time
from robustcm.objective import Objective, draw
from robustcm.schedules import LevelGrid, RatioLevels

NARROW = NoiseRange(sigma_min=0.1, sigma_max=10.0)
RANGES = st.builds(NoiseRange, sigma_min=st.floats(1e-4, 0.1), sigma_max=st.floats(1, 200), rho=st.floats(1, 10))


@given(num_levels=st.integers(2, 1000), noise=RANGES)
def test_levels_fall_strictly_between_ends_that_are_exact(num_levels, noise):
    levels = noise.levels(num_levels)
    assert levels.shape == (num_levels,)
    assert levels.dtype == torch.float64
    assert (levels[0].item(), levels[-1].item()) == (noise.sigma_max, noise.sigma_min)
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize("num_levels", [2, 11, 21, 41, 81, 161, 321, 641])
def test_levels_are_those_of_diffusers(num_levels):
    theirs = CMStochasticIterativeScheduler(num_train_timesteps=num_levels).sigmas
    torch.testing.assert_close(NoiseRange().levels(num_levels), theirs, rtol=1e-12, atol=0)


def test_the_middle_of_three_levels_of_a_table():
    # (80^(1/7) + 0.002^(1/7))^7 / 2^7, by hand
    assert NoiseRange().levels(3)[1].item() == pytest.approx(2.5152, abs=1e-4)


@given(num_levels=st.integers(2, 1000), noise=RANGES)
def test_depth_is_the_inverse_of_the_ramp(num_levels, noise):
    depth = noise.depth(noise.levels(num_levels))
    torch.testing.assert_close(depth, torch.linspace(0, 1, num_levels, dtype=torch.float64), rtol=0, atol=1e-9)


@given(t=st.floats(0, 0.999))
def test_flow_time_is_data_and_noise_in_the_ratio_of_its_sigma(t):
    assert float(sigma_of_flow_time(torch.tensor(t, dtype=torch.float64))) * (1 - t) == pytest.approx(t)


@pytest.mark.parametrize(
    ("axis", "most", "least"),
    [
        (NoiseRange().depth, 80.0, 0.002),
        (NARROW.depth, 10.0, 0.1),
        (flow_time, 1.0, 0.0),
        (TimestepIndex(1000), 999, 0),
    ],
)
def test_an_axis_goes_from_the_largest_noise_at_0_to_the_smallest_at_1(axis, most, least):
    depth = axis(torch.tensor([most, least]))
    torch.testing.assert_close(depth, torch.tensor([0.0, 1.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoiseRange().levels(1), "num_levels must be at least 2 .*, got 1"),
        (lambda: NoiseRange(sigma_min=0.0), "sigma_min must be a finite number >= 1e-06 .*, got 0.0"),
        (lambda: NoiseRange(sigma_min=3.0, sigma_max=2.0), "sigma_max must be at least 2 times sigma_min"),
        (lambda: NoiseRange(sigma_min=50.0), "sigma_max must be at least 2 times sigma_min, got sigma_min = 50.0"),
        (lambda: NoiseRange(sigma_max=float("inf")), "sigma_max must be a finite number .*, got inf"),
        (lambda: NoiseRange(rho=0.0), "rho must be a finite number >= 1 .*, got 0.0"),
        (lambda: TimestepIndex(0), "num_timesteps must be a whole number in 1 .*, got 0"),
    ],
)
def test_ranges_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- One range for all -----------------------------------------------------------------------------------------------


def f_for(noise: NoiseRange) -> Preconditioned:
    return Preconditioned(lambda x, c_noise: torch.ones_like(x), Preconditioning(noise=noise))


@given(noise=RANGES)
def test_f_is_the_identity_at_the_smallest_level_of_its_range(noise):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(f_for(noise)(x, torch.full((2,), noise.sigma_min)), x)


@pytest.mark.parametrize("levels", [LevelGrid(noise=NARROW), RatioLevels(noise=NARROW)], ids=["grid", "ratio"])
def test_levels_of_training_lie_in_the_range(levels):
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = levels(0, 10, uniform)
    assert pairs.t_lo.min() >= 0.1
    assert pairs.t_hi.max() <= 10


def test_an_objective_refuses_an_f_that_is_made_for_another_range():
    objective, x = Objective(levels=LevelGrid(noise=NARROW)), torch.zeros(4, 2)
    batch = objective.prepare(x, draw(0, 0, x.shape), 0, 1)
    assert objective(f_for(objective.noise), batch, objective.init()).loss.isfinite()
    with pytest.raises(ValueError, match=r"f is made for .*sigma_max=80.0.*the levels are drawn from .*sigma_max=10.0"):
        objective(f_for(NoiseRange()), batch, objective.init())


def test_sampling_starts_at_the_largest_level_of_f():
    asked = []

    def network(x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        asked.append(float((c_noise[0] / 250).exp()))
        return x

    sample(Preconditioned(network, Preconditioning(noise=NARROW)), torch.randn(2, 3))
    assert asked == [pytest.approx(10.0)]


def test_sampling_from_beyond_the_range_of_f_is_refused():
    with pytest.raises(ValueError, match=r"sigma_min \.\. sigma_max = 0\.1 \.\. 10\.0, which f is made for, got \[80"):
        sample(f_for(NARROW), torch.randn(2, 3), sigmas=(80.0,))
