"""The analysis scripts measure what they say, of the runs and autoencoders that they are given."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import baselines, c_schedules, inputs, loss_shapes, td_outliers, values
from reference_trainer import __main__ as trainer
from reference_trainer.commands.train import configuration
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.images import to_unit
from reference_trainer.model import load_model
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import with_measured_gate
from reference_trainer.training.start import training_latents
from robustcm.couplers import WithinClasses
from robustcm.gates import everywhere
from robustcm.losses import cauchy, cauchy_of_r2, pseudo_huber, sample_r2
from robustcm.scales import ConstantC
from robustcm.tails.advice import advise

ROOT = Path(__file__).parents[1]


CPU = torch.device("cpu")


class Doubling:
    """An autoencoder of the user's: the image at half size, three channels, one value NaN if asked."""

    def __init__(self, nan: bool = False) -> None:
        self.nan = nan

    def encode(self, images):
        latents = torch.nn.functional.avg_pool2d(images, 2) + 0.01 * torch.randn(
            len(images), 3, 4, 4, generator=torch.Generator().manual_seed(0)
        )
        if self.nan:
            latents[0, 0, 0, 0] = torch.nan
        return latents

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2)


def call(script, *arguments):
    return script.main([str(a) for a in arguments])


@pytest.mark.usefixtures("drawn_pictures")
def test_the_script_runs_by_its_path_from_any_folder_and_writes_figure_and_numbers(
    noise_folder, tmp_path, monkeypatch, capsys
):
    """As ``python FILE``, but here: torch is imported already."""
    words = ["--data", noise_folder, "--resolution", "8", "--autoencoder", "PixelSpace", "--out", "out"]
    words += ["--levels", "5", "--steps", "4", "--samples", "200", "--device", "cpu"]
    file = ROOT / "analysis" / "td_outliers.py"
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, words)])
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    assert "advice from" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "td_outliers.json").read_text())["pixels"]
    assert report["data"]["all"]["count"] == 36 * 3 * 64  # every tenth of 40 images is held out
    assert report["data"]["all"]["std"] == pytest.approx(0.5, rel=1e-5)
    assert len(report["data"]["by_channel"]) == 3
    assert report["td"]["all"]["count"] == 200 * 3 * 64
    assert sum(level["samples"] for level in report["td"]["by_level"]) == 200
    assert report["td"]["gaussian"]["count"] == report["td"]["all"]["count"]
    assert report["advice"]["num_levels"] == 5
    assert Image.open(tmp_path / "out" / "td_outliers.png").width > 1000


def test_a_baseline_is_trained_once_and_resumed(tiny, monkeypatch):
    run, images, config, cache = tiny
    before = run.latest_checkpoint()
    raw = to_unit(images.train)
    monkeypatch.setattr(baselines, "train", lambda *_: pytest.fail("trained again"))
    assert baselines.baseline_run(config, images, raw, cache, CPU) == run
    assert run.latest_checkpoint()[0] == before[0] == 25
    monkeypatch.setattr(baselines, "train", lambda *_: True)
    assert baselines.baseline_run(replace(config, steps=26), images, raw, cache, CPU) != run
    assert baselines.baseline_run(config, images, 2 * raw, cache, CPU) != run  # another autoencoder of the same name


def test_the_temporal_differences_are_those_of_the_training_objective(tiny):
    """The mean loss computed from them is what the objective itself gives on fresh batches."""
    run, images, config, _ = tiny
    trained = values.trained_of(load_model(run, CPU), run, images)
    found = trained.residuals(5, 4000)
    rho = config.objective.distance(found.td, torch.zeros_like(found.td), ConstantC().per_sqrt_d * found.d**0.5)
    loss = float((found.weight * rho).mean())
    logged = run.metrics()[-1]["consistency"]
    assert loss == pytest.approx(logged, rel=0.4)  # 25 steps of 36 samples: the log is noisy
    assert torch.equal(found.r, sample_r2(found.td, 0 * found.td).sqrt())
    assert torch.equal(found.level.unique(), torch.arange(4))
    law = config.objective.levels.law(found.sigmas)
    share = torch.bincount(found.level) / len(found.level)
    torch.testing.assert_close(share.double(), law, atol=0.03, rtol=0)


def test_the_temporal_differences_come_from_the_weights_being_trained_not_their_average(tiny):
    run, images, *_ = tiny
    trained = values.trained_of(load_model(run, CPU), run, images)
    tensors = run.latest_checkpoint()[1]
    for name, parameter in trained.network.named_parameters():
        assert torch.equal(parameter, tensors[f"network/{name}"])
    assert any(not torch.equal(p, tensors[f"ema/{n}"]) for n, p in trained.network.named_parameters())


def test_a_run_is_looked_at_at_the_number_of_levels_it_reached(tiny, tmp_path, capsys):
    run, *_ = tiny
    assert call(td_outliers, "--run", run.root, "--samples", 200, "--out", tmp_path) == 0
    report = json.loads((tmp_path / "td_outliers.json").read_text())
    assert list(report) == ["pixels"]
    assert report["pixels"]["td"]["num_levels"] == 5
    assert "at N = 5" in capsys.readouterr().out


@pytest.mark.usefixtures("drawn_pictures")
def test_losses_pull_as_their_derivatives_say(tiny, tmp_path, capsys):
    run, *_ = tiny
    r = torch.linspace(0, 5, 50)
    torch.testing.assert_close(loss_shapes.influence(cauchy_of_r2, r, 1.0), (2 * r / (2 + r**2)).double())
    assert call(loss_shapes, "--run", run.root, "--samples", 300, "--out", tmp_path) == 0
    report = json.loads((tmp_path / "loss_shapes.json").read_text())
    for curve in report["pull_by_sample"]:
        assert curve["y"] == sorted(curve["y"])
        assert (curve["x"][0], curve["y"][0], curve["x"][-1], curve["y"][-1]) == (0, 0, 1, 1)
    for curve in report["pull_by_level"]:
        assert sum(curve["y"]) == pytest.approx(1)
    middle = {c["name"]: np.interp(0.9, c["x"], c["y"]) for c in report["pull_by_sample"] if (c["c"] or 1) > 0.1}
    assert middle["squared_l2"] < middle["pseudo_huber"] < middle["cauchy"]  # the largest residuals pull less
    assert "squared_l2" in capsys.readouterr().out


@pytest.mark.usefixtures("drawn_pictures")
def test_the_figure_of_schedules_holds_the_schedules_and_the_measured_spread(tiny, tmp_path, capsys):
    run, *_ = tiny
    other = RunFolder(shutil.copytree(run.root, tmp_path / "other"))
    rows = {f"{n} evaluation{'s' * (n > 1)}": {"frechet": 3.0 / n, "recall": 0.2 * n} for n in (1, 2)}
    at_end = {"step": 25, "seed": 0, "features": "pooled latents", "rows": rows}
    (other.root / "evaluation.json").write_text(json.dumps(at_end | {"reference": "these", "sigmas": {}}))
    assert call(c_schedules, run.root, other.root, "--samples", 300, "--out", tmp_path) == 0
    report = json.loads((tmp_path / "c_schedules.json").read_text())
    assert report["d"] == 192
    for (n, median, mad), (_, c) in zip(report["runs"][0]["spread"], report["c"]["MeasuredC"], strict=True):
        assert c == pytest.approx(median, rel=0.03)
        assert 0 < mad < median, n
    assert [found["evaluations"] for found in report["runs"]] == [[], [at_end]]
    assert len(report["runs"][0]["loss"]) == len(run.metrics())
    assert "MeasuredC" in capsys.readouterr().out


def test_data_are_normalised_over_their_finite_values():
    raw = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 7 + 2
    raw[0, 1, 2, 3], raw[4, 0, 0, 0] = torch.nan, torch.inf
    raw[:, 2], raw[:, 0, 0] = 3.0, torch.nan
    x, channels = values.normalised(raw)
    assert channels == (0, 1)  # the constant one is left out
    assert int((~x.isfinite()).sum()) == 50 * 4 + 1
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    finite = x[:, 1][x[:, 1].isfinite()]
    assert float(finite.mean()) == pytest.approx(0, abs=1e-6)
    assert float(finite.std(correction=0)) == pytest.approx(0.5, rel=1e-6)


FOLDER = ["--data", "photos/../pictures"]


@pytest.mark.parametrize(
    ("data", "typed", "trained"),
    [
        ([], [], []),
        (FOLDER, [], []),
        (FOLDER, ["--resolution", "16"], ["data.resolution=16"]),
        (FOLDER, ["--autoencoder", "PixelSpace"], ["autoencoder=PixelSpace"]),
        ([], ["--autoencoder", "KLAutoencoder(latent_channels=8)"], ["autoencoder=KLAutoencoder(latent_channels=8)"]),
        (FOLDER, ["--autoencoder", "my_vae:load"], ["autoencoder=PretrainedAutoencoder(load='my_vae:load')"]),
    ],
)
def test_the_analysis_means_the_configuration_that_training_has(data, typed, trained):
    asked = td_outliers.parser().parse_args([*data, *typed])
    config = inputs.configuration(asked.data, asked.resolution, asked.autoencoder, CPU)
    assert config == configuration(trainer.parser().parse_args(["train", "digits", *trained, *data]))[1]
    if data:
        assert config.data.path == str(Path.cwd() / "pictures")  # an analysis and a run from elsewhere mean one folder
    if data and not typed:
        assert (config.autoencoder.latent_channels, config.autoencoder.likelihood) == (4, "gaussian")


@pytest.mark.parametrize("example", [line for line in td_outliers.EPILOG.splitlines() if "--autoencoder" in line])
def test_the_autoencoders_of_the_help_can_be_typed(example):
    name = shlex.split(example)[shlex.split(example).index("--autoencoder") + 1]
    inputs.configuration("photos", None, name, CPU)


HALVED = ["--resolution", 8, "--autoencoder", "test_analysis:Doubling"]


def outlying():
    """An autoencoder whose latents have outliers for the clip to move."""

    class Outlying(Doubling):
        def encode(self, images):
            latents = super().encode(images)
            return torch.where(torch.rand(latents.shape, generator=torch.Generator().manual_seed(1)) < 0.02, 9, latents)

    return Outlying()


def test_the_levels_it_prints_are_those_that_training_takes(noise_folder, tmp_path, capsys):
    """On the same images, behind the same clip: gate and second evaluation."""
    arguments = ["--data", noise_folder, "--resolution", 8, "--autoencoder", "test_analysis:outlying", "--steps", 0]
    assert call(td_outliers, *arguments, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "td_outliers.json").read_text())["latents"]["noise_levels"]
    config = inputs.configuration(str(noise_folder), 8, "test_analysis:outlying", CPU)
    latents, space = training_latents(config, config.data.load(), tmp_path, CPU)
    gate = with_measured_gate(config.objective, latents).gate
    assert (found["recognised"], found["explained"]) == (space.recognised_at, gate.sigma)
    assert 0.01 < found["moved"] < 0.03
    unclipped = replace(config, clip=None)
    without, _ = training_latents(unclipped, config.data.load(), tmp_path, CPU)
    assert with_measured_gate(config.objective, without).gate.sigma != gate.sigma  # so the clip matters here
    said = capsys.readouterr().out
    assert f"coupling: above t = {gate.sigma:.3g}" in said
    assert "behind TukeyClip(k=3.0)" in said


def test_of_more_images_than_asked_for_the_autoencoder_is_still_that_of_all(
    noise_folder, tmp_path, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(KLAutoencoder, "fit", lambda self, images, *_: seen.append(len(images.train)) or Doubling())
    arguments = ["--data", noise_folder, "--resolution", 8, "--steps", 0, "--images", 25, "--out", tmp_path]
    assert call(td_outliers, *arguments) == 0
    assert seen == [36]
    assert json.loads((tmp_path / "td_outliers.json").read_text())["latents"]["data"]["all"]["count"] == 25 * 48
    assert "looked at: 25, chosen at random (--images), while training measures on all" in capsys.readouterr().out


def test_a_run_is_looked_at_with_the_gate_and_the_labels_it_trained_with(tiny):
    """Where the images are its own, the second evaluation is the run's, to the last bit."""
    run, images, config, _ = tiny
    own = values.run_space(run, images, whole=images, num_levels=5, count=50, device=CPU).levels
    assert own.recognised == load_model(run, CPU).space.recognised_at
    labelled = replace(images, labels=torch.arange(40) % 3)
    trained = values.trained_of(load_model(run, CPU), run, labelled)
    assert torch.equal(trained.labels, labelled.train_labels)
    coupled = replace(config.objective, coupler=WithinClasses(), gate=everywhere)
    found = replace(trained, config=replace(config, objective=coupled)).residuals(5, 50)
    assert not torch.equal(found.td, trained.residuals(5, 50).td)


def test_images_a_run_was_not_made_for_are_refused(tiny, tmp_path, capsys):
    run, *_ = tiny
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    arguments = ["--run", run.root, "--data", tmp_path, "--samples", 50, "--out", tmp_path / "out"]
    assert call(td_outliers, *arguments) == 0  # at the resolution of the run's own images
    assert call(td_outliers, *arguments, "--resolution", 16) == 2
    assert "images of 3 x 16 x 16, for which the run" in capsys.readouterr().err


def test_an_autoencoder_can_be_a_part_a_function_or_a_run(tiny):
    run, *_ = tiny
    images = torch.zeros(5, 3, 8, 8)

    def codec_of(name):
        return inputs.configuration(None, None, name, CPU).autoencoder.fit(tiny[1], CPU, tiny[3])

    assert inputs.configuration(None, None, "KLAutoencoder(latent_channels=8)", CPU).autoencoder.latent_channels == 8
    assert codec_of("test_analysis:Doubling").encode(images).shape == (5, 3, 4, 4)
    assert torch.equal(codec_of(str(run.root)).encode(images), images)


def test_advice_from_the_script_is_the_advice_of_the_rule(tiny):
    run, images, _, _ = tiny
    found = values.trained_of(load_model(run, CPU), run, images).residuals(5, 400)
    space = values.Space("pixels", images.train.float(), found)
    assert td_outliers.advice_on(space.residuals).c == advise(found.r, found.level, 5, 192).c
    assert advise(found.r, found.level, 5, 192).distance in (cauchy, pseudo_huber)


@pytest.mark.parametrize("script", [td_outliers, loss_shapes, c_schedules])
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit):
        call(script, "--help")
    said = capsys.readouterr().out
    assert "default" in said
    assert ".png" in said
