"""The couplers: permutations that are optimal, or drawn from the law they claim, against brute force and POT."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustcm.couplers import Entropic, WithinClasses, coupling_gain, exact, independent

COUPLERS = [independent, exact, Entropic(), Entropic(reg=1e-3), WithinClasses(), WithinClasses(Entropic())]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(b: int, seed: int = 0, shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor]:
    x, z = torch.randn(2, b, *shape, generator=generator(seed))
    return x, z


def name(coupler) -> str:
    return getattr(coupler, "__name__", repr(coupler).split("<")[0])


def cost_matrix(x: Tensor, z: Tensor) -> Tensor:
    return torch.cdist(x.flatten(1).double(), z.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2


def cost(x: Tensor, z: Tensor, perm: Tensor) -> float:
    return float((x - z[perm]).double().square().sum())


# --- All of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupler", COUPLERS, ids=name)
@pytest.mark.parametrize("b", [1, 2, 33])
def test_every_noise_is_used_exactly_once(coupler, b):
    x, z = pair(b)
    perm = coupler(x, z, labels=torch.arange(b) % 3, generator=generator())
    assert perm.dtype == torch.int64
    assert perm.sort().values.tolist() == list(range(b))


@pytest.mark.parametrize("coupler", COUPLERS, ids=name)
def test_data_and_noise_are_left_as_they_were(coupler):
    x, z = pair(8)
    copies = x.clone(), z.clone()
    coupler(x, z, labels=torch.arange(8) % 2, generator=generator())
    assert torch.equal(x, copies[0])
    assert torch.equal(z, copies[1])


@pytest.mark.parametrize("coupler", [Entropic(), WithinClasses(Entropic())], ids=name)
def test_what_is_drawn_is_a_function_of_the_generator_alone(coupler):
    x, z = pair(33)
    draws = [coupler(x, z, labels=torch.arange(33) % 2, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("coupler", COUPLERS, ids=name)
@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((4, 1, 2), (4, 2, 2)), ((4,), (4,))], ids=str)
def test_shapes_that_would_broadcast_are_refused(coupler, shapes):
    with pytest.raises(ValueError, match=r"x and z must have one shape \[b, \.\.\.\], got"):
        coupler(*map(torch.zeros, shapes), labels=torch.zeros(4, dtype=torch.int64), generator=generator())


def test_independent_is_the_identity():
    assert independent(*pair(7)).tolist() == list(range(7))


# --- Exact -----------------------------------------------------------------------------------------------------------


@given(b=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_exact_is_the_cheapest_of_all_permutations(b, seed):
    x, z = pair(b, seed)
    best = min(cost(x, z, torch.tensor(perm)) for perm in itertools.permutations(range(b)))
    assert cost(x, z, exact(x, z)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("b", [2, 16, 128])
def test_exact_costs_what_pots_emd_costs(b):
    x, z = pair(b)
    uniform = np.full(b, 1 / b)
    theirs = b * ot.emd2(uniform, uniform, cost_matrix(x, z).numpy())
    assert cost(x, z, exact(x, z)) == pytest.approx(theirs, rel=1e-6)


def test_exact_follows_a_shuffle_of_the_noise_and_of_the_data():
    x, z = pair(50)
    shuffle = torch.randperm(50, generator=generator(1))
    perm = exact(x, z)
    assert torch.equal(shuffle[exact(x, z[shuffle])], perm)
    assert torch.equal(exact(x[shuffle], z), perm[shuffle])


def test_exact_undoes_a_shuffle():
    x, _ = pair(50)
    shuffle = torch.randperm(50, generator=generator(1))
    perm = exact(x, x[shuffle])
    assert torch.equal(shuffle[perm], torch.arange(50))


def test_exact_does_not_care_about_an_offset_of_the_data():
    x, z = pair(50)
    assert torch.equal(exact(x + 100, z), exact(x, z))


# --- Entropic --------------------------------------------------------------------------------------------------------


def frequencies(reg: float, x: Tensor, z: Tensor, draws: int) -> Counter:
    rng = generator()
    return Counter(tuple(Entropic(reg=reg)(x, z, generator=rng).tolist()) for _ in range(draws))


def test_entropic_at_a_small_temperature_is_exact():
    x, z = pair(16)
    z = x[torch.randperm(16, generator=generator(1))] + 0.1 * z
    assert torch.equal(Entropic(reg=1e-3)(x, z, generator=generator()), exact(x, z))


def test_entropic_at_a_large_temperature_is_uniform_over_all_permutations():
    seen = frequencies(1e6, *pair(3), draws=1200)
    counts = [seen[perm] for perm in itertools.permutations(range(3))]
    assert sum(counts) == 1200
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_entropic_draws_from_the_rows_of_the_plan_in_random_order_without_replacement():
    x, z = pair(3)
    inner = torch.einsum("iab,jab->ij", x - x.mean(0), z - z.mean(0)).double()
    plan = (inner / inner.std(correction=0) / 0.3).exp().numpy()
    for _ in range(1000):  # Sinkhorn
        plan /= plan.sum(1, keepdims=True)
        plan /= plan.sum(0, keepdims=True)
    perms = list(itertools.permutations(range(3)))
    law = dict.fromkeys(perms, 0.0)
    for order, perm in itertools.product(perms, perms):
        chance, free = 1 / 6, [0, 1, 2]
        for i in order:
            chance *= plan[i, perm[i]] / plan[i, free].sum()
            free.remove(perm[i])
        law[perm] += chance
    rng, own = generator(), Entropic(reg=0.3, tolerance=1e-9).plan(x, z)
    seen = Counter(tuple(own.draw(rng).tolist()) for _ in range(1000))
    assert scipy.stats.chisquare([seen[perm] for perm in perms], [1000 * law[perm] for perm in perms]).pvalue > 1e-3


def test_entropic_saves_less_the_warmer_it_is():
    x, z = pair(64)
    gains = [float(coupling_gain(x, z, Entropic(reg=reg)(x, z, generator=generator()))) for reg in (0.01, 0.1, 1.0)]
    assert float(coupling_gain(x, z, exact(x, z))) >= gains[0] > gains[1] > gains[2]


@pytest.mark.parametrize("shift", [0.0, 10.0], ids=["centred", "mean 10"])
@pytest.mark.parametrize("d", [2, 64, 4096])
def test_entropic_at_one_temperature_means_the_same_at_every_size_and_mean(d, shift):
    """At 0.1 it saves 0.89 to 0.94 of what exact saves, at 1 a third to a half."""
    x, z = pair(64, shape=(d,))
    best = float(coupling_gain(x, z, exact(x, z)))
    for reg, low, high in ((0.1, 0.85, 0.97), (1.0, 0.25, 0.6)):
        perm = Entropic(reg=reg)(3 * x + shift, z, generator=generator())
        assert low < float(coupling_gain(x, z, perm)) / best < high


@pytest.mark.parametrize("d", [2, 256])
def test_entropic_reaches_exact_as_the_temperature_falls(d):
    x, z = pair(32, shape=(d,))
    best = float(coupling_gain(x, z, exact(x, z)))
    saved = [
        float(coupling_gain(x, z, Entropic(reg=reg, max_iterations=50_000)(x, z, generator=generator()))) / best
        for reg in (0.3, 0.03, 0.003)
    ]
    assert saved == sorted(saved)
    assert saved[-1] > 0.99


def test_the_plan_says_how_far_it_got():
    x, z = pair(64)
    plan = Entropic(reg=0.1).plan(x, z)
    assert (plan.converged, plan.error <= 0.01) == (True, True)
    torch.testing.assert_close(torch.from_numpy(plan.weights.sum(1)), torch.full((64,), 1 / 64, dtype=torch.float64))
    hasty = Entropic(reg=1e-4, max_iterations=20)
    assert not hasty.plan(x, z).converged
    assert hasty.plan(x, z).iterations <= 40
    with pytest.warns(UserWarning, match="not converged after .* raise reg or max_iterations"):
        perm = hasty(x, z, generator=generator())
    assert perm.sort().values.tolist() == list(range(64))


def test_entropic_pairs_samples_that_are_all_the_same():
    x = torch.ones(8, 3)
    assert Entropic()(x, x, generator=generator()).sort().values.tolist() == list(range(8))


@pytest.mark.parametrize("coupler", COUPLERS, ids=name)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_named_by_sample(coupler, value, which):
    both = pair(9)
    both[which][3, 0, 1] = both[which][7, 1, 2] = value
    with pytest.raises(ValueError, match=f"{'xz'[which]} is NaN or infinite in sample 3, 7 of 9"):
        coupler(*both, labels=torch.zeros(9, dtype=torch.int64), generator=generator())


def test_entropic_needs_a_generator_and_a_temperature():
    with pytest.raises(ValueError, match=r"Entropic draws its permutation: pass a torch\.Generator"):
        Entropic()(*pair(2))
    with pytest.raises(ValueError, match=r"reg must be positive, got 0; .* use the coupler `exact`"):
        Entropic(reg=0)


# --- Within classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupler", [exact, Entropic(reg=1.0)], ids=name)
@given(labels=st.lists(st.integers(-2, 3), min_size=1, max_size=12))
def test_within_classes_never_crosses_a_class(coupler, labels):
    x, z = pair(len(labels))
    labels = torch.tensor(labels)
    perm = WithinClasses(coupler)(x, z, labels=labels, generator=generator())
    assert torch.equal(labels[perm], labels)


def test_within_classes_is_optimal_inside_each():
    x, z = pair(40)
    labels = torch.arange(40) % 3
    perm = WithinClasses()(x, z, labels=labels)
    for label in range(3):
        m = torch.nonzero(labels == label).squeeze(1)
        assert torch.equal(perm[m], m[exact(x[m], z[m])])


def test_within_one_class_is_the_coupler_itself():
    x, z = pair(20)
    assert torch.equal(WithinClasses()(x, z, labels=torch.full((20,), 7)), exact(x, z))


@pytest.mark.parametrize("labels", [None, torch.zeros(3, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)])
def test_within_classes_needs_a_label_for_each_sample(labels):
    with pytest.raises(ValueError, match=r"WithinClasses needs labels \[4\], got"):
        WithinClasses()(*pair(4), labels=labels)


# --- Gain ------------------------------------------------------------------------------------------------------------


def test_gain_is_one_minus_the_cost_over_the_mean_of_the_cost_matrix():
    x, z = pair(30)
    x = x + 0.5  # a mean, so that the cross term counts
    perm = exact(x, z)
    matrix = cost_matrix(x, z)
    expected = 1 - matrix[torch.arange(30), perm].mean() / matrix.mean()
    torch.testing.assert_close(coupling_gain(x, z, perm), expected)


def test_gain_averages_to_zero_over_all_permutations():
    x, z = pair(4)
    gains = [float(coupling_gain(x, z, torch.tensor(perm))) for perm in itertools.permutations(range(4))]
    assert np.mean(gains) == pytest.approx(0, abs=1e-7)


def test_gain_is_one_at_no_cost_and_near_zero_for_independent_noise():
    x, z = pair(4096, shape=(16,))
    shuffle = torch.randperm(4096, generator=generator(1))
    assert float(coupling_gain(x, x[shuffle], shuffle.argsort())) == pytest.approx(1, abs=1e-12)
    assert abs(float(coupling_gain(x, z, independent(x, z)))) < 0.02


@pytest.mark.parametrize("coupler", [independent, exact, Entropic(), WithinClasses()])
def test_of_no_samples_there_is_a_permutation_too(coupler):
    x = torch.zeros(0, 3)
    labels = torch.zeros(0, dtype=torch.long)
    perm = coupler(x, x, labels=labels, generator=torch.Generator().manual_seed(0))
    assert perm.shape == (0,)
    assert perm.dtype == torch.int64
