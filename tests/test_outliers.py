"""Injected outliers are as many and as large as said, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from reference_trainer.data.latents import ImpulsiveOutliers
from reference_trainer.options import from_json, override, to_json
from reference_trainer.presets import digits

RAW = 3 + 2 * torch.randn(300, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.001, 0.01, 0.05, 0.5]), seed=st.integers(0, 5))
def test_the_share_is_a_draw_from_the_binomial_law(share: float, seed: int):
    moved = int((ImpulsiveOutliers(share=share, seed=seed)(RAW) != RAW).sum())
    low, high = binom.interval(1 - 1e-9, RAW.numel(), share)
    assert low <= moved <= high


def test_a_hit_element_deviates_from_its_channels_mean_ten_times_as_much_and_others_are_left_bit_for_bit():
    out = ImpulsiveOutliers(share=0.05)(RAW)
    hit = out != RAW
    mean = RAW.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close((out - mean)[hit], 10 * (RAW - mean)[hit], rtol=1e-4, atol=1e-4)
    assert torch.equal(out[~hit], RAW[~hit])


def test_the_outliers_are_a_function_of_the_seed():
    assert torch.equal(ImpulsiveOutliers()(RAW), ImpulsiveOutliers()(RAW))
    assert not torch.equal(ImpulsiveOutliers()(RAW), ImpulsiveOutliers(seed=1)(RAW))


def test_they_are_an_option_and_survive_json():
    config = override(digits(), "outliers=ImpulsiveOutliers(share=0.05)")
    assert config.outliers == ImpulsiveOutliers(share=0.05)
    assert from_json(to_json(config)) == config
    assert override(config, "outliers=None").outliers is None


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match="share"):
        ImpulsiveOutliers(share=1.5)
