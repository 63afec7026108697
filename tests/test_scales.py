"""The scale c: the authors' numbers, and that the measured one is the quantile it claims to be, also while it moves."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustcm.scales import ConstantC, CSchedule, MeasuredC, PowerLawC
from robustcm.sketch import LogHistogram


def depths(b: int = 1) -> Tensor:
    return torch.zeros(b)


def observed(scale: CSchedule, r: Tensor, depth: Tensor | None = None, num_levels: int = 11, state=None) -> Tensor:
    """The state after a step with residuals ``r``."""
    depth = torch.zeros(len(r), device=r.device) if depth is None else depth
    state = scale.init(r.device) if state is None else state
    return scale.observe(state, scale.count(r, depth, num_levels))


def c_of(scale: CSchedule, state: Tensor, depth: Tensor | None = None, num_levels: int = 11, d: int = 1):
    """c where nothing of the present step matters: the state has seen something."""
    depth = torch.zeros(1, device=state.device) if depth is None else depth
    return scale(state, scale.count(depth.new_zeros(0), depth.new_zeros(0), num_levels), depth, num_levels, d)


def residuals(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()


# --- Scales that learn nothing ---------------------------------------------------------------------------------------


def test_constant_is_icts_at_the_size_of_the_paper():
    c = c_of(ConstantC(), torch.zeros(0), num_levels=21, d=4096)
    assert c == pytest.approx(0.00054 * 64)
    assert c == pytest.approx(0.0345, rel=2e-3)


# exp(-1.15 ln(N - 1) - 0.85), by hand
@pytest.mark.parametrize(("num_levels", "c"), [(11, 0.03456), (21, 0.013634), (41, 0.0061439), (641, 2.53363e-4)])
def test_power_law_gives_the_authors_numbers_at_the_size_of_the_paper(num_levels, c):
    assert c_of(PowerLawC(), torch.zeros(0), num_levels=num_levels, d=4096) == pytest.approx(c, rel=1e-4)


@pytest.mark.parametrize("d", [16, 256, 3072, 12288])
@pytest.mark.parametrize("num_levels", [11, 21, 641])
def test_ratio_of_power_law_to_constant_is_the_same_at_every_size(num_levels, d):
    def ratio(d):
        law, constant = (c_of(c, torch.zeros(0), num_levels=num_levels, d=d) for c in (PowerLawC(), ConstantC()))
        return law / constant

    assert ratio(d) == pytest.approx(ratio(4096))


@pytest.mark.parametrize("scale", [ConstantC(), PowerLawC()], ids=repr)
def test_what_learns_nothing_has_an_empty_state_that_observing_leaves_alone(scale):
    state = scale.init()
    assert state.numel() == 0
    assert scale.observe(state, scale.count(torch.ones(1), depths(), 11)) is state


# --- The measured scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [11, 641])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_first_measurement_is_numpys_quantile_within_the_stated_error(q, num_levels, device):
    scale, r = MeasuredC(q=q), residuals(1001).to(device)
    depth = torch.zeros(1001, device=device)
    c = scale(scale.init(device), scale.count(r, depth, num_levels), depth, num_levels, 4096)
    assert c.shape == (1001,)
    assert c.dtype == torch.float32
    expected = np.quantile(r.cpu().numpy(), q, method="inverted_cdf")
    np.testing.assert_allclose(c.cpu(), expected, rtol=scale.histogram.relative_error * 1.001)


def test_scale_is_a_multiple_of_the_quantile():
    one, three = (c_of(m, observed(m, residuals(9))) for m in (MeasuredC(), MeasuredC(multiple=3.0)))
    torch.testing.assert_close(three, 3 * one)


def test_scale_follows_a_shrinking_residual_within_a_few_half_lives():
    scale = MeasuredC(halflife_steps=10)
    state = scale.init()
    for size in (1.0, 1e-3):
        for step in range(50):
            state = observed(scale, size * residuals(64, seed=step), state=state)
    assert c_of(scale, state).item() == pytest.approx(1e-3, rel=0.15)


def test_weight_of_an_observation_halves_in_a_half_life():
    scale = MeasuredC(halflife_steps=7)
    state = observed(scale, torch.tensor([1.0]))
    for _ in range(7):
        state = observed(scale, torch.zeros(0), state=state)
    assert state[:, :-1].sum().item() == pytest.approx(0.5)


def test_scale_follows_a_doubling_of_the_levels_at_once():
    scale = MeasuredC()
    state = observed(scale, residuals(999))
    torch.testing.assert_close(c_of(scale, state, num_levels=21), c_of(scale, state) / 2)


def test_scale_has_the_units_of_the_residual():
    scale, r = MeasuredC(), residuals(99)
    one, thousand = (c_of(scale, observed(scale, k * r)) for k in (1, 1000))
    torch.testing.assert_close(thousand, 1000 * one, rtol=2 * 0.02, atol=0)


def test_c_of_a_step_comes_from_the_state_before_it():
    scale = MeasuredC()
    state = observed(scale, residuals(99))
    now = scale.count(1e6 * residuals(99), depths(99), 11)
    assert torch.equal(scale(state, now, depths(), 11, 1), c_of(scale, state))


def test_c_of_the_first_step_comes_from_its_own_residuals():
    scale, r = MeasuredC(), residuals(99)
    first = scale(scale.init(), scale.count(r, depths(99), 11), depths(), 11, 1)
    assert torch.equal(first, c_of(scale, observed(scale, r)))


def test_each_bin_of_depth_has_its_own_quantile():
    scale = MeasuredC(bins=4)
    depth = torch.arange(400) / 400
    r = residuals(400) * 10.0 ** torch.arange(4).repeat_interleave(100)
    c = c_of(scale, observed(scale, r, depth, 401), depth, 401)
    for k in range(4):
        members = slice(100 * k, 100 * k + 100)
        low, high = np.quantile(r[members], [0.495, 0.505], method="inverted_cdf")
        assert (c[members] == c[100 * k]).all()
        assert low * 0.98 <= c[100 * k].item() <= high * 1.021


def test_no_bin_falls_below_the_scale_of_all_where_that_is_asked():
    depth = torch.arange(400) / 400
    r = residuals(400) * 10.0 ** torch.arange(4).repeat_interleave(100)
    own, pooled, both = (
        c_of(scale, observed(scale, r, depth, 401), depth, 401)
        for scale in (MeasuredC(bins=4), MeasuredC(), MeasuredC(bins=4, at_least_pooled=True))
    )
    assert torch.equal(both, torch.maximum(own, pooled))
    assert ((both == own).any(), (both == pooled).any(), (own < pooled).any()) == (True, True, True)


@pytest.mark.parametrize("at_least_pooled", [False, True])
def test_a_bin_never_seen_has_the_scale_of_all(at_least_pooled):
    scale = MeasuredC(bins=4, at_least_pooled=at_least_pooled)
    state = observed(scale, residuals(50), torch.zeros(50))
    c = c_of(scale, state, torch.tensor([0.0, 0.9]))
    assert c[0] == c[1]
    assert c.isfinite().all()


@pytest.mark.parametrize("bins", [1, 4])
def test_order_of_the_batch_does_not_matter(bins, rng):
    scale, r, depth = MeasuredC(bins=bins), residuals(100), torch.rand(100, generator=rng)
    perm = torch.randperm(100, generator=rng)
    assert torch.equal(observed(scale, r, depth), observed(scale, r[perm], depth[perm]))


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_counts_of_the_parts_of_a_step_add_up_to_those_of_the_whole(parts, rng):
    scale, r, depth = MeasuredC(bins=4), residuals(64), torch.rand(64, generator=rng)
    pieces = zip(r.chunk(parts), depth.chunk(parts), strict=True)
    assert torch.equal(sum(scale.count(*piece, 11) for piece in pieces), scale.count(r, depth, 11))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_sum_of_the_state_over_ranks_by_mistake_changes_nothing(ranks):
    scale, r = MeasuredC(bins=4), residuals(40)
    depth = torch.arange(40) / 40
    state = observed(scale, r, depth)
    summed = sum(state for _ in range(ranks))
    assert torch.equal(c_of(scale, summed, depth), c_of(scale, state, depth))
    after, expected = (observed(scale, residuals(40, seed=1), depth, state=s) for s in (summed, state))
    torch.testing.assert_close(after, expected, rtol=1e-15, atol=0)


def test_residuals_that_are_not_finite_are_not_counted():
    scale, r = MeasuredC(), residuals(9)
    bad = torch.cat([r, torch.tensor([math.nan, math.inf])])
    assert torch.equal(scale.count(bad, depths(11), 11), scale.count(r, depths(9), 11))


def test_observing_returns_a_new_state_without_gradient_and_leaves_the_old_one():
    scale = MeasuredC()
    state = observed(scale, residuals(5))
    before = state.clone()
    new = observed(scale, residuals(5, seed=1).requires_grad_(), state=state)
    assert torch.equal(state, before)
    assert not torch.equal(new, before)
    assert not new.requires_grad


def test_state_survives_a_checkpoint_bit_exactly():
    scale, depth = MeasuredC(bins=2), torch.rand(50, generator=torch.Generator().manual_seed(1))
    state = observed(scale, residuals(50), depth)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    after = [observed(scale, residuals(50, seed=1), depth, state=s) for s in (state, loaded)]
    assert torch.equal(*after)
    assert torch.equal(c_of(scale, state, depth), c_of(scale, loaded, depth))


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
