"""The consistency function, the temporal difference and the sampler: boundary, diffusers, dropout, exact answers."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from diffusers import CMStochasticIterativeScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustcm.consistency import Preconditioned, Preconditioning, add_noise, replayed_rng, sample, temporal_difference
from robustcm.noise import NoiseRange

S = 0.4  # standard deviation of Gaussian data, whose consistency function is known


def gaussian_f(x_t: Tensor, t: Tensor) -> Tensor:
    """The exact consistency function of data N(0, S^2)."""
    return x_t * ((S**2 + NoiseRange().sigma_min ** 2) / (S**2 + t**2)).sqrt().reshape(-1, *[1] * (x_t.dim() - 1))


class Net(nn.Module):
    """A small F whose output depends on everything it is given, with dropout."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 6)).to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers((x + c_noise[:, None] / 1000).to(self.dtype))


# --- The consistency function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6),
    sigma_data=st.sampled_from([0.5, 0.3, 0.7, 1.0, 1.3, 16.0]),
    sigma_min=st.sampled_from([0.002, 0.001, 0.0123]),
)
def test_at_the_smallest_noise_f_is_the_identity_bit_exactly(dtype, x, sigma_data, sigma_min):
    f = Preconditioned(Net(dtype=dtype), Preconditioning(sigma_data=sigma_data, noise=NoiseRange(sigma_min=sigma_min)))
    x = torch.tensor([x])
    assert torch.equal(f(x, torch.tensor([sigma_min])), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sigma_data", [0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 2.9])
def test_coefficients_at_the_smallest_noise_are_one_and_zero_in_every_precision(sigma_data, dtype):
    p, t = Preconditioning(sigma_data=sigma_data), torch.tensor([NoiseRange().sigma_min], dtype=dtype)
    assert (p.c_skip(t).item(), p.c_out(t).item()) == (1.0, 0.0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_coefficients_are_those_of_diffusers(sigma_data):
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=41, sigma_data=sigma_data, s_noise=1.0)
    t = NoiseRange().levels(41)
    p = Preconditioning(sigma_data=sigma_data)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(t)
    torch.testing.assert_close(p.c_skip(t), c_skip, rtol=1e-12, atol=0)
    torch.testing.assert_close(p.c_out(t), c_out, rtol=1e-12, atol=0)
    torch.testing.assert_close(p.c_noise(t), scheduler.timesteps, rtol=1e-12, atol=1e-9)
    scaled = [float(scheduler.scale_model_input(torch.ones(()), noise)) for noise in scheduler.timesteps[:1]]
    torch.testing.assert_close(p.c_in(t[:1]).tolist(), scaled, rtol=1e-6, atol=0)


def test_input_of_the_network_has_unit_variance_at_every_level(rng):
    t = NoiseRange().levels(11).float().repeat_interleave(20_000)
    x_t = add_noise(0.5 * torch.randn(220_000, 1, generator=rng), torch.randn(220_000, 1, generator=rng), t)
    seen = []
    Preconditioned(lambda x, c_noise: seen.append(x) or x)(x_t, t)
    torch.testing.assert_close(seen[0].reshape(11, -1).std(1), torch.ones(11), rtol=0.03, atol=0)


def test_f_is_the_formula_of_the_paper_sample_by_sample(rng):
    net = Net()
    x_t, t = torch.randn(3, 6, generator=rng), torch.tensor([0.01, 1.0, 50.0])
    y = Preconditioned(net)(x_t, t)
    for i, s in enumerate(t.tolist()):
        inside = net(x_t[i : i + 1] / (s**2 + 0.25) ** 0.5, 250 * t[i : i + 1].log())
        expected = 0.25 / ((s - 0.002) ** 2 + 0.25) * x_t[i] + (s - 0.002) * 0.5 / (s**2 + 0.25) ** 0.5 * inside[0]
        torch.testing.assert_close(y[i], expected)


def test_low_precision_of_the_network_does_not_spread_to_the_sum():
    assert Preconditioned(Net(dtype=torch.bfloat16))(torch.zeros(2, 6), torch.ones(2)).dtype == torch.float32


def test_conditions_reach_the_network():
    f = Preconditioned(lambda x, c_noise, *, label: label[:, None].expand_as(x))
    y = f(torch.zeros(2, 3), torch.full((2,), 1e6), label=torch.tensor([4.0, 6.0]))
    torch.testing.assert_close(y, torch.tensor([[2.0], [3.0]]).expand(2, 3))  # c_out -> sigma_data


@pytest.mark.parametrize("t", [torch.ones(1), torch.ones(3), torch.ones(1, 2)], ids=lambda t: str(t.shape))
def test_one_noise_level_a_sample_is_demanded(t):
    for call in (Preconditioned(Net()), lambda x, t: add_noise(x, x, t)):
        with pytest.raises(ValueError, match=r"t must be one value a sample, \[2\], got \["):
            call(torch.zeros(2, 6), t)


@pytest.mark.parametrize("t", [torch.tensor(3.0), torch.full((2, 1), 3.0), torch.full((2, 1, 1, 1), 3.0)])
def test_a_noise_level_with_axes_to_spare_means_what_it_says(t, rng):
    x, net = torch.randn(2, 6, generator=rng), Preconditioned(Net())
    assert torch.equal(net(x, t), net(x, torch.full((2,), 3.0)))
    assert torch.equal(add_noise(x, x, t), 4 * x)


def test_noise_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"x and z must have one shape \[b, \.\.\.\], got \(2, 3, 4\) and \(2, 1, 1\)"):
        add_noise(torch.zeros(2, 3, 4), torch.zeros(2, 1, 1), torch.ones(2))


def test_noise_is_added_sample_by_sample():
    x_t = add_noise(torch.ones(2, 2, 2), torch.ones(2, 2, 2), torch.tensor([3.0, 5.0]))
    assert x_t[:, 0, 0].tolist() == [4, 6]


# --- The temporal difference -----------------------------------------------------------------------------------------


def dropped(net: nn.Dropout):
    """An f whose output is its dropout mask."""
    return lambda x_t, t: net(torch.ones_like(x_t))


def test_student_and_teacher_share_their_dropout_mask_bit_exactly(device):
    x = torch.zeros(4, 1000, device=device)
    student, teacher = temporal_difference(dropped(nn.Dropout(0.5)), x, x, torch.ones(4, device=device), x[:, 0])
    assert torch.equal(student, teacher)
    assert set(student.unique().tolist()) == {0, 2}


def test_samples_do_not_share_their_dropout_mask():
    student, _ = temporal_difference(dropped(nn.Dropout(0.5)), *torch.zeros(2, 2, 1000), torch.ones(2), torch.ones(2))
    assert not torch.equal(student[0], student[1])


def test_at_equal_levels_student_and_teacher_are_equal_bit_exactly(rng, device):
    f = Preconditioned(Net(dropout=0.5).to(device))
    x, z = torch.randn(2, 5, 6, generator=rng).to(device)
    t = torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0], device=device)
    student, teacher = temporal_difference(f, x, z, t, t)
    assert torch.equal(student, teacher)


def test_student_is_f_at_the_larger_and_teacher_at_the_smaller_level_with_the_same_noise(rng):
    f = Preconditioned(Net())
    x, z = torch.randn(2, 3, 6, generator=rng)
    t_hi, t_lo = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 2.5, 0.5])
    student, teacher = temporal_difference(f, x, z, t_hi, t_lo)
    torch.testing.assert_close(student, f(x + t_hi[:, None] * z, t_hi))
    torch.testing.assert_close(teacher, f(x + t_lo[:, None] * z, t_lo))


def test_gradient_flows_through_the_student_only(rng):
    f = Preconditioned(Net())
    x, z = torch.randn(2, 3, 6, generator=rng)
    t_hi, t_lo = torch.full((3,), 2.0), torch.full((3,), 1.0)
    student, teacher = temporal_difference(f, x, z, t_hi, t_lo)
    assert student.requires_grad
    assert not teacher.requires_grad
    weights = list(f.network.parameters())
    ours = torch.autograd.grad((student - teacher).square().sum(), weights)
    fixed = teacher.clone()
    expected = torch.autograd.grad((f(add_noise(x, z, t_hi), t_hi) - fixed).square().sum(), weights)
    torch.testing.assert_close(ours, expected)


def test_random_state_afterwards_is_that_after_one_pass():
    f, x, t = dropped(nn.Dropout(0.5)), torch.zeros(2, 7), torch.ones(2)
    torch.manual_seed(0)
    temporal_difference(f, x, x, t, t)
    after_both = torch.rand(3)
    torch.manual_seed(0)
    f(x, t)
    assert torch.equal(after_both, torch.rand(3))


def test_consecutive_temporal_differences_have_different_masks():
    f, x, t = dropped(nn.Dropout(0.5)), torch.zeros(2, 100), torch.ones(2)
    assert not torch.equal(temporal_difference(f, x, x, t, t)[0], temporal_difference(f, x, x, t, t)[0])


def test_a_block_of_replayed_randomness_leaves_no_trace(device):
    with replayed_rng(device):
        inside = torch.rand(5, device=device)
    assert torch.equal(inside, torch.rand(5, device=device))


# --- The sampler -----------------------------------------------------------------------------------------------------


def test_one_step_is_f_at_the_largest_noise(rng):
    f, z = Preconditioned(Net()), torch.randn(3, 6, generator=rng)
    assert torch.equal(sample(f, z), f(NoiseRange().sigma_max * z, torch.full((3,), NoiseRange().sigma_max)))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_network_is_evaluated_once_a_level_at_that_level(steps):
    levels = []

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        levels.append(t.tolist())
        return x_t

    sigmas = (80.0, 24.0, 5.0, 0.8)[:steps]
    sample(f, torch.zeros(2, 3), sigmas=sigmas, generator=torch.Generator())
    assert levels == [pytest.approx([s, s]) for s in sigmas]


def test_noise_that_comes_back_is_that_between_sigma_min_and_the_level():
    seen = []

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    sample(
        f, torch.zeros(2, 3), sigmas=(80, 5), noise=NoiseRange(sigma_min=3), generator=torch.Generator().manual_seed(7)
    )
    torch.testing.assert_close(seen[1], 4 * torch.randn(2, 3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("sigmas", [(80.0,), (80.0, 0.821), (80.0, 5.0, 0.5)])
def test_samples_from_the_exact_function_of_gaussian_data_have_its_law(sigmas, rng):
    z = torch.randn(20_000, 1, generator=rng)
    samples = sample(gaussian_f, z, sigmas=sigmas, generator=rng)[:, 0]
    assert scipy.stats.kstest(samples.numpy(), scipy.stats.norm(scale=S).cdf).pvalue > 1e-3


def test_samples_are_a_function_of_noise_and_generator(rng):
    f, z = Preconditioned(Net()), torch.randn(3, 6, generator=rng)

    def draw(seed: int) -> Tensor:
        torch.rand(())  # the ambient generator must not matter
        return sample(f, z, sigmas=(80, 0.8), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("indices", [(0,), (0, 17), (0, 10, 25)])
def test_samples_are_those_of_diffusers_scheduler_around_the_same_network(indices, rng):
    net, z = Net(), torch.randn(3, 6, generator=rng)
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, s_noise=1.0, clip_denoised=False)
    scheduler.set_timesteps(timesteps=list(reversed(indices)))
    generator = torch.Generator().manual_seed(1)
    x = scheduler.init_noise_sigma * z
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(scheduler.scale_model_input(x, t), t.float().expand(3))
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    sigmas = NoiseRange().levels(40)[list(indices)].tolist()
    ours = sample(Preconditioned(net), z, sigmas=sigmas, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_samples_carry_no_graph():
    assert not sample(Preconditioned(Net()), torch.zeros(2, 6)).requires_grad


@pytest.mark.parametrize("sigmas", [(), (1.0, 2.0), (2.0, 2.0), (80.0, 0.001), (90.0,), (float("nan"),)], ids=str)
def test_levels_that_do_not_fall_or_lie_outside_the_range_are_refused(sigmas):
    with pytest.raises(ValueError, match=r"sigmas must (fall|lie in sigma_min \.\. sigma_max = 0\.002 \.\. 80\.0)"):
        sample(gaussian_f, torch.zeros(1, 1), sigmas=sigmas, generator=torch.Generator())


def test_fresh_noise_needs_a_generator():
    with pytest.raises(ValueError, match=r"pass a torch\.Generator as generator="):
        sample(gaussian_f, torch.zeros(1, 1), sigmas=(80, 1))
