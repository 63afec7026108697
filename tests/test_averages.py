"""Averages of the weights: what counts how much, how stored ones add up to others; held against ema-pytorch."""

from __future__ import annotations

import math
from pathlib import Path

import ema_pytorch
import numpy as np
import pytest
import torch
from ema_pytorch import post_hoc_ema
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustcm.averages import (
    UNIFORM,
    Average,
    Exponential,
    PowerFunction,
    Profile,
    gamma_of,
    reconstruct,
    sigma_rel_of,
)

SIGMA_REL = st.floats(1e-3, UNIFORM)
AVERAGE = st.builds(Exponential, decay=st.floats(0, 0.9999)) | st.builds(PowerFunction, sigma_rel=SIGMA_REL)
PROFILE = st.builds(Profile, st.integers(1, 5000), st.floats(0, 100))


def counted(average: Average, steps: int) -> np.ndarray:
    """What the weights of the start and of each step count behind ``steps`` steps: float64 ``[1 + steps]``."""
    counts = np.array([1.0])
    for step in range(steps):
        share = average(step)
        counts = np.append((1 - share) * counts, share)
    return counts


def stored_every(every: int, steps: int, *sigma_rels: float) -> list[Profile]:
    return [Profile(step, gamma_of(s)) for step in range(every, steps + 1, every) for s in sigma_rels]


def combined(stored: list[Profile], coefficients: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The density of the sum of profiles at the times ``at``."""
    densities = [np.where(at <= p.step, (p.gamma + 1) / p.step * (at / p.step) ** p.gamma, 0) for p in stored]
    return coefficients @ np.array(densities)


@given(AVERAGE, st.integers(0, 400))
def test_what_is_counted_adds_up_to_one_and_nothing_counts_less_than_zero(average: Average, steps: int):
    counts = counted(average, steps)
    assert (counts >= 0).all()
    assert counts.sum() == pytest.approx(1, abs=1e-12)


@given(AVERAGE, st.integers(0, 10**9))
def test_a_share_is_a_share_at_any_step(average: Average, step: int):
    assert 0 < average(step) <= 1


def test_an_exponential_average_forgets_by_its_decay_once_the_ramp_is_over():
    average = Exponential(decay=0.9)
    assert [average(step) for step in (0, 8, 80, 10**6)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert Exponential(decay=0.0)(5) == 1


@given(SIGMA_REL, st.integers(1, 400))
def test_a_step_counts_what_the_profile_has_between_it_and_the_step_before(sigma_rel: float, steps: int):
    power = gamma_of(sigma_rel) + 1
    t = np.arange(steps + 1) / steps
    np.testing.assert_allclose(counted(PowerFunction(sigma_rel=sigma_rel), steps)[1:], np.diff(t**power), atol=1e-13)


@given(SIGMA_REL)
def test_gamma_and_sigma_rel_are_each_others_inverse(sigma_rel: float):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma_of(sigma_rel) == pytest.approx(post_hoc_ema.sigma_rel_to_gamma(sigma_rel), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_sigma_rel_is_the_standard_deviation_of_what_is_counted(sigma_rel: float):
    steps = 2000
    counts, t = counted(PowerFunction(sigma_rel=sigma_rel), steps)[1:], (np.arange(steps) + 0.5) / steps
    spread = math.sqrt(counts @ t**2 - (counts @ t) ** 2)
    assert spread == pytest.approx(sigma_rel, rel=1e-4)


def test_the_widest_power_function_is_the_plain_mean_and_a_narrow_one_the_newest_weights():
    np.testing.assert_allclose(counted(PowerFunction(sigma_rel=UNIFORM), 50)[1:], np.full(50, 1 / 50), rtol=1e-9)
    assert counted(PowerFunction(sigma_rel=1e-4), 50)[-1] == pytest.approx(1)


@pytest.mark.parametrize("average", [PowerFunction(sigma_rel=0.2), Exponential(decay=0.99)])
def test_the_start_is_forgotten_at_once_by_a_power_function_and_bit_by_bit_by_an_exponential(average: Average):
    start = counted(average, 20)[0]
    assert start == 0 if isinstance(average, PowerFunction) else 0 < start < 0.1


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [(Exponential, "decay", 1.0), (Exponential, "decay", -0.1), (Exponential, "decay", math.nan)]
    + [(PowerFunction, "sigma_rel", value) for value in (0.0, 0.29, math.inf, "0.1")],
)
def test_a_length_that_is_none_is_refused(part: type, field: str, value: object):
    with pytest.raises(ValueError, match=field):
        part(**{field: value})


@given(st.lists(PROFILE, min_size=1, max_size=12), PROFILE)
def test_coefficients_add_up_to_one_and_the_error_is_that_of_the_densities(stored: list[Profile], wanted: Profile):
    found = reconstruct(stored, wanted)
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-6 * (1 + np.abs(found.coefficients).sum()))
    assume(all(p.step > 100 for p in (*stored, wanted)) and np.abs(found.coefficients).max() < 100)
    at = np.linspace(0, 5000, 200_001)[1:] - 0.0125
    density = combined([wanted], np.ones(1), at)
    distance = np.linalg.norm(combined(stored, found.coefficients, at) - density) / np.linalg.norm(density)
    assert distance == pytest.approx(found.error, rel=0.05, abs=0.01)


@given(st.lists(PROFILE, min_size=1, max_size=12, unique=True), st.data())
def test_what_is_stored_is_reconstructed_as_it_is(stored: list[Profile], data: st.DataObject):
    wanted = data.draw(st.sampled_from(stored))
    coefficients, error = reconstruct(stored, wanted)
    assert error == 0
    assert [p for p, c in zip(stored, coefficients, strict=True) if c] == [wanted]


@pytest.mark.parametrize("scale", [1 + 1e-6, 1 - 1e-6])
def test_what_is_nearly_stored_is_nearly_reconstructed_as_it_is(scale: float):
    stored = stored_every(250, 4000, 0.05, 0.1)
    coefficients, error = reconstruct(stored, stored[-1]._replace(gamma=stored[-1].gamma * scale))
    assert error < 1e-5
    np.testing.assert_allclose(coefficients, np.eye(len(stored))[-1], atol=1e-4)


@given(st.lists(PROFILE, min_size=2, max_size=12), PROFILE)
def test_one_more_stored_average_never_brings_it_further_off(stored: list[Profile], wanted: Profile):
    assert reconstruct(stored, wanted).error <= reconstruct(stored[1:], wanted).error + 1e-6


@pytest.mark.parametrize("sigma_rel", [0.02, 0.075, 0.15, 0.25])
def test_the_error_falls_with_the_number_of_snapshots(sigma_rel: float):
    wanted = Profile(4000, gamma_of(sigma_rel))
    errors = [reconstruct(stored_every(4000 // n, 4000, 0.05, 0.1), wanted).error for n in (2, 8, 32, 160)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * errors[0]


def test_two_power_functions_kept_16_times_give_those_between_to_one_per_cent():
    stored = stored_every(250, 4000, 0.05, 0.1)
    errors = {s: reconstruct(stored, Profile(4000, gamma_of(s))).error for s in (0.05, 0.06, 0.075, 0.1, 0.12, 0.15)}
    assert max(errors.values()) < 0.01


def test_nothing_stored_and_a_profile_that_is_none_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        reconstruct([], Profile(1, 1.0))
    for bad in (Profile(0, 1.0), Profile(5, -1.0), Profile(5, math.nan)):
        with pytest.raises(ValueError, match="step >= 1"):
            reconstruct([Profile(5, 1.0)], bad)


@given(st.lists(PROFILE, min_size=1, max_size=6, unique=True), PROFILE)
def test_no_affine_sum_is_closer_and_the_free_one_of_ema_pytorch_hardly(stored: list[Profile], wanted: Profile):
    """Least squares without a condition (theirs) bounds ours from below, theirs made to add up to one from above."""
    steps, gammas = (torch.tensor(values, dtype=torch.float64) for values in zip(*stored, strict=True))
    gram = post_hoc_ema.p_dot_p(steps[:, None], gammas[:, None], steps[None], gammas[None])
    assume(torch.linalg.cond(gram) < 1e8)
    step, gamma = (torch.tensor([value], dtype=torch.float64) for value in wanted)
    theirs = post_hoc_ema.solve_weights(steps, gammas, step, gamma)[:, 0]
    right = post_hoc_ema.p_dot_p(steps[:, None], gammas[:, None], step[None], gamma[None])[:, 0]
    square = post_hoc_ema.p_dot_p(step, gamma, step, gamma)

    def error(x: Tensor) -> float:
        return float(((square - 2 * x @ right + x @ gram @ x).clamp(min=0) / square).sqrt())

    ours = torch.from_numpy(reconstruct(stored, wanted).coefficients)
    assert reconstruct(stored, wanted).error == pytest.approx(error(ours), abs=1e-6)
    assert error(theirs) <= error(ours) + 1e-6
    if abs(float(theirs.sum())) > 1e-3:
        assert error(ours) <= error(theirs / theirs.sum()) + 1e-6


class Walk(nn.Module):
    """Weights that wander: 50 of them, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(50, dtype=torch.float64))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        self.weight += 0.1 * torch.randn(50, generator=self.generator, dtype=torch.float64)


def test_the_exponential_average_is_that_of_ema_pytorch():
    network, average = Walk(), Exponential(decay=0.95)
    theirs = ema_pytorch.EMA(network, beta=0.95, update_after_step=0, update_every=1, inv_gamma=9, power=1)
    theirs.update()  # takes the weights as they are
    ours = [network.weight.detach().clone()]
    for step in range(300):
        network.step()
        theirs.update()
        torch._foreach_lerp_(ours, [network.weight.detach()], average(step))
    torch.testing.assert_close(ours[0], theirs.ema_model.weight.detach(), rtol=0, atol=1e-6)  # their step is float32


def test_stored_and_reconstructed_averages_are_those_of_ema_pytorch(tmp_path: Path):
    """Theirs begins with the first weights and counts them as a step, so ours is given them twice."""
    network, kept, ours = Walk(), (PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.1)), {}
    theirs = post_hoc_ema.PostHocEMA(
        network,
        sigma_rels=(0.05, 0.1),
        update_every=1,
        checkpoint_every_num_steps=50,
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=torch.float64,
    )
    averaged = {average: [network.weight.detach().clone()] for average in kept}
    for step in range(1, 801):
        network.step()
        theirs.update()
        for average in kept:
            for at in (0, 1) if step == 1 else (step,):
                torch._foreach_lerp_(averaged[average], [network.weight.detach()], average(at))
            if step % 50 == 0:
                ours[Profile(step + 1, average.gamma)] = averaged[average][0].clone()
    for average, found in zip(kept, theirs.ema_models, strict=True):
        torch.testing.assert_close(averaged[average][0], found.ema_model.weight.detach(), rtol=0, atol=1e-9)
    for sigma_rel in (0.05, 0.07, 0.12, 0.2):
        coefficients, error = reconstruct(list(ours), Profile(801, gamma_of(sigma_rel)))
        mine = torch.from_numpy(coefficients) @ torch.stack(list(ours.values()))
        found = theirs.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.weight.detach()
        distance = float((mine - found).norm() / (mine - network.weight.detach()).norm())
        assert distance < 0.01 + error


def test_a_reconstructed_average_is_near_the_one_that_was_wanted():
    network, kept = Walk(), (PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.1))
    wanted, stored = PowerFunction(sigma_rel=0.07), {}
    averaged = {average: [network.weight.detach().clone()] for average in (*kept, wanted)}
    for step in range(800):
        network.step()
        for average, tensors in averaged.items():
            torch._foreach_lerp_(tensors, [network.weight.detach()], average(step))
            if average in kept and (step + 1) % 50 == 0:
                stored[Profile(step + 1, average.gamma)] = tensors[0].clone()
    coefficients, error = reconstruct(list(stored), Profile(800, wanted.gamma))
    found, there = torch.from_numpy(coefficients) @ torch.stack(list(stored.values())), averaged[wanted][0]
    assert error < 0.01
    assert float((found - there).norm() / (network.weight.detach() - there).norm()) < 0.01
