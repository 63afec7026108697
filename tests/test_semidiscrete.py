"""A pairing with the whole data set: in one dimension the quantiles, everywhere each sample its share, no batch."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from robustcm.couplers import exact
from robustcm.semidiscrete import Pairing, Semidiscrete


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 200, d: int = 8) -> Tensor:
    return 0.5 * torch.randn(n, d, generator=generator(1))


@pytest.fixture(scope="module")
def pairing() -> Pairing:
    return Semidiscrete().fit(data(), generator())


def test_in_one_dimension_it_cuts_the_normal_law_at_its_quantiles():
    """The optimal map between laws on a line is the monotone one."""
    x = torch.tensor([[4.0], [-3.0], [0.3], [10.0], [0.2]])
    found = Semidiscrete(steps=200, draws_a_sample=400).fit(x, generator())
    z = torch.linspace(-3, 3, 4001)[:, None]
    cell = torch.from_numpy(scipy.stats.norm.cdf(z[:, 0].numpy()) * 5).floor()
    clear = torch.from_numpy(scipy.stats.norm.cdf(z[:, 0].numpy()) * 5 % 1)
    clear = (clear > 0.05) & (clear < 0.95)  # away from the cuts
    rank = x[:, 0].argsort().argsort()
    assert torch.equal(rank[found(z)][clear], cell[clear].long())


def test_every_sample_gets_its_share_of_the_noise(pairing):
    z = torch.randn(40_000, 8, generator=generator(5))
    share = torch.bincount(pairing(z), minlength=200) / 40_000
    assert abs(pairing.marginal_error) < 0.05
    assert share.min() > 0.4 / 200
    assert share.max() < 1.8 / 200


def test_without_a_fit_the_shares_are_far_from_equal():
    z = torch.randn(40_000, 8, generator=generator(5))
    share = torch.bincount(Pairing(data(), torch.zeros(200), math.nan)(z), minlength=200) / 40_000
    assert 200 * (share - 1 / 200).square().sum() > 0.3


def test_it_pairs_closer_than_a_batch_does(pairing):
    z = torch.randn(4096, 8, generator=generator(2))
    x = data()[torch.randint(200, (4096,), generator=generator(3))]
    own = (data()[pairing(z)] - z).square().sum(1).mean()
    inside = torch.cat([(a - b[exact(a, b)]).square().sum(1) for a, b in zip(x.split(64), z.split(64), strict=True)])
    assert own < inside.mean()


def test_a_noise_finds_its_sample_alone(pairing):
    z = torch.randn(50, 8, generator=generator(4))
    assert torch.equal(pairing(z), torch.cat([pairing(one[None]) for one in z]))


def test_a_constant_added_to_all_potentials_changes_nothing(pairing):
    z = torch.randn(500, 8, generator=generator(4))
    shifted = Pairing(pairing.x, pairing.potential + 3.0, 0.0)
    assert (shifted(z) == pairing(z)).float().mean() > 0.998  # rounding at the cuts


def test_a_fit_is_a_function_of_the_data_and_the_generator():
    first, again, other = (Semidiscrete(steps=4).fit(data(), generator(seed)).potential for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: Semidiscrete(steps=1), "steps must be a whole number in 2"),
        (lambda p: Semidiscrete(first_rate=0.1, last_rate=0.2), "first_rate must be at least last_rate"),
        (lambda p: Semidiscrete().fit(data(1), generator()), "need at least two samples to pair with, got 1"),
        (lambda p: Semidiscrete().fit(data() * math.nan, generator()), "x is NaN or infinite in sample 0, 1"),
        (lambda p: p(torch.full((3, 8), math.inf)), "z is NaN or infinite in sample 0, 1, 2 of 3"),
        (lambda p: Semidiscrete()(data(), data()), r"pairs with the whole data set: pairing = Semidiscrete\(\).fit"),
        (lambda p: p(torch.zeros(3, 4)), r"z must be noise of the samples' shape \[8\], got \[3, 4\]"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_a_line(pairing, call, message):
    with pytest.raises(ValueError, match=message):
        call(pairing)


@pytest.mark.parametrize("shift", [5.0, 50.0])
def test_a_constant_added_to_all_data_changes_no_pairing(pairing, shift: float):
    moved = Semidiscrete().fit(data() + shift, generator())
    z = torch.randn(500, 8, generator=generator(4))
    assert (moved(z) == pairing(z)).float().mean() > 0.97  # the data are rounded where they lie
    assert moved.marginal_error < 0.05


def test_a_pairing_keeps_no_graph_and_is_no_less_precise_in_autocast(pairing):
    assert not Semidiscrete(steps=2).fit(data().requires_grad_(), generator()).x.requires_grad
    z = torch.randn(500, 8, generator=generator(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pairing(z)
    assert torch.equal(inside, pairing(z))
