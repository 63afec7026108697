"""The Gaussian of the data and the skip made of it: exact answers, the boundary, rounding, cost, what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from robustcm.consistency import Preconditioned, Preconditioning, sample
from robustcm.gaussian import (
    Blended,
    Gaussian,
    LinearSkip,
    Turned,
    flow_gain,
    noise_share,
    scalar_gain,
    wiener_gain,
)
from robustcm.noise import NoiseRange

D = 12
ANGLES = torch.linspace(0, 1.5, 9)[:, None] * torch.linspace(0, 1, D + 1)
GAINS = [flow_gain, wiener_gain, scalar_gain, Blended(), Turned(ANGLES)]


def data(n: int = 400, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[n, 3, 2, 2]`` Gaussian samples with a mean and variances over five orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    z = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return (z * torch.logspace(0.3, -2.2, D, dtype=torch.float64) @ turn.T + 0.2).reshape(n, 3, 2, 2).to(dtype)


def double(gaussian: Gaussian) -> Gaussian:
    return Gaussian(gaussian.mean.double(), gaussian.axes.double(), gaussian.variances.double())


@pytest.mark.parametrize("rank", [None, 1, 5, D])
@pytest.mark.parametrize("gain", GAINS, ids=lambda gain: getattr(gain, "__name__", type(gain).__name__))
@given(
    x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=D, max_size=D),
    sigma_min=st.sampled_from([0.002, 0.001, 0.0123]),
)
def test_at_the_smallest_noise_f_is_the_identity_bit_exactly(gain, rank, x, sigma_min):
    noise = NoiseRange(sigma_min=sigma_min)
    gain = Turned(gain.angles[:, : (rank or D) + 1]) if isinstance(gain, Turned) else gain
    skip = LinearSkip(Gaussian.fit(data(), rank), gain, noise)
    f = Preconditioned(lambda x, c_noise: torch.sin(x), Preconditioning(noise=noise), skip)
    x = torch.tensor(x).reshape(1, 3, 2, 2)
    assert torch.equal(f(x, torch.tensor([sigma_min])), x)


@pytest.mark.parametrize("gain", [flow_gain, wiener_gain, scalar_gain, Blended()])
@pytest.mark.parametrize("sigma_min", [0.002, 0.001, 0.0123, 0.05])
def test_gains_are_one_at_the_smallest_noise_whatever_the_variance(gain, sigma_min):
    found = gain(torch.tensor([sigma_min]), torch.logspace(-8, 3, 2000), NoiseRange(sigma_min=sigma_min))
    assert torch.equal(found, torch.ones(1, 2000))


def test_the_flow_solves_its_differential_equation():
    """dx/dt = (x - posterior mean) / t, integrated by Runge and Kutta from t down to sigma_min."""
    gaussian, noise = double(Gaussian.fit(data(dtype=torch.float64))), NoiseRange(sigma_min=0.01)
    x = data(5, 1, torch.float64) + 3 * torch.randn(5, 3, 2, 2, dtype=torch.float64)
    levels = torch.logspace(math.log10(3), -2, 400, dtype=torch.float64)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return (x - gaussian.denoised(x, t.expand(5))) / t

    y = x
    for t, s in pairwise(levels):
        h = s - t
        a = slope(y, t)
        b = slope(y + h / 2 * a, t + h / 2)
        c = slope(y + h / 2 * b, t + h / 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, s))
    torch.testing.assert_close(gaussian.flow(x, levels[:1].expand(5), noise), y, rtol=1e-5, atol=1e-6)


def test_samples_of_the_flow_have_the_mean_and_covariance_of_the_data():
    x = data(20_000)
    gaussian = Gaussian.fit(x)
    y = sample(gaussian.flow, torch.randn(40_000, 3, 2, 2, generator=torch.Generator().manual_seed(1)))
    expected, found = torch.cov(x.flatten(1).T), torch.cov(y.flatten(1).T)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.max()))
    torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=0.03)


def test_the_denoiser_is_the_linear_regression_of_the_data_on_the_noisy():
    x, t = data(200_000, dtype=torch.float64).flatten(1), 0.4
    noisy = x + t * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    regressed = torch.cat([noisy, ones], 1) @ torch.linalg.lstsq(torch.cat([noisy, ones], 1), x).solution
    ours = double(Gaussian.fit(x)).denoised(noisy, torch.full((len(x),), t))
    assert (ours - regressed).square().mean() < 1e-4 * x.var()


def test_of_white_data_the_flow_is_one_number_a_level():
    gaussian = Gaussian.of(torch.zeros(4), 0.25 * torch.eye(4, dtype=torch.float64))
    x, t = torch.randn(3, 4), torch.tensor([0.002, 1.0, 80.0])
    expected = ((0.25 + 0.002**2) / (0.25 + t**2)).sqrt()[:, None] * x
    torch.testing.assert_close(gaussian.flow(x, t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gain", GAINS, ids=lambda gain: getattr(gain, "__name__", type(gain).__name__))
def test_float32_is_good_to_its_rounding_at_the_largest_noise(gain):
    gaussian, noise = Gaussian.fit(data()), NoiseRange()
    t = torch.full((400,), 80.0)
    x_t = data() + 80 * torch.randn(400, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    ours = LinearSkip(gaussian, gain, noise)(x_t, t)
    exact = double(gaussian).scaled(x_t.double(), gain(t.double(), gaussian.variances.double(), noise))
    assert (ours - exact).abs().max() < 2e-6 * exact.std() * 10


def test_full_rank_is_exact_and_a_low_rank_takes_the_mean_of_the_other_variances():
    x, t = data(), torch.full((400,), 0.7)
    full, low = Gaussian.fit(x), Gaussian.fit(x, rank=4)
    torch.testing.assert_close(Gaussian.fit(x, rank=D).flow(x, t), full.flow(x, t))
    assert float(low.variances[-1]) == pytest.approx(float(full.variances[4:-1].mean()), rel=1e-5)
    kept = low.axes @ low.axes.T
    inside = (low.flow(x, t) - full.flow(x, t)).flatten(1) @ kept
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0, atol=1e-5)


def test_the_scalar_gain_is_the_usual_skip_around_the_mean():
    gaussian, t = Gaussian.fit(data()), torch.tensor([0.002, 0.5, 80.0])
    x, c = data(3, 5), Preconditioning().c_skip(t)[:, None, None, None]
    mean = gaussian.mean.reshape(3, 2, 2)
    torch.testing.assert_close(LinearSkip(gaussian, scalar_gain)(x, t), mean + c * (x - mean), rtol=1e-4, atol=1e-5)


def test_a_blend_lies_between_its_gains_and_ends_in_them():
    at = torch.logspace(-2.6, 1.9, 50), torch.logspace(-4, 1, 7), NoiseRange()
    low, high = scalar_gain(*at), flow_gain(*at)
    blend = Blended()(*at)
    assert (blend >= torch.minimum(low, high) - 1e-6).all()
    assert (blend <= torch.maximum(low, high) + 1e-6).all()
    torch.testing.assert_close(Blended(share=lambda *_: torch.zeros(50, 7))(*at), low)
    torch.testing.assert_close(Blended(share=lambda *_: torch.ones(50, 7))(*at), high)
    t2, variances = at[0][:, None] ** 2, at[1]
    torch.testing.assert_close(noise_share(*at), t2 / (variances + t2))


def test_angles_are_met_at_their_levels_and_shared_out_between():
    noise, ones = NoiseRange(), torch.ones(D + 1)
    levels = torch.linspace(math.log(0.002), math.log(80), 9).exp()
    at = torch.acos((Turned(ANGLES)(levels, ones, noise) / flow_gain(levels, ones, noise)).clamp(max=1))
    torch.testing.assert_close(at, ANGLES, rtol=0, atol=2e-3)
    between = (levels[3] * levels[4]).sqrt()[None]
    middle = torch.acos(Turned(ANGLES)(between, ones, noise) / flow_gain(between, ones, noise))
    torch.testing.assert_close(middle[0, 1:], (ANGLES[3] + ANGLES[4])[1:] / 2, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("d", "k"), [(64, 64), (64, 5)])
def test_a_skip_costs_four_operations_an_element_and_component(d: int, k: int):
    gaussian = Gaussian(torch.zeros(d), torch.eye(d)[:, :k].contiguous(), torch.ones(k + 1))
    with FlopCounterMode(display=False) as counted:
        LinearSkip(gaussian)(torch.randn(3, d), torch.ones(3))
    assert counted.get_total_flops() == 3 * 4 * d * k


# --- In training ---------------------------------------------------------------------------------------------------


def test_at_the_flow_the_gradient_of_a_linear_network_is_zero_on_average():
    """At the exact function of Gaussian data the consistency loss is stationary: no direction of F = A x helps.

    It is not 0: student and teacher share x and z, and the path through x + t z does not lead through x + t' z.
    """
    x = data(60_000, 6, torch.float64).flatten(1)
    gaussian, noise = double(Gaussian.fit(data(60_000, 6, torch.float64))), NoiseRange()
    t_hi, t_lo = torch.full((len(x),), 1.0), torch.full((len(x),), 0.98)
    z = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def slope(gain) -> Tensor:
        skip = LinearSkip(gaussian, gain, noise)
        td = skip(x + t_hi[:, None] * z, t_hi) - skip(x + t_lo[:, None] * z, t_lo)
        return (td.T @ (x + t_hi[:, None] * z) / len(x)).norm()

    assert slope(flow_gain) < 0.1 * min(slope(scalar_gain), slope(wiener_gain))


def test_the_skip_stays_in_float32_under_autocast_and_in_double_where_the_input_is():
    x, t = data(8), torch.full((8,), 80.0)
    skip = LinearSkip(Gaussian.fit(data()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(skip(80 * x, t), skip(80 * x, t).float())
        inside = skip(80 * x, t)
    assert torch.equal(inside, skip(80 * x, t))
    assert skip(x.bfloat16(), t).dtype == torch.float32
    assert skip(x.double(), t.double()).dtype == torch.float64


def test_the_skip_compiles_whole():
    skip = LinearSkip(Gaussian.fit(data(), rank=3), Turned(ANGLES[:, :4]))
    x, t = data(5), torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0])
    compiled = torch.compile(skip.__call__, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), skip(x, t))


@pytest.mark.parametrize("gain", GAINS, ids=lambda gain: getattr(gain, "__name__", type(gain).__name__))
def test_a_skip_moves_between_devices_with_all_it_holds(gain, device):
    skip, x, t = LinearSkip(Gaussian.fit(data()), gain), data(4), torch.tensor([0.01, 0.1, 1.0, 10.0])
    torch.testing.assert_close(skip.to(device)(x.to(device), t.to(device)).cpu(), skip(x, t))


def test_a_blend_moves_with_the_angles_inside_it():
    inner = Blended(first=Turned(ANGLES))
    moved = LinearSkip(Gaussian.fit(data()), Blended(first=Turned(ANGLES), second=inner)).to("meta").gain
    assert isinstance(moved, Blended)
    assert isinstance(moved.second, Blended)
    assert {gain.angles.device.type for gain in (moved.first, moved.second.first)} == {"meta"}


def test_components_of_double_samples_are_double():
    gaussian, x = Gaussian.fit(data()), data()
    torch.testing.assert_close(gaussian.projected(x.double()).float(), gaussian.projected(x))
    assert gaussian.projected(x.double()).dtype == torch.float64


# --- What is refused -------------------------------------------------------------------------------------------------


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="12 samples are too few for 12 components"):
        Gaussian.fit(data(12))


def test_constant_components_are_refused():
    x = data()
    x[:, 0, 0, 0] = 3.0
    with pytest.raises(ValueError, match="1 of 12 principal components are constant"):
        Gaussian.fit(x)
    with pytest.raises(ValueError, match="all 40 samples are the same"):
        Gaussian.fit(torch.ones(40, 3, 2, 2))


def test_what_is_not_finite_is_refused():
    x = data()
    x[7, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="mean or covariance is NaN or infinite"):
        Gaussian.fit(x)


@pytest.mark.parametrize("rank", [0, -1, D + 1])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be 1 to {D}"):
        Gaussian.fit(data(), rank)


def test_a_skip_for_other_noise_levels_is_refused():
    """f(x, sigma_min) would not be x."""
    skip, other = LinearSkip(Gaussian.fit(data())), Preconditioning(noise=NoiseRange(sigma_min=0.05))
    with pytest.raises(ValueError, match=r"the skip is made for .*sigma_min=0.002.*, f for .*sigma_min=0.05"):
        Preconditioned(torch.nn.Identity(), other, skip)
    Preconditioned(torch.nn.Identity(), other, lambda x_t, t: x_t)  # one that does not say


@pytest.mark.parametrize(("mean", "covariance"), [((3,), (4, 4)), ((4,), (4, 3)), ((4, 1), (4, 4))])
def test_moments_that_do_not_fit_are_refused(mean, covariance):
    with pytest.raises(ValueError, match=r"need a mean \[d\] and a covariance \[d, d\], got"):
        Gaussian.of(torch.zeros(mean), torch.ones(covariance))


def test_equal_samples_are_refused_though_their_mean_is_rounded():
    with pytest.raises(ValueError, match="all 7 samples are the same"):
        Gaussian.fit(torch.full((7, 4), 0.1, dtype=torch.float64), 1)


def test_principal_components_are_no_less_precise_in_autocast():
    gaussian, x = Gaussian.fit(data()), 30 * data(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gaussian.projected(x)
    assert torch.equal(inside, gaussian.projected(x))
