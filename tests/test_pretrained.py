"""Runs that start from networks of diffusers: what they begin as, what is noted of them, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    CMStochasticIterativeScheduler,
    ConfigMixin,
    ConsistencyModelPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from of_diffusers import FILE, SHAPE, change, saved, started, unet
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.commands.train import about_pretrained
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Pixels
from reference_trainer.data.latents import GivenStatistics, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.model import build_network
from reference_trainer.options import as_options, from_json, override, to_json
from reference_trainer.presets import digits, flow_map, on_data
from reference_trainer.pretrained import FromDiffusers
from reference_trainer.run import RunFolder
from reference_trainer.training.start import training_latents
from reference_trainer.training.state import TrainState
from robustcm.consistency import Preconditioned, sample

CPU = torch.device("cpu")


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(4, *SHAPE, generator=rng)


# Consistency models


@pytest.mark.parametrize("of_pipeline", [True, False])
def test_a_bare_unet_is_f_itself(of_pipeline: bool, tmp_path: Path, x: Tensor):
    root = saved(tmp_path)
    c_noise = torch.tensor([-1500.0, -3.25, 0.0, 1095.5])
    network = started(root if of_pipeline else root / "unet")
    assert torch.equal(network(x, c_noise), unet()(x, c_noise).sample)


def test_openai_s_consistency_models_draw_here_what_they_draw_in_diffusers(tmp_path: Path, rng: torch.Generator):
    saved(tmp_path, CMStochasticIterativeScheduler(num_train_timesteps=40), num_class_embeds=5)
    z, labels = torch.randn(4, *SHAPE, generator=rng), torch.tensor([0, 1, 4, 4])
    pipe = ConsistencyModelPipeline(unet(num_class_embeds=5), CMStochasticIterativeScheduler(num_train_timesteps=40))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(4, latents=z, class_labels=labels, output_type="pt").images
    f = Preconditioned(started(tmp_path, classes=5))
    ours = LatentSpace.of(Pixels(), z, GivenStatistics()).undo(sample(f, z, conditions={"labels": labels}))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-5)


def test_told_of_no_class_it_is_told_the_mean_of_all(tmp_path: Path, x: Tensor):
    saved(tmp_path, num_class_embeds=5)
    network, t = started(tmp_path, classes=5), torch.zeros(len(x))
    other = unet(num_class_embeds=5)
    other.class_embedding.weight.copy_(other.class_embedding.weight.mean(0).expand(5, -1))
    torch.testing.assert_close(network(x, t), other(x, t, torch.zeros(len(x), dtype=torch.long)).sample)


def test_a_table_with_one_row_more_is_one_of_our_own_whose_last_says_no_class(tmp_path: Path, x: Tensor):
    saved(tmp_path, num_class_embeds=5)
    network, t = started(tmp_path, classes=4), torch.zeros(len(x))
    assert torch.equal(network(x, t), unet(num_class_embeds=5)(x, t, torch.full((len(x),), 4)).sample)


def test_classes_that_it_never_knew_change_nothing_at_the_start(tmp_path: Path, x: Tensor):
    network, t = started(saved(tmp_path), classes=3), torch.ones(len(x))
    torch.testing.assert_close(network(x, t, labels=torch.tensor([0, 1, 2, 3])), unet()(x, t).sample)


def test_a_network_of_two_times_starts_a_flow_map(tmp_path: Path, x: Tensor):
    saved(tmp_path, class_embed_type="timestep")
    t, r = torch.linspace(1, 250, len(x)), torch.linspace(0, 40, len(x))
    for classes in (0, 2):
        network = started(tmp_path, classes=classes, base=flow_map())
        torch.testing.assert_close(network(x, t, r), unet(class_embed_type="timestep")(x, t, r).sample)


def test_the_average_begins_there_too_and_a_checkpoint_needs_no_folder(tmp_path: Path):
    config = replace(TrainConfig(), network=FromDiffusers(name=str(saved(tmp_path / "it")))).found()
    state = TrainState.create(config, SHAPE, CPU)
    for name, tensor in unet().state_dict().items():
        assert torch.equal(state.network.state_dict()[f"network.{name}"], tensor)
        assert torch.equal(state.ema.state_dict()[f"network.{name}"], tensor)
    shutil.rmtree(tmp_path / "it")
    other = TrainState.create(config, SHAPE, CPU, begin=False)
    assert other.network.state_dict().keys() == state.network.state_dict().keys()


# What is noted


def test_it_is_noted_where_from_and_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(saved(tmp_path / "it", DDPMScheduler()).parent)
    config = override(override(digits(), "network=FromDiffusers(name='it')"), "statistics=GivenStatistics").found()
    noted = config.network
    assert isinstance(noted, FromDiffusers)
    assert noted.name == str(tmp_path / "it")
    assert len(noted.sha256) == 64
    assert json.loads(noted.model)["block_out_channels"] == [8, 16]
    assert json.loads(noted.scheduler)["beta_schedule"] == "linear"
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    again = digits()
    for option in as_options(config):
        again = override(again, option)
    assert again == config == config.found()


@pytest.mark.parametrize(
    "noted", ["[]", "{", '{"in_channels": 3}', '{"in_channels": 3, "out_channels": 3, "block_out_channels": 8}']
)
def test_what_is_noted_and_makes_no_sense_is_one_line(noted: str):
    config = replace(digits(), network=FromDiffusers(name="a/b", model=noted))
    with pytest.raises(UserError, match=r"^network: ") as caught:
        build_network(config, SHAPE)
    assert "\n" not in str(caught.value)


def test_other_weights_are_another_configuration_and_no_beginning(tmp_path: Path):
    asked = replace(digits(), network=FromDiffusers(name=str(saved(tmp_path / "it"))))
    config, run = asked.found(), RunFolder(tmp_path / "run")
    run.claim(config)
    change(tmp_path / "it", lambda tensors: tensors["conv_in.bias"].add_(1e-6))
    with pytest.raises(UserError, match=r"network\.sha256: "):
        run.claim(asked.found())
    with pytest.raises(UserError, match=r"has other weights than when the run was begun \(sha256 "):
        build_network(config, SHAPE, begin=True)


@pytest.mark.parametrize("place", ["scheduler", "root", "beside unet"])
def test_wherever_a_pipeline_keeps_its_scheduler_it_is_found(place: str, tmp_path: Path):
    saved(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path if place == "root" else tmp_path / "scheduler")
    if place == "root":  # as google/ddpm-cifar10-32 has it, network and all
        for file in (tmp_path / "unet").iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / "unet").rmdir()
    found = FromDiffusers(name=str(tmp_path / "unet" if place == "beside unet" else tmp_path)).found()
    assert found.subfolder == ("unet" if place == "scheduler" else "")
    assert "a diffusion model (epsilon, 1000 timesteps) turned into F" in found.in_words


@pytest.mark.parametrize("at_root", [False, True])
def test_on_the_hub_the_network_is_looked_for_in_unet_and_at_the_root(
    at_root: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hub is played by a folder."""
    saved(tmp_path, None if at_root else DDPMScheduler())
    if at_root:
        DDPMScheduler().save_pretrained(tmp_path)
        for file in (tmp_path / "unet").iterdir():
            file.rename(tmp_path / file.name)
    load_config, from_pretrained = ConfigMixin.load_config.__func__, UNet2DModel.from_pretrained.__func__

    def of_folder(load: Any) -> Any:
        def loads(cls: Any, name: Any, **options: Any) -> Any:
            folder = tmp_path / (options.pop("subfolder", None) or "") if name == "some/network" else Path(name)
            if not (folder / cls.config_name).exists() and not (folder / "config.json").exists():
                raise OSError(f"some/network does not appear to have a file named {cls.config_name}.")
            options.pop("revision", None)
            return load(cls, folder, **options)

        return classmethod(loads)

    monkeypatch.setattr(ConfigMixin, "load_config", of_folder(load_config))
    monkeypatch.setattr(AutoModel, "load_config", of_folder(load_config))
    monkeypatch.setattr(UNet2DModel, "from_pretrained", of_folder(from_pretrained))
    found = FromDiffusers(name="some/network").found()
    assert (found.name, found.subfolder) == ("some/network", "" if at_root else "unet")
    assert found.diffusion is not None


# What is refused


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("conv_in.weight"), r"1 missing \(conv_in.weight\)"),
        (lambda t: t.update({"more": torch.ones(2)}), r"1 unexpected \(more\)"),
        (lambda t: t.update({"conv_in.bias": torch.ones(3)}), "conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(edit: Callable, message: str, tmp_path: Path):
    change(saved(tmp_path), edit)
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused(tmp_path: Path):
    (saved(tmp_path) / FILE).rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"network .*are a pickle \(diffusion_pytorch_model.bin\).*never loaded"):
        started(tmp_path)


def test_what_is_no_unet_is_refused(tmp_path: Path):
    saved(tmp_path)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=r"AutoencoderKL, which is no network of diffusers .*: name a UNet2DModel"):
        started(tmp_path)


@pytest.mark.parametrize(
    ("options", "scheduler", "classes", "base", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, None, 0, None, "takes 4 channels and gives 4, the latents have 3"),
        ({"out_channels": 6}, None, 0, None, "takes 3 channels and gives 6"),
        ({"num_class_embeds": 7}, None, 0, None, "told of 7 classes, the run is trained without classes"),
        ({"num_class_embeds": 7}, None, 3, None, "told of 7 classes, the run is trained by class on 3"),
        ({}, None, 0, flow_map(), "told one time, flow maps and trajectories need two"),
        ({}, DDPMScheduler(), 0, flow_map(), "told one time, flow maps and trajectories need two"),
        ({"class_embed_type": "timestep"}, None, 0, None, "more than a time and a class"),
        ({"time_embedding_type": "fourier"}, None, 0, None, "its time embedding is 'fourier'"),
        ({}, FlowMatchEulerDiscreteScheduler(), 0, None, "beside FlowMatchEulerDiscreteScheduler .* is no"),
        ({}, EulerDiscreteScheduler(timestep_type="continuous"), 0, None, "told a logarithm of the noise"),
        ({}, DDPMScheduler(trained_betas=[0.0, 0.1, 0.2]), 0, None, "noise does not rise"),
        ({}, DDPMScheduler(num_train_timesteps=1), 0, None, "noise does not rise"),
        ({}, CMStochasticIterativeScheduler(sigma_data=1.0), 0, None, "has sigma_data 1.0, here it is 0.5"),
        ({"block_out_channels": (8, 8, 8, 8, 8), "down_block_types": ("DownBlock2D",) * 5,
          "up_block_types": ("UpBlock2D",) * 5}, None, 0, None, "multiples of 16, these are 8x8"),
    ],
)  # fmt: skip
def test_what_training_cannot_start_from_is_refused_in_a_line(
    options: dict[str, Any], scheduler: Any, classes: int, base: TrainConfig | None, message: str, tmp_path: Path
):
    saved(tmp_path, scheduler, **options)
    with pytest.raises(UserError, match=message) as caught:
        started(tmp_path, classes, base)
    assert "\n" not in str(caught.value)


def test_betas_that_diffusers_does_not_know_are_one_line(tmp_path: Path):
    saved(tmp_path, DDPMScheduler())
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"linear"', '"cubic"'))
    with pytest.raises(UserError, match="betas make no sense: NotImplementedError cubic is not"):
        started(tmp_path)


def test_beside_a_skip_that_knows_the_covariance_it_would_be_another_function():
    for order in (("network", "preconditioning"), ("preconditioning", "network")):
        parts = {"network": "FromDiffusers(name='a/b')", "preconditioning": "GaussianSkip"}
        config = override(digits(), f"{order[0]}={parts[order[0]]}")
        with pytest.raises(UserError, match="F beside the scalar skip: take preconditioning=Scalar"):
            override(config, f"{order[1]}={parts[order[1]]}")


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"network nobody/no-such-network.*: .*hub it cannot be had") as caught:
        FromDiffusers(name="nobody/no-such-network").found()
    assert "\n" not in str(caught.value)


# Statistics that are given


def test_given_statistics_leave_pixels_as_they_are(x: Tensor):
    space = LatentSpace.of(Pixels(), x, GivenStatistics())
    assert torch.equal(space.normalise(x), x)
    assert torch.equal(space.undo(x), x)


def test_they_are_one_for_all_or_one_each(x: Tensor):
    space = LatentSpace.of(Pixels(), x, GivenStatistics(mean=(1.0, 2.0, 3.0), std=(2.0,)))
    torch.testing.assert_close(space.normalise(x), (x - torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)) / 4)
    with pytest.raises(UserError, match=r"statistics.std has 2 numbers for 3 channels"):
        LatentSpace.of(Pixels(), x, GivenStatistics(std=(1.0, 2.0)))


@pytest.mark.parametrize("changes", [{"std": (0.0,)}, {"std": ()}, {"mean": (float("nan"),)}, {"mean": ()}], ids=str)
def test_statistics_that_cannot_be_are_refused_by_name(changes: dict[str, Any]):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        GivenStatistics(**changes)


def test_of_another_number_of_channels_they_are_refused_before_all_images_are_encoded(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("reference_trainer.training.start.encode_once", None)
    config = replace(on_data(digits(), image_folder), autoencoder=PixelSpace())
    config = replace(config, statistics=GivenStatistics(mean=(0.0, 1.0)))
    with pytest.raises(UserError, match=r"statistics.mean has 2 numbers for 3 channels"):
        training_latents(config, config.load_images(CPU), tmp_path, CPU)


# What is said of it


def said_of(root: Path, *options: str) -> list[str]:
    config = override(digits(), f"network=FromDiffusers(name='{root}')")
    for option in options:
        config = override(config, option)
    return about_pretrained(config.found())


def test_it_is_said_by_what_its_data_are_normalised_and_how_to_give_what_it_was_trained_on(tmp_path: Path):
    saved(tmp_path / "it", CMStochasticIterativeScheduler())
    network, own = said_of(tmp_path / "it")
    assert "F of a consistency model" in network
    assert own.startswith("its data are normalised by their own mean and std, channel by channel")
    assert "give these, statistics='GivenStatistics(mean=(...), std=(...))', or for pixels" in own
    for option, said in (
        ("GivenStatistics", "mean (0.0,), std (0.5,)"),
        ("GivenStatistics(mean=(0.1,), std=(2.0, 1.0, 1.0))", "mean (0.1,), std (2.0, 1.0, 1.0)"),
    ):
        _, given = said_of(tmp_path / "it", f"statistics={option}")
        assert given == f"its data are normalised by what is given: {said}, which becomes 0.5"


def test_norms_of_another_function_are_said_and_how_to_have_its_own(tmp_path: Path):
    saved(tmp_path / "it")
    *_, norms = said_of(tmp_path / "it", "non_scaling_norm=True")
    assert "it begins as another function; as itself with non_scaling_norm=False" in norms
    assert "function" not in said_of(tmp_path / "it", "non_scaling_norm=False")[-1]
    assert about_pretrained(digits()) == []


# From end to end


def test_a_run_starts_from_an_export_of_a_run_and_outlives_the_folder(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "it", CMStochasticIterativeScheduler())
    words = ["--data", str(image_folder), "--device=cpu", "--brief", "steps=1", "batch_size=4", "coupling_pool=1"]
    words += ["data.resolution=8", "autoencoder=PixelSpace", "statistics=GivenStatistics", "clip=None"]
    first, second, out = (str(tmp_path / name) for name in ("first", "second", "out"))
    assert main([*words, f"network=FromDiffusers(name='{tmp_path / 'it'}')", "--out", first]) == 0
    assert main(["export", first, "--out", out, "--device=cpu"]) == 0
    begun = capsys.readouterr().out
    assert "its data are normalised by what is given" in begun
    assert "begins as another function" not in begun
    norms = ["non_scaling_norm=True", "--out", second]
    assert main([*words, f"network=FromDiffusers(name='{out}')", *norms]) == 0
    assert "begins as another function" in capsys.readouterr().out
    shutil.rmtree(out)
    assert main([*words, f"network=FromDiffusers(name='{out}')", *norms]) == 0  # the same command again
    assert main([*words, f"network=FromDiffusers(name='{out}',patch=2)", *norms]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["sample", second, "--n", "4", "--device=cpu"]) == 0
    config = RunFolder(tmp_path / "second").config()
    assert config.autoencoder == PixelSpace()
    assert isinstance(config.network, FromDiffusers)
    assert json.loads(config.network.scheduler)["_class_name"] == "CMStochasticIterativeScheduler"
