"""Outliers, clips and pairings of latents on disk: functions of the entry, whatever is read with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import binom, norm
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PretrainedAutoencoder
from reference_trainer.data.latents import ImpulsiveOutliers, InMemory, WithOutliers
from reference_trainer.errors import UserError
from reference_trainer.networks import DiT
from reference_trainer.presets import ilct, on_data
from reference_trainer.run import RunFolder
from reference_trainer.training import start
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from reference_trainer.training.start import latents_of_run, new_latents
from robustcm.fences import ConditionalClip, TukeyClip
from robustcm.semidiscrete import Semidiscrete

CPU = torch.device("cpu")
RAW = 3 + 2 * torch.randn(300, 2, 4, 4, generator=torch.Generator().manual_seed(0))
MEAN = RAW.double().mean((0, 2, 3))


class Twice:
    """Latents are one colour channel of images half as large."""

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images[:, :1], 2)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=2).expand(-1, 3, -1, -1)


def load() -> Twice:
    return Twice()


def on(root: Path, latents: Tensor, **change: object) -> TrainConfig:
    """A tiny run on a store of ``latents``."""
    root.mkdir()
    save_file({"latents": latents}, root / "a.safetensors")
    config = replace(on_data(ilct(), root), autoencoder=PretrainedAutoencoder(load="test_stored_changes:load"))
    config = replace(config, network=DiT(width=8, layers=1, heads=2, patch=4), batch_size=16, steps=2, coupling_pool=1)
    return replace(config, **change)  # type: ignore[arg-type]


def correlated(n: int, seed: int = 0, d: int = 16) -> Tensor:
    """``[n, 1, 4, 4]``, half of whose variance the elements of a sample share."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = (torch.randn(n, k, generator=generator) for k in (1, d))
    return ((shared + own) * 0.5**0.5).reshape(n, 1, 4, 4)


def all_of(latents: object) -> Tensor:
    return latents.take(torch.arange(len(latents)))  # type: ignore[attr-defined, arg-type]


# Outliers


@settings(max_examples=20)
@given(seed=st.integers(0, 5), order=st.integers(0, 1000))
def test_the_same_elements_are_hit_in_whatever_order_they_are_read(seed: int, order: int):
    latents = WithOutliers(InMemory(RAW), ImpulsiveOutliers(share=0.1, seed=seed), MEAN)
    indices = torch.randint(len(RAW), (40,), generator=torch.Generator().manual_seed(order))
    assert torch.equal(latents.take(indices), all_of(latents)[indices])
    assert latents.take(indices[:0]).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_as_many_as_said_deviate_as_much_as_said(share: float):
    out = all_of(WithOutliers(InMemory(RAW), ImpulsiveOutliers(share=share, factor=7.0), MEAN))
    hit = out != RAW
    low, high = binom.interval(1 - 1e-6, RAW.numel(), share)
    assert low <= int(hit.sum()) <= high
    mean = MEAN.float().reshape(1, -1, 1, 1)
    torch.testing.assert_close((out - mean)[hit], 7 * (RAW - mean)[hit], rtol=1e-4, atol=1e-4)


def test_another_seed_hits_other_elements():
    one, two = (all_of(WithOutliers(InMemory(RAW), ImpulsiveOutliers(seed=seed), MEAN)) for seed in (0, 1))
    assert not torch.equal(one, two)


# The clip that is fitted


@pytest.mark.parametrize(("groups", "share"), [(1, 2e-4), (20, 3e-3)])
def test_on_what_it_is_fitted_on_it_is_nearly_the_clip_of_all_at_once(groups: int, share: float):
    x = ImpulsiveOutliers(share=0.01)(correlated(4000))
    clip = ConditionalClip(groups=groups)
    there, here = clip(x), clip.fit(x)(x)  # which reaches a little farther, for samples that it has not seen
    assert (x != there).float().mean() > 0.006
    assert ((there - here).abs() > 0.1).float().mean() < share


def test_of_samples_that_it_has_not_seen_it_moves_as_few_as_the_gaussian_law_says():
    fitted = ConditionalClip(k=3.0, groups=1).fit(correlated(80, d=16))  # 5 samples an element
    x = correlated(20_000, seed=1)
    share = float((fitted(x) != x).float().mean())
    assert share < 2 * 2 * norm.sf(3.0)


def test_of_samples_that_it_has_not_seen_it_takes_the_outliers_out():
    clean = correlated(5000, seed=1)
    x = ImpulsiveOutliers(share=0.01)(clean)
    out = ConditionalClip().fit(ImpulsiveOutliers(share=0.01)(correlated(4000)))(x)
    assert (out - clean).square().mean() < 0.15 * (x - clean).square().mean()


def test_each_sample_is_clipped_by_itself():
    x = ImpulsiveOutliers(share=0.05)(correlated(2000))
    fitted = ConditionalClip().fit(x)
    torch.testing.assert_close(fitted(x)[7:9], fitted(x[7:9]))
    assert fitted(x[:0]).shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (correlated(79), "5 samples an element or more, .* got 79 of 16"),
        (correlated(90).index_fill(0, torch.tensor([3]), torch.nan), "finite"),
    ],
)
def test_too_few_or_not_finite_samples_are_refused(x: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ConditionalClip().fit(x)


# In a run


@pytest.mark.parametrize("clip", [None, TukeyClip(), ConditionalClip()])
@pytest.mark.parametrize("outliers", [None, ImpulsiveOutliers(share=0.02)])
def test_a_run_on_a_store_is_normalised_behind_what_is_done_to_its_latents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clip: ConditionalClip | TukeyClip | None,
    outliers: ImpulsiveOutliers | None,
):
    monkeypatch.setattr(start, "FITTED_ON", 500)
    config = on(tmp_path / "store", 5 + 3 * correlated(1000), clip=clip, outliers=outliers)
    images = config.load_images(CPU)
    latents, space = latents_of_run(config, RunFolder(tmp_path / "run"), images, tmp_path, CPU)
    values = all_of(latents)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3)), torch.full((1,), 0.5), rtol=1e-3, atol=0)
    assert torch.equal(latents.take(torch.tensor([5, 5, 800])), values[[5, 5, 800]])
    kurtosis = float(((values / 0.5) ** 4).mean())
    assert (kurtosis > 6) == (outliers is not None and clip is None)
    again, same = latents_of_run(config, RunFolder(tmp_path / "run"), images, tmp_path, CPU)
    assert torch.equal(all_of(again), values)
    assert torch.equal(all_of(new_latents(config, images, tmp_path, CPU)[0]), values)
    assert torch.equal(same.std, space.std)
    said = capsys.readouterr().out
    assert ("ConditionalClip is fitted on 500 of 900 latents" in said) == isinstance(clip, ConditionalClip)


class Narrow(Twice):
    """One whose decoder has a convolution of one channel."""

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.conv2d(latents, torch.ones(3, 1, 1, 1))


def narrow() -> Narrow:
    return Narrow()


def test_channels_that_do_not_fit_the_decoder_are_one_line(tmp_path: Path):
    config = on(tmp_path / "store", torch.zeros(20, 2, 4, 4))
    config = replace(config, autoencoder=PretrainedAutoencoder(load="test_stored_changes:narrow"))
    with pytest.raises(UserError, match=r"test_stored_changes:narrow: decode.. failed on .* 2 channels") as refused:
        config.load_images(CPU)
    assert "\n" not in str(refused.value)


def test_a_small_store_is_paired_with_noise_as_latents_in_memory_are(tmp_path: Path):
    objective = replace(ilct().objective, coupler=Semidiscrete(steps=4))
    config = on(tmp_path / "store", correlated(60), objective=objective)
    run, images = RunFolder(tmp_path / "run"), config.load_images(CPU)
    latents, _ = latents_of_run(config, run, images, tmp_path, CPU)
    here, there = Batches(config, latents)(1), Batches(config, all_of(latents))(1)
    assert torch.equal(here.x, there.x)
    assert torch.equal(here.z, there.z)
    run.claim(config)
    assert train(config, run, images, tmp_path, CPU)
