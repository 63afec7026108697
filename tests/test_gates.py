"""Gates give probabilities that meet in their limits; noise is never mixed; recognition follows its theory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustcm.couplers import Entropic, WithinClasses, exact
from robustcm.gates import (
    Above,
    AboveExplained,
    AnnealedAbove,
    Gate,
    ShareAbove,
    SoftAbove,
    coupled_noise,
    everywhere,
    explained_below,
    gated_noise,
    of_data_time,
    of_flow_time,
    recognisable_below,
)

T = torch.logspace(math.log10(0.002), math.log10(80), 60)
GATES: list[Gate] = [everywhere, Above(1.0), SoftAbove(1.0), AnnealedAbove(0.5, 5.0), ShareAbove(0.3, 2.0)]
sigmas = st.floats(0.01, 50)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_gives_probabilities_that_do_not_fall_with_the_noise(gate: Gate):
    for progress in (0.0, 0.4, 1.0):
        p = gate(T, progress)
        assert p.shape == T.shape
        assert p.dtype == T.dtype
        assert ((p >= 0) & (p <= 1)).all()
        assert (p.diff() >= 0).all()


@given(sigmas)
def test_the_soft_gate_is_one_half_at_sigma_and_the_hard_gate_in_the_limit(sigma: float):
    t = T.double()
    assert float(SoftAbove(sigma)(torch.tensor([sigma], dtype=torch.float64), 0.0)) == pytest.approx(0.5)
    away = (t / sigma).log().abs() > 0.01
    torch.testing.assert_close(SoftAbove(sigma, k=1e5)(t, 0.0)[away], Above(sigma)(t, 0.0)[away])


@given(sigmas, sigmas, st.floats(0, 1))
def test_the_annealed_gate_is_the_hard_one_at_its_ends_and_geometric_between(start: float, end: float, progress: float):
    gate = AnnealedAbove(start, end)
    assert torch.equal(gate(T, 0.0), Above(start)(T, 0.0))
    assert torch.equal(gate(T, 0.5), Above(start * (end / start) ** 0.5)(T, 0.0))
    low, high = sorted((start, end))
    p = gate(T, progress)
    assert (p[high * (1 + 1e-6) < T] == 1).all()
    assert (p[low * (1 - 1e-6) > T] == 0).all()


def test_a_share_is_the_hard_gate_scaled():
    assert torch.equal(ShareAbove(0.25, 2.0)(T, 0.0), 0.25 * Above(2.0)(T, 0.0))
    assert torch.equal(ShareAbove(1.0, 0.0)(T, 0.0), everywhere(T, 0.0))


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (lambda: Above(-1.0), "sigma"),
        (lambda: SoftAbove(0.0), "sigma"),
        (lambda: SoftAbove(1.0, k=0.0), "k"),
        (lambda: AnnealedAbove(0.0, 1.0), "start"),
        (lambda: AnnealedAbove(1.0, -1.0), "end"),
        (lambda: ShareAbove(1.5), "share"),
    ],
)
def test_impossible_gates_are_refused_by_name(build, wrong: str):
    with pytest.raises(ValueError, match=rf"^{wrong} must be a .*number"):
        build()


def test_each_sample_takes_its_coupled_noise_or_its_own_and_never_a_mixture(device: torch.device):
    z = torch.arange(5.0, device=device)[:, None, None].expand(5, 2, 2)
    coupled = 10 + z
    probability = torch.tensor([0.0, 0.2, 0.2, 1.0, 1.0], device=device)
    uniform = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.999], device=device)
    assert gated_noise(z, coupled, probability, uniform)[:, 0, 0].tolist() == [0, 11, 2, 13, 14]


def test_the_share_that_takes_the_coupled_noise_is_the_probability():
    z = torch.zeros(20_000, 1)
    taken = gated_noise(z, z + 1, torch.full((20_000,), 0.3), torch.rand(20_000, generator=generator()))
    assert abs(float(taken.mean()) - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5


# --- Where a noisy sample stops showing which one it was --------------------------------------------------------------


def test_two_points_are_told_apart_as_the_normal_law_says():
    # Posterior weight of the right one of two points at distance a: E[sigmoid(a^2 / (2 t^2) + a u / t)], u ~ N(0, 1).
    x, a = torch.tensor([[0.0], [3.0]]), 3.0
    weights = []
    for seed in range(400):
        weights.append(recognisable_below(x, generator(seed), probes=2, share=0.9))
    t = float(torch.tensor(weights).median())
    u = torch.randn(200_000, 2, generator=generator(), dtype=torch.float64)
    expected = torch.sigmoid(a * a / (2 * t * t) + a * u / t).mean(1).median()
    assert float(expected) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("d", [64, 256, 1024])
def test_gaussian_data_are_recognised_up_to_the_level_of_theory(d: int):
    n, std = 2000, 0.5
    found = recognisable_below(std * torch.randn(n, d, generator=generator()), generator(1))
    assert found == pytest.approx(std * math.sqrt(d / (2 * math.log(n))), rel=0.08)


@given(st.floats(0.1, 10))
def test_the_level_scales_with_the_data(k: float):
    x = torch.randn(100, 6, generator=generator(), dtype=torch.float64)
    one, scaled = (recognisable_below(data, generator(), sigma_max=1e3) for data in (x, k * x))
    assert scaled == pytest.approx(k * one, rel=1e-6)


def test_the_level_ignores_the_mean_and_falls_with_the_share_asked_for():
    x = torch.randn(200, 2, 3, 3, generator=generator(), dtype=torch.float64)
    assert recognisable_below(x + 7, generator()) == pytest.approx(recognisable_below(x, generator()), rel=1e-6)
    levels = [recognisable_below(x, generator(), share=share) for share in (0.9, 0.5, 0.1)]
    assert levels == sorted(levels)


def test_what_is_told_apart_everywhere_and_too_few_samples():
    assert recognisable_below(torch.tensor([[0.0], [1e6]]), generator()) == 80.0
    with pytest.raises(ValueError, match="at least two"):
        recognisable_below(torch.zeros(1, 3), generator())


@pytest.mark.parametrize("n", [40, 4000])  # more elements than samples, and fewer: another matrix, the same levels
def test_white_data_are_explained_up_to_the_level_of_theory(n: int):
    d, std = 60, 0.5
    x = torch.randn(n, d, generator=generator(), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    rank = min(n - 1, d)  # the mean takes a direction
    x = std * math.sqrt(n) * (u[:, :rank] @ v[:rank])  # every variance that is not 0 is std^2
    for share in (0.2, 0.5, 0.9):
        assert explained_below(x, share) == pytest.approx(std * math.sqrt((1 - share) / share), rel=1e-6)


@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_a_linear_denoiser_fitted_to_noisy_data_explains_the_share(share: float, seed: int):
    n, scale = 400, torch.tensor([3.0, 1.0, 0.3, 0.3, 0.1], dtype=torch.float64)
    x = torch.randn(n, 5, generator=generator(seed), dtype=torch.float64) * scale
    x = x - x.mean(0)
    # Noise that is white and apart from the data in these very samples, so that nothing is left to chance.
    drawn = torch.randn(n, 5, generator=generator(seed + 1), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), x, drawn], 1)).Q
    z = math.sqrt(n) * basis[:, 6:]
    y = x + explained_below(x, share) * z
    residual = x - y @ torch.linalg.lstsq(y, x).solution
    assert 1 - float(residual.square().sum() / x.square().sum()) == pytest.approx(share, rel=1e-6)


@given(st.floats(0.01, 100))
def test_the_explained_level_scales_with_the_data_and_ignores_mean_and_rotation(k: float):
    x = torch.randn(50, 2, 3, 2, generator=generator(), dtype=torch.float64)
    one = explained_below(x)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator(1), dtype=torch.float64)).Q
    assert explained_below(k * x + 7) == pytest.approx(k * one, rel=1e-6)
    assert explained_below(x.flatten(1) @ turn) == pytest.approx(one, rel=1e-6)


def test_fewer_samples_than_elements_serve_if_the_variance_lies_in_few_directions():
    variances = 1 / torch.arange(1, 401, dtype=torch.float64)
    x = torch.randn(200, 400, generator=generator(), dtype=torch.float64) * variances.sqrt()
    t = explained_below(x, 0.2)
    assert float((variances.square() / (variances + t * t)).sum() / variances.sum()) == pytest.approx(0.2, abs=0.05)


def test_the_explained_level_falls_with_the_share_and_needs_data_that_vary():
    x = torch.randn(200, 6, generator=generator())
    levels = [explained_below(x, share) for share in (0.1, 0.2, 0.5, 0.9)]
    assert levels == sorted(levels, reverse=True)
    with pytest.raises(ValueError, match="at least two"):
        explained_below(x[:1])
    with pytest.raises(ValueError, match="all 3 samples are the same"):
        explained_below(torch.full((3, 4), 0.1))  # whose mean rounds
    with pytest.raises(ValueError, match="share must be in"):
        explained_below(x, 1.0)


def test_the_gate_without_a_search_is_above_the_level_measured_and_refuses_before():
    x = 0.5 * torch.randn(300, 64, generator=generator(1))
    assert AboveExplained(0.1).on(x) == Above(explained_below(x, 0.1))
    with pytest.raises(ValueError, match="has seen no data"):
        AboveExplained()(torch.ones(3), 0.0)


# --- The whole technique in one call ---------------------------------------------------------------------------------


def drawn(b: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise and levels on both sides of 1."""
    x, z = torch.randn(2, b, 3, generator=generator(seed))
    return x, z, torch.linspace(0.1, 3, b)


def test_coupled_noise_is_the_coupled_above_the_gate_and_its_own_below():
    x, z, t = drawn()
    found, paired = coupled_noise(x, z, t), z[exact(x, z)]
    assert torch.equal(found[t > 1], paired[t > 1])
    assert torch.equal(found[t <= 1], z[t <= 1])
    assert not torch.equal(found[t > 1], z[t > 1])


@pytest.mark.parametrize("gate", [everywhere, Above(1.0), SoftAbove(1.0), AnnealedAbove(0.5, 5.0)])
def test_a_gate_of_flow_time_is_that_of_its_sigma(gate: Gate):
    flow = torch.linspace(0.01, 0.98, 40, dtype=torch.float64)
    assert torch.equal(of_flow_time(gate)(flow, 0.3), gate(flow / (1 - flow), 0.3))


@pytest.mark.parametrize("gate", [everywhere, Above(1.0), SoftAbove(1.0)])
def test_a_gate_of_data_time_is_that_of_flow_time_reversed(gate: Gate):
    flow = torch.linspace(0.01, 0.98, 40, dtype=torch.float64)
    torch.testing.assert_close(of_data_time(gate)(1 - flow, 0.3), of_flow_time(gate)(flow, 0.3))


def test_in_flow_time_the_same_samples_are_coupled_as_in_sigma():
    x, z, t = drawn()
    assert torch.equal(coupled_noise(x, z, t / (1 + t), gate=of_flow_time(Above(1.01))), coupled_noise(x, z, t))


def test_a_gate_of_chance_asks_for_the_chance():
    x, z, t = drawn()
    with pytest.raises(ValueError, match=r"leaves it to chance who is coupled: pass uniform, \[32\] in \[0, 1\)"):
        coupled_noise(x, z, t, gate=SoftAbove(1.0))
    uniform = torch.rand(32, generator=generator())
    found, paired = coupled_noise(x, z, t, gate=SoftAbove(1.0), uniform=uniform), z[exact(x, z)]
    takes = uniform < SoftAbove(1.0)(t, 0.0)
    assert torch.equal(found, torch.where(takes[:, None], paired, z))


def test_labels_and_generator_reach_the_coupler():
    x, z, t = drawn()
    labels = torch.arange(32) % 3
    found = coupled_noise(x, z, t, WithinClasses(), everywhere, labels=labels)
    assert torch.equal(found, z[WithinClasses()(x, z, labels=labels)])
    drawing = coupled_noise(x, z, t, Entropic(reg=1.0), everywhere, generator=generator(3))
    assert torch.equal(drawing, z[Entropic(reg=1.0)(x, z, generator=generator(3))])


@pytest.mark.parametrize("t", [torch.ones(32, 2), torch.ones(3)], ids=lambda t: str(t.shape))
def test_levels_that_are_not_one_a_sample_are_refused(t):
    x, z, _ = drawn()
    with pytest.raises(ValueError, match=r"t must be one value a sample, \[32\], got"):
        coupled_noise(x, z, t)


def test_levels_with_axes_to_spare_mean_what_they_say():
    x, z, t = drawn()
    assert torch.equal(coupled_noise(x, z, t[:, None, None]), coupled_noise(x, z, t))
