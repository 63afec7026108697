"""A run with the skip that knows the covariance: what is measured, kept, resumed, sampled; and what cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PretrainedAutoencoder
from reference_trainer.data.gaussian_skip import GaussianSkip, Scalar, load_skip, save_skip, skip_for
from reference_trainer.data.latents import Changed, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.options import as_options, filled, from_json, override, to_json
from reference_trainer.presets import ilct, on_data
from reference_trainer.run import RunFolder
from reference_trainer.training import start
from reference_trainer.training.loop import train
from robustcm.flow_maps import FlowMapObjective
from robustcm.gaussian import Gaussian, LinearSkip, Turned, flow_gain, wiener_gain
from robustcm.noise import NoiseRange
from robustcm.preconditioning import Preconditioning, ScalarSkip
from robustcm.turning import Turning

CPU, SHAPE = torch.device("cpu"), (2, 4, 4)
QUICK = Turning(clusters=2, levels=5)


class Twice:
    """Latents are two colour channels of images half as large."""

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images[:, :2], 2)

    def decode(self, latents: Tensor) -> Tensor:
        images = nn.functional.interpolate(latents, scale_factor=2)
        return torch.cat([images, images[:, :1]], 1)


def load() -> Twice:
    return Twice()


def gaussian_latents(n: int = 300) -> Tensor:
    """``[n, 2, 4, 4]`` with correlated elements and a mean that differs by element."""
    z, mix = (torch.randn(m, 32, generator=torch.Generator().manual_seed(seed)) for seed, m in ((0, n), (1, 32)))
    return (z @ mix / 10 + torch.linspace(-0.5, 0.5, 32)).reshape(n, *SHAPE)


def on_store(root: Path, latents: Tensor, **change: object) -> TrainConfig:
    """A tiny run on a store of ``latents`` and their mirror images; every tenth is held out."""
    if not root.exists():
        root.mkdir(parents=True)
        save_file({"latents": latents, "latents_flip": latents.flip(3).contiguous()}, root / "a.safetensors")
    config = replace(on_data(ilct(), root), autoencoder=PretrainedAutoencoder(load="test_gaussian_skip:load"))
    network = DiT(width=8, layers=1, heads=2, patch=4)
    config = replace(config, network=network, batch_size=16, steps=6, save_every=2, clip=None, log_every=2)
    return replace(config, **change)  # type: ignore[arg-type]


def trained(config: TrainConfig, root: Path) -> RunFolder:
    run = RunFolder(root)
    with run.locked():
        run.claim(config)
        train(config, run, config.load_images(CPU), root / "cache", CPU)
    return run


def final(run: RunFolder) -> dict[str, Tensor]:
    found = run.latest_checkpoint()
    assert found is not None
    return found[1]


def test_a_run_resumes_bit_exactly_and_samples_with_the_numbers_it_was_trained_with(tmp_path: Path):
    config = on_store(tmp_path / "store", gaussian_latents(), preconditioning=GaussianSkip(rank=5, gain=QUICK))
    whole, stopped = trained(config, tmp_path / "whole"), trained(config, tmp_path / "stopped")
    kept = stopped.skip_file.read_bytes()
    stopped.checkpoints()[0].unlink()
    trained(config, tmp_path / "stopped")
    assert stopped.skip_file.read_bytes() == kept == whole.skip_file.read_bytes()
    assert all(torch.equal(there, final(whole)[name]) for name, there in final(stopped).items())
    model = load_model(whole, CPU)
    assert isinstance(model.skip, LinearSkip)
    assert isinstance(model.skip.gain, Turned)
    assert model.skip.gaussian.axes.shape == (32, 5)
    silent = replace(model, network=Silent())
    samples = silent.latents(250, (80.0,), 0)
    torch.testing.assert_close(samples, model.skip(80 * noise_of(silent), torch.full((250,), 80.0)))
    assert not torch.equal(samples, model.latents(250, (80.0,), 0))


class Silent(nn.Module):
    def forward(self, x: Tensor, *c_noise: Tensor) -> Tensor:
        return torch.zeros_like(x)


def noise_of(model: object) -> Tensor:
    """The noise that ``latents(250, ...)`` of seed 0 begins with."""
    seen: list[Tensor] = []

    class Recording(nn.Module):
        def forward(self, x: Tensor, *c_noise: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros_like(x)

    replace(model, network=Recording()).latents(250, (80.0,), 0)  # type: ignore[type-var]
    return seen[0] / Preconditioning().c_in(torch.tensor(80.0)) / 80


def test_gaussian_latents_are_sampled_right_by_a_network_that_gives_nothing(tmp_path: Path):
    config = on_store(tmp_path / "store", gaussian_latents(2000), preconditioning=GaussianSkip(gain=flow_gain), steps=1)
    model = load_model(trained(config, tmp_path / "run"), CPU)
    samples = replace(model, network=Silent()).latents(20_000, (80.0,), 0).flatten(1)
    raw = gaussian_latents(2000)[[i for i in range(2000) if i % 10 != 9]]
    data = model.space.normalise(raw).flatten(1)
    torch.testing.assert_close(samples.mean(0), data.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(data.T), rtol=0, atol=0.02)


@pytest.mark.parametrize("flips", [False, True])
def test_the_store_s_covariance_is_that_of_a_pass_over_the_latents(flips: bool, tmp_path: Path):
    config = on_store(tmp_path / "store", gaussian_latents())
    raw = replace(config.data, flips=flips).decoded(config.autoencoder, CPU).latents
    assert (raw.second_moments() is None) == flips  # what is kept is that of the latents alone
    space = LatentSpace.of(Twice(), raw.take(torch.arange(len(raw))))
    latents = Changed(raw, space.normalise)
    kept, passed = (skip_for(GaussianSkip(gain=flow_gain), latents, NoiseRange(), given) for given in (space, None))
    in_memory = Gaussian.fit(latents.take(torch.arange(len(latents))))
    for skip in (kept, passed):
        torch.testing.assert_close(skip.gaussian.variances, in_memory.variances, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(skip.gaussian.mean, in_memory.mean, rtol=1e-4, atol=1e-5)
        x, t = torch.randn(4, *SHAPE), torch.full((4,), 0.5)
        torch.testing.assert_close(skip(x, t), in_memory.flow(x, t), rtol=1e-3, atol=1e-4)


# --- What cannot be had ----------------------------------------------------------------------------------------------


def constant(latents: Tensor) -> Tensor:
    return torch.cat([latents[:, :1], latents[:, 1:].mean((2, 3), keepdim=True).expand(-1, 1, 4, 4)], 1)


@pytest.mark.parametrize(
    ("latents", "rank", "why"),
    [
        (gaussian_latents(32), None, "32 latents are too few for 32 components"),
        (gaussian_latents(5), 5, "5 latents are too few for 5 components"),
        (constant(gaussian_latents()), None, "15 of 32 principal components are constant"),
        (gaussian_latents().index_fill(0, torch.tensor([3]), torch.nan), None, "mean or covariance is NaN or infinite"),
        (torch.zeros(10, 1, 65, 64), 2, "latents of 4160 elements, and covariances are of 4096 at most"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line_and_is_the_scalar_skip(latents, rank, why, capsys):
    assert skip_for(GaussianSkip(rank=rank), latents, NoiseRange()) == ScalarSkip()
    said = capsys.readouterr().out.strip().splitlines()
    assert said == [f"preconditioning=GaussianSkip cannot be had ({why}): the run takes the scalar skip"]


def test_a_rank_spares_latents_that_are_few_and_components_that_are_constant():
    for latents in (gaussian_latents(20), constant(gaussian_latents())):
        assert isinstance(skip_for(GaussianSkip(rank=8, gain=QUICK), latents, NoiseRange()), LinearSkip)
    more_than_there_are = skip_for(GaussianSkip(rank=1000, gain=flow_gain), gaussian_latents(), NoiseRange())
    assert more_than_there_are.gaussian.axes.shape == (32, 32)


def test_a_run_that_takes_the_scalar_skip_is_that_with_the_scalar_skip_bit_for_bit(tmp_path: Path):
    few = gaussian_latents(34)  # 31 of them are trained on
    config = on_store(tmp_path / "store", few)
    plain = trained(config, tmp_path / "plain")
    fallen = trained(replace(config, preconditioning=GaussianSkip()), tmp_path / "fallen")
    assert not plain.skip_file.exists()
    assert all(torch.equal(there, final(plain)[name]) for name, there in final(fallen).items())
    assert load_model(fallen, CPU).skip == ScalarSkip()


def test_a_skip_that_is_missing_or_of_other_latents_is_refused(tmp_path: Path):
    asked = GaussianSkip(gain=QUICK)
    config = on_store(tmp_path / "store", gaussian_latents(), preconditioning=asked, steps=2)
    run = trained(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"axes.*or train anew|mean is .*or train anew"):
        load_skip(run.skip_file, asked, (1, 4, 4), NoiseRange())
    with pytest.raises(UserError, match=r"angles is .*or train anew"):
        load_skip(run.skip_file, GaussianSkip(gain=Turning(levels=9)), SHAPE, NoiseRange())
    run.skip_file.unlink()
    for again in (lambda: load_model(run, CPU), lambda: trained(config, tmp_path / "run")):
        with pytest.raises(UserError, match=r"skip\.safetensors.*; the run's weights mean nothing without it"):
            again()


def test_a_skip_that_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of a run that was stopped before its first checkpoint, or of the processes behind the first."""
    config = on_store(tmp_path / "store", gaussian_latents(), preconditioning=GaussianSkip(gain=flow_gain), steps=1)
    run = trained(config, tmp_path / "run")
    run.checkpoints()[0].unlink()
    monkeypatch.setattr(start, "skip_for", lambda *_: pytest.fail("measured again"))
    trained(config, tmp_path / "run")


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path):
    x, t = torch.randn(5, *SHAPE), torch.logspace(-2.6, 1.9, 5)
    for asked in (GaussianSkip(gain=QUICK), GaussianSkip(rank=3, gain=wiener_gain)):
        skip = skip_for(asked, gaussian_latents(), NoiseRange())
        save_skip(tmp_path / "skip.safetensors", skip)
        assert torch.equal(load_skip(tmp_path / "skip.safetensors", asked, SHAPE, NoiseRange())(x, t), skip(x, t))


# --- In the configuration --------------------------------------------------------------------------------------------


def test_it_is_typed_shown_and_kept_as_any_part():
    config = override(TrainConfig(), "preconditioning=GaussianSkip(rank=16, gain=Turning(clusters=8))")
    assert config.preconditioning == GaussianSkip(rank=16, gain=Turning(clusters=8))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    again = TrainConfig()
    for option in as_options(config):
        again = override(again, option)
    assert again == config
    assert override(config, "preconditioning.gain=flow_gain").preconditioning.gain is flow_gain


def test_a_configuration_of_an_earlier_version_has_the_scalar_skip():
    earlier = to_json(TrainConfig())
    del earlier["preconditioning"]
    assert from_json(filled(earlier)).preconditioning == Scalar() == from_json(earlier).preconditioning


def test_it_is_of_consistency_functions():
    with pytest.raises(ValueError, match="preconditioning=GaussianSkip is of consistency functions"):
        TrainConfig(objective=FlowMapObjective(), preconditioning=GaussianSkip())


def test_a_function_without_the_skip_it_asks_for_is_refused():
    with pytest.raises(ValueError, match="pass the skip of the run"):
        TrainConfig(preconditioning=GaussianSkip()).preconditioned(Silent())
