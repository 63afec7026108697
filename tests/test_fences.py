"""Clipping at Tukey's fences touches what is out of line, whatever its size, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import boxplot_stats
from torch import Tensor

from reference_trainer.data.latents import ImpulsiveOutliers
from reference_trainer.options import from_json, override, to_json
from reference_trainer.presets import digits
from robustcm.fences import ConditionalClip, TukeyClip


def latents(seed: int = 0, n: int = 400, ch: int = 3) -> Tensor:
    """Heavy-tailed, another centre and scale in each channel."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(2, (n, ch, 2, 2)) * 10.0 ** generator.uniform(-2, 2, (1, ch, 1, 1))
    return torch.as_tensor(x + generator.normal(size=(1, ch, 1, 1)))


@given(seed=st.integers(0, 10**6), k=st.sampled_from([0.0, 0.5, 1.5, 3.0]))
@settings(max_examples=25)
def test_what_is_left_is_what_matplotlibs_whiskers_enclose_and_the_rest_lies_on_the_fences(seed: int, k: float):
    x = latents(seed)
    clipped = TukeyClip(k=k)(x)
    for before, after in zip(x.unbind(1), clipped.unbind(1), strict=True):
        box = boxplot_stats(before.flatten().numpy(), whis=k)[0]
        iqr = box["q3"] - box["q1"]
        low, high = (torch.as_tensor(fence, dtype=x.dtype) for fence in (box["q1"] - k * iqr, box["q3"] + k * iqr))
        inside = (before >= low) & (before <= high)
        assert torch.equal(after[inside], before[inside])
        fences = torch.where(before > box["med"], high, low)
        torch.testing.assert_close(after[~inside], fences[~inside], rtol=1e-12, atol=0)


@given(seed=st.integers(0, 10**6), k=st.sampled_from([0.5, 1.5, 3.0]))
@settings(max_examples=25)
def test_clipping_twice_is_clipping_once(seed: int, k: float):
    once = TukeyClip(k=k)(latents(seed))
    torch.testing.assert_close(TukeyClip(k=k)(once), once, rtol=1e-12, atol=0)


@given(
    seed=st.integers(0, 10**6), scale=st.floats(-100, 100).filter(lambda s: abs(s) > 0.01), shift=st.floats(-100, 100)
)
@settings(max_examples=25)
def test_another_unit_or_origin_clips_the_same_values(seed: int, scale: float, shift: float):
    x, clip = latents(seed), TukeyClip()
    torch.testing.assert_close(clip(scale * x + shift), scale * clip(x) + shift, rtol=1e-9, atol=1e-9)


@given(size=st.floats(1e3, 1e30), seed=st.integers(0, 100))
@settings(max_examples=25)
def test_a_fifth_of_the_values_arbitrarily_wrong_moves_the_rest_nowhere_and_stays_bounded(size: float, seed: int):
    x = latents(seed).clamp(-1e4, 1e4)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.2
    clipped = TukeyClip()(torch.where(wrong, size * 1e5, x))
    clean = x.transpose(0, 1).flatten(1)
    q, extremes = torch.quantile(clean, torch.tensor([0.05, 0.99], dtype=x.dtype), dim=1), clipped.abs().amax((0, 2, 3))
    # Quartiles of the mixture lie between these two quantiles of the clean values, so the fences do so, widened.
    assert (extremes <= q.abs().amax(0) + 1.5 * (q[1] - q[0])).all()


def test_channels_do_not_see_each_other_and_a_channel_without_spread_is_left():
    x = latents(ch=3)
    alone = TukeyClip()(x[:, 1:2])
    assert torch.equal(TukeyClip()(x)[:, 1:2], alone)
    constant = torch.zeros(100, 1, 2, 2)
    constant[0] = 7.0
    assert torch.equal(TukeyClip()(constant), constant)


def test_nan_stays_for_the_normalisation_to_complain_about():
    x = latents().float()
    x[3, 1, 0, 0] = torch.nan
    assert TukeyClip()(x).isnan().sum() == 1
    assert ConditionalClip()(x) is x


def test_it_comes_behind_the_injected_outliers_and_is_an_option():
    config = override(override(digits(), "outliers=ImpulsiveOutliers(share=0.05)"), "clip=TukeyClip(k=3)")
    assert from_json(to_json(config)) == config
    x = latents().float()
    assert torch.equal(config.prepare_latents(x), TukeyClip(k=3)(ImpulsiveOutliers(share=0.05)(x)))
    plain = override(override(config, "clip=None"), "outliers=None")
    assert torch.equal(plain.prepare_latents(x), x)


def test_a_negative_k_is_refused():
    with pytest.raises(ValueError, match="k must be a finite number >= 0"):
        TukeyClip(k=-1)


# --- Given the rest of the sample -------------------------------------------------------------------------------------


def gaussian(seed: int = 0, n: int = 3000, d: int = 6) -> tuple[Tensor, Tensor]:
    """Gaussian samples ``[n, d, 1, 1]`` whose elements share a part of their variance, and their precision matrix."""
    generator = torch.Generator().manual_seed(seed)
    shared = 0.8 * float(torch.rand((), generator=generator))
    own, common = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, 1))
    covariance = (1 - shared) * torch.eye(d, dtype=torch.float64) + shared
    return ((1 - shared) ** 0.5 * own + shared**0.5 * common)[:, :, None, None] + 3, torch.linalg.inv(covariance)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_hardly_an_element_of_gaussian_samples_is_moved_and_the_others_stay_bit_for_bit(seed: int):
    x, precision = gaussian(seed)
    out = ConditionalClip()(x)
    moved = out != x
    assert moved.float().mean() < 2e-3
    mean = x.mean(0).flatten()
    y = out.flatten(1) - mean
    off = (y @ precision / precision.diagonal()).abs() * precision.diagonal().sqrt()
    assert (off < 6).all()  # what is left fits its sample


@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_an_outlier_is_put_where_the_gaussian_law_says_it_belongs(seed: int):
    x, precision = gaussian(seed)
    x[7, 2] += 1e3
    mean = x[8:].mean(0).flatten()
    others = torch.arange(6) != 2
    cross = precision[2][others] / precision[2, 2]
    expected = mean[2] - cross @ (x[7].flatten() - mean)[others]
    found = ConditionalClip(groups=1)(x)
    assert float(found[7, 2]) == pytest.approx(float(expected), abs=0.3 * float(precision[2, 2].rsqrt()))
    assert torch.equal(found[7, others], x[7, others])


def test_what_is_usual_among_all_but_not_in_its_sample_is_seen_by_this_clip_alone():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 1, generator=generator)
    x = (shared + 0.05 * torch.randn(2000, 5, generator=generator))[:, :, None, None]
    x[0, 1] = x[0, 0] + 1.0  # twenty of its conditional standard deviations, one of its marginal ones
    assert torch.equal(TukeyClip()(x)[0], x[0])
    found = ConditionalClip()(x)
    assert abs(float(found[0, 1] - found[0, 0])) < 0.2


def test_what_only_its_group_of_similar_samples_contradicts_is_seen_with_groups_alone():
    """Element 0 is +2 in the outer clusters and -2 in the middle one: no linear function of the others says which."""
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(3000) % 3
    x = torch.tensor([-3.0, 0.0, 3.0])[which][:, None].expand(-1, 6).clone()
    x[:, 0] = torch.tensor([2.0, -2.0, 2.0])[which]
    x = (x + 0.1 * torch.randn(x.shape, generator=generator))[:, :, None, None]
    bad = x.clone()
    bad[1, 0] = 2.0  # of the middle cluster
    assert torch.equal(ConditionalClip(groups=1)(bad)[1], bad[1])
    assert float(ConditionalClip()(bad)[1, 0]) == pytest.approx(-2.0, abs=0.4)


@given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
@settings(max_examples=15)
def test_another_unit_or_origin_changes_nothing_for_the_conditional_clip(scale: float, shift: float):
    x, _ = gaussian(n=400)
    x[:20, 1] *= 30
    clip = ConditionalClip()
    torch.testing.assert_close(clip(scale * x + shift), scale * clip(x) + shift, rtol=1e-5, atol=1e-5 * scale)


def test_injected_outliers_are_brought_nearer_to_the_truth_than_by_tukeys_fences():
    x = gaussian(n=4000)[0].float()
    bad = ImpulsiveOutliers(share=0.05)(x)
    error = {type(clip): float((clip(bad) - x).square().mean()) for clip in (ConditionalClip(), TukeyClip())}
    assert error[ConditionalClip] < 0.7 * error[TukeyClip] < 0.1 * float((bad - x).square().mean())


def test_fewer_samples_than_elements_and_constant_elements_are_no_obstacle():
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 2.0
    out = ConditionalClip()(x)
    assert out.isfinite().all()
    assert torch.equal(out[:, 0], x[:, 0])


def test_the_conditional_clip_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="up to 4096 latent elements, got 5000: use TukeyClip"):
        ConditionalClip()(torch.zeros(3, 5000, 1, 1))
    with pytest.raises(ValueError, match="groups must be"):
        ConditionalClip(groups=0)
