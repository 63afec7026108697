"""The scale c: the authors' numbers, and that the measured one is the quantile it claims to be, also while it moves."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustcm.scales import ConstantC, MeasuredC, PowerLawC
from robustcm.schedules import LevelPairs
from robustcm.sketch import LogHistogram


def pairs_of(num_levels: int, depth: Tensor | None = None, b: int = 1) -> LevelPairs:
    depth = torch.zeros(b) if depth is None else depth
    return LevelPairs(torch.full_like(depth, 2.0), torch.full_like(depth, 1.0), depth, num_levels)


def residuals(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()


# --- Scales that learn nothing ---------------------------------------------------------------------------------------


def test_constant_is_icts_at_the_size_of_the_paper():
    c = ConstantC()(torch.zeros(0), pairs_of(21), 4096)
    assert c == pytest.approx(0.00054 * 64)
    assert c == pytest.approx(0.0345, rel=2e-3)


# exp(-1.15 ln(N - 1) - 0.85), by hand
@pytest.mark.parametrize(("num_levels", "c"), [(11, 0.03456), (21, 0.013634), (41, 0.0061439), (641, 2.53363e-4)])
def test_power_law_gives_the_authors_numbers_at_the_size_of_the_paper(num_levels, c):
    assert PowerLawC()(torch.zeros(0), pairs_of(num_levels), 4096) == pytest.approx(c, rel=1e-4)


@pytest.mark.parametrize("d", [16, 256, 3072, 12288])
@pytest.mark.parametrize("num_levels", [11, 21, 641])
def test_ratio_of_power_law_to_constant_is_the_same_at_every_size(num_levels, d):
    def ratio(d):
        return PowerLawC()(torch.zeros(0), pairs_of(num_levels), d) / ConstantC()(
            torch.zeros(0), pairs_of(num_levels), d
        )

    assert ratio(d) == pytest.approx(ratio(4096))


@pytest.mark.parametrize("scale", [ConstantC(), PowerLawC()], ids=repr)
def test_what_learns_nothing_has_an_empty_state_that_observing_leaves_alone(scale):
    state = scale.init()
    assert state.numel() == 0
    assert scale.observe(state, torch.ones(1), pairs_of(11)) is state


# --- The measured scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [11, 641])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_first_measurement_is_numpys_quantile_within_the_stated_error(q, num_levels, device):
    scale, r, pairs = MeasuredC(q=q), residuals(1001), pairs_of(num_levels, b=1001)
    pairs = LevelPairs(*(v.to(device) for v in pairs[:3]), num_levels)
    state = scale.observe(scale.init(device), r.to(device), pairs)
    c = scale(state, pairs, 4096)
    assert c.shape == (1001,)
    assert c.dtype == torch.float32
    expected = np.quantile(r.numpy(), q, method="inverted_cdf")
    np.testing.assert_allclose(c.cpu(), expected, rtol=scale.histogram.relative_error * 1.001)


def test_scale_is_a_multiple_of_the_quantile():
    pairs, r = pairs_of(11, b=9), residuals(9)
    one, three = (m(m.observe(m.init(), r, pairs), pairs, 1) for m in (MeasuredC(), MeasuredC(multiple=3.0)))
    torch.testing.assert_close(three, 3 * one)


def test_scale_follows_a_shrinking_residual_within_a_few_half_lives():
    scale, pairs = MeasuredC(halflife_steps=10), pairs_of(11, b=64)
    state = scale.init()
    for step in range(50):
        state = scale.observe(state, residuals(64, seed=step), pairs)
    for step in range(50):
        state = scale.observe(state, 1e-3 * residuals(64, seed=step), pairs)
    assert scale(state, pairs, 1)[0].item() == pytest.approx(1e-3, rel=0.15)


def test_weight_of_an_observation_halves_in_a_half_life():
    scale, pairs = MeasuredC(halflife_steps=7), pairs_of(11)
    state = scale.observe(scale.init(), torch.tensor([1.0]), pairs)
    for _ in range(7):
        state = scale.observe(state, torch.zeros(0), pairs_of(11, b=0))
    assert state.sum().item() == pytest.approx(0.5)


def test_scale_follows_a_doubling_of_the_levels_at_once():
    scale = MeasuredC()
    state = scale.observe(scale.init(), residuals(999), pairs_of(11, b=999))
    before, after = scale(state, pairs_of(11), 1), scale(state, pairs_of(21), 1)
    torch.testing.assert_close(after, before / 2)


def test_scale_has_the_units_of_the_residual():
    scale, pairs, r = MeasuredC(), pairs_of(11, b=99), residuals(99)
    one, thousand = (scale(scale.observe(scale.init(), k * r, pairs), pairs, 1) for k in (1, 1000))
    torch.testing.assert_close(thousand, 1000 * one, rtol=2 * 0.02, atol=0)


def test_each_bin_of_depth_has_its_own_quantile():
    scale = MeasuredC(bins=4)
    depth = torch.arange(400) / 400
    r = residuals(400) * 10.0 ** torch.arange(4).repeat_interleave(100)
    pairs = pairs_of(401, depth)
    c = scale(scale.observe(scale.init(), r, pairs), pairs, 1)
    for k in range(4):
        members = slice(100 * k, 100 * k + 100)
        low, high = np.quantile(r[members], [0.495, 0.505], method="inverted_cdf")
        assert (c[members] == c[100 * k]).all()
        assert low * 0.98 <= c[100 * k].item() <= high * 1.021


def test_no_bin_falls_below_the_scale_of_all_where_that_is_asked():
    depth = torch.arange(400) / 400
    r = residuals(400) * 10.0 ** torch.arange(4).repeat_interleave(100)
    pairs = pairs_of(401, depth)
    own, pooled, both = (
        scale(scale.observe(scale.init(), r, pairs), pairs, 1)
        for scale in (MeasuredC(bins=4), MeasuredC(), MeasuredC(bins=4, at_least_pooled=True))
    )
    assert torch.equal(both, torch.maximum(own, pooled))
    assert ((both == own).any(), (both == pooled).any(), (own < pooled).any()) == (True, True, True)


def test_a_bin_never_seen_has_the_scale_of_all():
    scale = MeasuredC(bins=4, at_least_pooled=True)
    state = scale.observe(scale.init(), residuals(50), pairs_of(11, torch.zeros(50)))
    c = scale(state, pairs_of(11, torch.tensor([0.0, 0.9])), 1)
    assert c[0] == c[1]


def test_a_sample_always_has_a_scale_even_when_its_bin_was_empty_before():
    scale = MeasuredC(bins=8)
    state = scale.observe(scale.init(), residuals(3), pairs_of(11, torch.tensor([0.0, 0.1, 0.2])))
    pairs = pairs_of(11, torch.tensor([0.9]))
    c = scale(scale.observe(state, torch.tensor([5.0]), pairs), pairs, 1)
    assert c.item() == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("bins", [1, 4])
def test_order_of_the_batch_does_not_matter(bins, rng):
    scale, r, depth = MeasuredC(bins=bins), residuals(100), torch.rand(100, generator=rng)
    perm = torch.randperm(100, generator=rng)
    first = scale.observe(scale.init(), r, pairs_of(11, depth))
    assert torch.equal(first, scale.observe(scale.init(), r[perm], pairs_of(11, depth[perm])))


def test_observing_returns_a_new_state_without_gradient_and_leaves_the_old_one():
    scale, pairs = MeasuredC(), pairs_of(11, b=5)
    state = scale.observe(scale.init(), residuals(5), pairs)
    before = state.clone()
    new = scale.observe(state, residuals(5, seed=1).requires_grad_(), pairs)
    assert torch.equal(state, before)
    assert not torch.equal(new, before)
    assert not new.requires_grad


def test_state_survives_a_checkpoint_bit_exactly():
    scale, pairs = MeasuredC(bins=2), pairs_of(11, torch.rand(50, generator=torch.Generator().manual_seed(1)))
    state = scale.observe(scale.init(), residuals(50), pairs)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    r = residuals(50, seed=1)
    assert torch.equal(scale.observe(state, r, pairs), scale.observe(loaded, r, pairs))
    assert torch.equal(scale(state, pairs, 1), scale(loaded, pairs, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantC(per_sqrt_d=0), "per_sqrt_d must be a finite number .*, got 0"),
        (lambda: MeasuredC(multiple=-1), "multiple must be a finite number .*, got -1"),
        (lambda: MeasuredC(halflife_steps=math.nan), "halflife_steps must be a number > 0, or inf, got nan"),
        (lambda: MeasuredC(q=1.0), "q must be a finite number > 0 and < 1, got 1.0"),
        (lambda: MeasuredC(histogram=LogHistogram(1e-30, 1e3)), "histogram must reach from .*, got 1e-30 to 1000"),
        (lambda: MeasuredC(histogram=LogHistogram(2.0, 1e3)), "histogram must reach from .*, got 2.0 to 1000"),
        (lambda: MeasuredC(bins=10**6), r"bins must be a whole number in 1 \.\. \d+, got 1000000"),
        (lambda: PowerLawC(slope=math.nan), "slope must be a finite number"),
        (lambda: PowerLawC(offset=30.0), "offset must be a finite number"),
        (lambda: PowerLawC(constant_until=-1), "constant_until must be a whole number"),
        (lambda: MeasuredC(bins=0), r"bins must be a whole number in 1 \.\. \d+, got 0"),
    ],
)
def test_parameters_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
