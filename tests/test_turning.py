"""The mixture's denoiser, and how far components turn along the flow: against answers known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from robustcm.clusters import Clusters
from robustcm.consistency import sample
from robustcm.gaussian import Gaussian, LinearSkip, flow_gain
from robustcm.losses import geman_mcclure
from robustcm.noise import NoiseRange
from robustcm.objective import Objective, draw
from robustcm.preconditioning import Preconditioned, Skip
from robustcm.scales import MeasuredC
from robustcm.schedules import DoublingCurriculum, LevelGrid
from robustcm.turning import Turning, turning

WITHIN = 0.1
"""Standard deviation of a cluster; the two lie at -0.5 and 0.5."""


def two_clusters(n: int, seed: int = 0) -> Tensor:
    """``[n, 3]``: a mixture of two Gaussians in the first coordinate, Gaussian in the others."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, -0.5, 0.5)
    z = torch.randn(n, 3, generator=generator)
    return z * torch.tensor([WITHIN, 0.3, 0.2]) + side[:, None] * torch.tensor([1.0, 0, 0])


def gaussian_of_two_clusters() -> Gaussian:
    return Gaussian.of(torch.zeros(3), torch.diag(torch.tensor([0.25 + WITHIN**2, 0.09, 0.04])))


def best(y_t: Tensor, t: Tensor) -> Tensor:
    """The exact denoiser of ``two_clusters``."""
    t2, first = t[:, None] ** 2, y_t[:, :1]
    mean = 0.5 * torch.tanh(0.5 * first / (WITHIN**2 + t2))
    first = mean + WITHIN**2 / (WITHIN**2 + t2) * (first - mean)
    others = torch.tensor([0.09, 0.04])
    return torch.cat([first, others / (others + t2) * y_t[:, 1:]], 1)


def ends_correlate(t: float) -> float:
    """The first coordinate of ``two_clusters`` at noise t and at the smallest noise: its flow is the monotone map."""
    grid = torch.linspace(-0.5 - 6 * (t + WITHIN), 0.5 + 6 * (t + WITHIN), 20_001, dtype=torch.float64).numpy()
    low = torch.linspace(-1.2, 1.2, 20_001, dtype=torch.float64).numpy()

    def cdf(x, t):
        spread = math.hypot(WITHIN, t)
        return (scipy.stats.norm.cdf((x - 0.5) / spread) + scipy.stats.norm.cdf((x + 0.5) / spread)) / 2

    end = np.interp(cdf(grid, t), cdf(low, 0.002), low)
    weight = np.gradient(cdf(grid, t))
    return float((weight * grid * end).sum() / math.sqrt((weight * grid**2).sum() * (weight * end**2).sum()))


def test_one_cluster_is_the_wiener_denoiser(rng):
    y = torch.randn(500, 5, generator=rng, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.1])
    y = y - y.mean(0)
    t = torch.full((500,), 0.7, dtype=torch.float64)
    ours = Clusters.fit(y, 1, rng, full=5, prior=0.0).denoised(y, t)
    covariance = y.T @ y / 500
    expected = y @ torch.linalg.solve(covariance + 0.49 * torch.eye(5), covariance)
    torch.testing.assert_close(ours, expected)


def test_the_mixture_is_found_and_its_denoiser_the_exact_one(rng):
    mixture = Clusters.fit(two_clusters(4000), 2, rng)
    torch.testing.assert_close(mixture.means[:, 0].abs(), torch.full((2,), 0.5), rtol=0.03, atol=0)
    for level in (0.05, 0.3, 1.0):
        t = torch.full((2000,), level)
        noisy = two_clusters(2000, 1) + level * torch.randn(2000, 3, generator=rng)
        assert (mixture.denoised(noisy, t) - best(noisy, t)).square().mean().sqrt() < 0.01


def test_more_clusters_than_different_samples_do_no_harm(rng):
    y = torch.tensor([[1.0, 0], [-1, 0], [0, 2]]).repeat(10, 1)
    assert Clusters.fit(y, 8, rng).denoised(y, torch.full((30,), 0.5)).isfinite().all()


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_a_component_turns_by_what_the_best_denoiser_gains_over_the_linear_one(level, rng):
    """The gain by quadrature over the first coordinate; the others do not turn."""
    y = two_clusters(40_000)
    levels = torch.tensor([level])
    found = turning(y, gaussian_of_two_clusters().variances[:3], levels, best, rng, errors=0.0)[0]
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)[:, None]
    spread = math.hypot(WITHIN, level)
    weight = sum(torch.exp(-(((x[:, 0] - m) / spread) ** 2) / 2) for m in (-0.5, 0.5))
    nonlinear = best(x.expand(-1, 3), torch.full((len(x),), level))[:, 0] - 0.26 / (0.26 + level**2) * x[:, 0]
    expected = math.sqrt(float((weight * nonlinear**2).sum() / weight.sum()) / (0.26 + level**2))
    assert float(found[0]) == pytest.approx(expected, rel=0.08)
    assert found[1:].max() < 1e-3


def test_the_two_ends_of_a_path_correlate_at_least_as_much_as_the_angle_says():
    """With the exact denoiser: a bound, and in one dimension not far from the truth."""
    gaussian, noise = gaussian_of_two_clusters(), NoiseRange()
    grid = torch.linspace(math.log(0.002), math.log(80), 200).exp()
    speeds = turning(two_clusters(20_000), gaussian.variances[:3], grid, best, torch.Generator().manual_seed(1), 0.0)
    step = math.log(80 / 0.002) / 199
    angle = float(speeds[:, 0].sum()) * step
    truth = ends_correlate(80.0)
    assert truth - 0.06 < math.cos(angle) < truth + 0.002
    turned = Turning().on(two_clusters(6000), gaussian, torch.Generator().manual_seed(0))
    measured = turned(torch.tensor([80.0]), gaussian.variances, noise) / flow_gain(
        torch.tensor([80.0]), gaussian.variances, noise
    )
    assert float(measured[0, 0]) == pytest.approx(truth, abs=0.05)
    assert (measured[0, 1:3] > 0.999).all()


def test_what_is_taken_off_is_the_spread_of_what_is_measured(rng):
    """As measuring again and again shows it."""
    variances, level = gaussian_of_two_clusters().variances[:3], torch.tensor([0.5])
    found, less = [], []
    for seed in range(150):
        y = two_clusters(2000, seed)
        state = rng.get_state()
        speed = turning(y, variances, level, best, rng, errors=0.0)[0, 0]
        rng.set_state(state)  # the same noise
        found.append(speed.square())
        less.append(turning(y, variances, level, best, rng, errors=2.0)[0, 0].square())
    assert min(less) > 0  # something is left of each
    taken_off = torch.stack(found).mean() - torch.stack(less).mean()
    assert float(taken_off) == pytest.approx(2 * float(torch.stack(found).std()), rel=0.2)


def test_speeds_that_change_evenly_add_up_to_their_integral(rng, monkeypatch):
    """Of ``a + b u`` over u = ln(t / sigma_min) it is ``a u + b u^2 / 2``."""
    a, b, noise = torch.tensor([0.0, 0.02, 0.1]), torch.tensor([0.02, 0.0, -0.005]), NoiseRange()
    monkeypatch.setattr(
        "robustcm.turning.turning", lambda y, v, t, *_, **__: a + b * (t / noise.sigma_min).log()[:, None]
    )
    angles = Turning(levels=4).on(two_clusters(200), gaussian_of_two_clusters(), rng).angles
    u = torch.linspace(0, math.log(noise.sigma_max / noise.sigma_min), 4)[:, None]
    torch.testing.assert_close(angles[:, :3], a * u + b * u**2 / 2, rtol=1e-5, atol=1e-6)


def test_gaussian_data_do_not_turn(rng):
    x = torch.randn(3000, 8, generator=rng) * torch.logspace(0.3, -1, 8)
    gaussian = Gaussian.fit(x)
    assert Turning().on(x, gaussian, rng).angles.max() < 0.05


def test_sorted_samples_are_measured_as_shuffled_ones():
    x, gaussian = two_clusters(4000), gaussian_of_two_clusters()
    found = [
        Turning().on(rows, gaussian, torch.Generator().manual_seed(0)).angles[-1, 0]
        for rows in (x, x[x[:, 0].argsort()])
    ]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.1)


@pytest.mark.parametrize("options", [{"clusters": 1}, {"levels": 1}, {"clusters": 2.5}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number in 2 .. 1000"):
        Turning(**options)


def test_too_few_samples_have_no_angles():
    x, gaussian = two_clusters(4), gaussian_of_two_clusters()
    assert Turning(clusters=2, levels=3).on(x, gaussian, torch.Generator().manual_seed(0)).angles.isfinite().all()
    with pytest.raises(ValueError, match="3 samples are too few"):
        Turning().on(x[:3], gaussian, torch.Generator())


# --- In training -----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """An MLP that gives nothing before its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(5, 48), nn.Linear(48, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        told = c_noise[:, None] / 1000
        return self.last(nn.functional.silu(self.inside(torch.cat([x, told, told.square()], 1))))


def energy_distance(x: Tensor, y: Tensor) -> float:
    between, own, others = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * between - own - others)


def trained(skip: Skip | None, steps: int = 250) -> float:
    """The distance of samples to data of two clusters, behind so many steps with ``skip``."""
    torch.manual_seed(0)
    x, network = two_clusters(2000), Small()
    f = Preconditioned(network, skip=skip)
    grid = LevelGrid(curriculum=DoublingCurriculum(s0=10, s1=40))
    objective = Objective(distance=geman_mcclure, c=MeasuredC(multiple=0.7), levels=grid)
    optimizer, state = torch.optim.Adam(network.parameters(), lr=3e-3, eps=1e-8), objective.init()
    for step in range(steps):
        batch = x[torch.arange(step * 64, step * 64 + 64) % len(x)]
        terms = objective(f, objective.prepare(batch, draw(0, step, batch.shape), step, steps), state)
        state = terms.state
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    return energy_distance(sample(f, torch.randn(1000, 3)), two_clusters(1000, 9))


def test_on_two_clusters_it_is_better_than_the_scalar_skip_at_equal_steps():
    x = two_clusters(2000)
    gaussian = Gaussian.fit(x)
    turned = Turning(clusters=4).on(x, gaussian, torch.Generator().manual_seed(0))
    assert trained(LinearSkip(gaussian, turned)) < 0.7 * trained(None)
