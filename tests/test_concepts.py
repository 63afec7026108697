"""The pictures of the concepts show what docs/concepts.md says, and the toys behind them are right."""

from __future__ import annotations

import pytest
import torch

from analysis import concepts
from analysis.toys import flow_path, guess, left_open, pairs, ring
from robustcm.couplers import exact
from robustcm.gates import Above
from robustcm.noise import NoiseRange


def test_the_ring_has_the_spread_the_library_expects():
    x, cluster = ring(20000, seed=1)
    assert x.std(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert cluster.bincount().tolist() == pytest.approx([2500] * 8, rel=0.1)


def test_the_guess_from_noise_that_hides_nothing_is_x_and_from_noise_that_hides_all_is_the_mean():
    x, _ = ring(4000, seed=0)
    assert left_open(x, pairs(x, 0.001, 0), 0.001) < 0.01
    assert left_open(x, pairs(x, 80.0, 0), 80.0) == pytest.approx(1, abs=0.05)


def test_the_guess_of_one_gaussian_is_wiener_s():
    generator = torch.Generator().manual_seed(0)
    x, z = 0.5 * torch.randn(2, 20000, 2, generator=generator)
    at = torch.tensor([[0.3, -0.2], [0.0, 0.4]])
    torch.testing.assert_close(guess(x, x + z, at, neighbours=800), at / 2, atol=0.05, rtol=0)


def test_pairs_below_a_gate_are_those_of_no_coupling():
    x, _ = ring(512, seed=0)
    assert torch.equal(pairs(x, 0.9, 0, exact, Above(1.0)), pairs(x, 0.9, 0))
    assert torch.equal(pairs(x, 1.1, 0, exact, Above(1.0)), pairs(x, 1.1, 0, exact))
    assert not torch.equal(pairs(x, 1.1, 0, exact), pairs(x, 1.1, 0))


def test_paths_begin_at_the_noise_and_end_in_the_data():
    x, _ = ring(4096, seed=0)
    start = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    paths = flow_path(x, pairs(x, 80.0, 0, exact), start, NoiseRange(sigma_min=0.02).levels(20))
    torch.testing.assert_close(paths[:, 0], start * 80 / 81)
    assert paths[:, -1].norm(dim=1).tolist() == pytest.approx([0.7] * 20, abs=0.2)


def test_a_finer_grid_shortens_the_temporal_difference_and_outlying_data_give_it_a_tail():
    numbers = list(concepts.temporal_differences(steps=150).numbers.values())
    coarse, fine, all_coarse, all_fine, ratio, tail, spoilt = numbers
    assert coarse > 2 * fine
    assert all_coarse > 2 * all_fine
    assert ratio > 10
    assert spoilt > 1.5 * tail


def test_c_far_below_stands_still_far_above_finds_the_mean_and_measured_finds_the_bulk():
    numbers = concepts.scale_c().numbers
    start, mean = numbers["distance from the middle of the bulk: start"], numbers["mean of all targets"]
    assert numbers["end, c far below"] == pytest.approx(start, rel=0.02)
    assert numbers["end, c far above"] == pytest.approx(mean, rel=0.05)
    assert numbers["end, c measured"] < 0.3 * mean


def test_nothing_passes_the_bound_of_nsln_and_a_learned_scale_lifts_it():
    numbers = concepts.norms().numbers
    assert numbers["behind NsLN"] < numbers["the most that NsLN lets through"] < numbers["behind a learned scale of 3"]
    assert numbers["behind a learned scale of 3"] == pytest.approx(3 * numbers["behind NsLN"], rel=1e-5)
    assert concepts.norms(1e6).numbers["behind NsLN"] == pytest.approx(numbers["the most that NsLN lets through"], 1e-3)
