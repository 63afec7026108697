"""The analysis scripts measure what they say, draw it, and refuse bad input in one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_tails import synthetic

from analysis import baselines, c_schedules, drawing, inputs, loss_shapes, td_outliers, values
from reference_trainer import __main__ as trainer
from reference_trainer.commands.train import configuration
from reference_trainer.data.autoencoders import KLAutoencoder, PixelSpace
from reference_trainer.data.images import ImageFolder, to_unit
from reference_trainer.errors import UserError
from reference_trainer.evaluation import boxes
from reference_trainer.model import load_model
from reference_trainer.presets import flow_map
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import with_measured_gate
from reference_trainer.training.start import training_latents
from robustcm.couplers import WithinClasses
from robustcm.gates import everywhere
from robustcm.losses import cauchy, cauchy_of_r2, pseudo_huber, sample_r2
from robustcm.scales import ConstantC
from robustcm.tails import box_statistics
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


def spoilt():
    """What ``--autoencoder test_analysis:spoilt`` calls."""
    return Doubling(nan=True)


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory):
    """40 pictures of 8x8 coloured noise."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(noise_folder, tmp_path_factory):
    """A run of 25 steps on the pixels of those pictures, and the folder it is cached in."""
    cache = tmp_path_factory.mktemp("cache")
    data = ImageFolder(path=str(noise_folder), resolution=8)
    config = baselines.baseline_config(data, PixelSpace(), (3, 8, 8), 5, 25)
    config = replace(config, network=replace(config.network, width=16, layers=1), log_every=5)
    images = inputs.load_images(data)
    return baselines.baseline_run(config, images, to_unit(images.train), cache, CPU), images, config, cache


def call(script, *arguments):
    return script.main([str(a) for a in arguments])


def test_the_script_runs_as_typed_and_writes_figure_and_numbers(noise_folder, tmp_path):
    command = ["analysis/td_outliers.py", "--data", noise_folder, "--resolution", "8", "--autoencoder", "PixelSpace"]
    command += ["--levels", "5", "--steps", "4", "--samples", "200", "--out", tmp_path / "out", "--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "ROBUSTCM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "advice from" in ran.stdout
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
    trained = values.trained_run(run, images, CPU)
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
    trained = values.trained_run(run, images, CPU)
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
    own = values.run_space(run, images, own=True, num_levels=5, count=50, device=CPU).levels
    assert own.recognised == load_model(run, CPU).space.recognised_at
    labelled = replace(images, labels=torch.arange(40) % 3)
    trained = values.trained_run(run, labelled, CPU)
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


def test_nan_latents_are_counted_and_reported_and_stop_the_baseline(noise_folder, tmp_path, capsys):
    arguments = ["--data", noise_folder, "--resolution", 8, "--autoencoder", "test_analysis:spoilt", "--levels", 5]
    assert call(td_outliers, *arguments, "--steps", 2, "--samples", 50, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "no baseline and no temporal differences: 1 of 1728 values are not finite" in said
    assert "1 of 1728 values are NaN" in said
    report = json.loads((tmp_path / "td_outliers.json").read_text())
    assert report["latents"]["data"]["all"]["nan_count"] == 1
    assert "td" in report["pixels"]


def test_an_autoencoder_can_be_a_part_a_function_or_a_run(tiny):
    run, *_ = tiny
    images = torch.zeros(5, 3, 8, 8)

    def codec_of(name):
        return inputs.configuration(None, None, name, CPU).autoencoder.fit(tiny[1], CPU, tiny[3])

    assert inputs.configuration(None, None, "KLAutoencoder(latent_channels=8)", CPU).autoencoder.latent_channels == 8
    assert codec_of("test_analysis:Doubling").encode(images).shape == (5, 3, 4, 4)
    assert torch.equal(codec_of(str(run.root)).encode(images), images)


def one_colour(folder):
    for i in range(20):
        Image.new("L", (8, 8), 100).save(folder / f"{i}.png")


def no_pictures(folder):
    (folder / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("fill", "arguments", "message"),
    [
        (no_pictures, ["--data", "{}"], "no image files"),
        (one_colour, ["--data", "{}", "--resolution", "8"], "constant data"),
        (no_pictures, ["--run", "{}"], "no config.json"),
        (no_pictures, ["--autoencoder", "nowhere:load"], "expected module:function"),
        (no_pictures, ["--autoencoder", "Autoencoder9000"], "no run folder"),
        (no_pictures, ["--autoencoder", "{}"], "no config.json"),
        (no_pictures, ["--levels", "1"], "--levels must be at least 2"),
        (no_pictures, ["--samples", "3"], "--samples must be at least 20"),
        (no_pictures, ["--resolution", "32"], "--resolution is for --data"),
        (no_pictures, ["--run", "{}", "--autoencoder", "PixelSpace"], "give one of"),
    ],
)
def test_bad_input_is_one_line_and_status_2(fill, arguments, message, tmp_path, capsys):
    fill(tmp_path)
    assert call(td_outliers, *[a.format(tmp_path) for a in arguments], "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoint_is_refused(tiny, tmp_path, capsys):
    run, *_ = tiny
    (tmp_path / "config.json").write_text((run.root / "config.json").read_text())
    for script, option in ((td_outliers, ["--run"]), (loss_shapes, ["--run"]), (c_schedules, [])):
        assert call(script, *option, tmp_path, "--out", tmp_path / "out") == 2
        assert "train it first" in capsys.readouterr().err


def coloured(images):
    """Colour of two channels alone."""
    images[..., 2] = 7
    return images


@pytest.mark.parametrize(
    ("count", "change", "arguments", "said"),
    [
        (10, None, [], "images: 9, too few to train one on"),
        (40, None, ["--images", 1], "images: 1, too few"),
        (40, None, ["--images", 2], "images: 2, too few"),
        (24, None, [], "advice from"),  # fewer than a batch
        (24, None, ["--samples", 20], "no advice on distance and c: need at least 20"),
        (24, coloured, [], "channel 2 is constant, or never finite, and left out"),
        (24, coloured, ["--images", 1, "--steps", 0], "need at least two samples"),
    ],
)
def test_however_few_images_there_is_a_box_plot_and_a_line_on_what_is_missing(
    count, change, arguments, said, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(change(picture) if change else picture).save(tmp_path / f"{i:02}.png")
    given = ["--data", tmp_path, *HALVED, "--levels", 3, "--steps", 2, "--samples", 300, "--out", tmp_path / "out"]
    assert call(td_outliers, *given, *arguments) == 0
    captured = capsys.readouterr()
    assert said in captured.out
    assert captured.out.count("in short:") == 2
    report = json.loads((tmp_path / "out" / "td_outliers.json").read_text())
    assert report["pixels"]["data"]["all"]["count"] > 0
    assert report["pixels"]["data"]["by_channel"][-1]["channel"] == (1 if change else 2)
    assert (tmp_path / "out" / "td_outliers.png").stat().st_size > 0


def test_a_space_in_which_nothing_varies_is_left_out_and_said(noise_folder, tmp_path, capsys):
    given = ["--data", noise_folder, "--resolution", 8, "--steps", 0, "--out", tmp_path]
    assert call(td_outliers, *given, "--autoencoder", "test_analysis:collapsed") == 0
    assert "latents: left out: every channel of the data is constant" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "td_outliers.json").read_text())) == ["pixels"]


def collapsed():
    """An autoencoder that forgot all."""

    class Collapsed(Doubling):
        def encode(self, images):
            return torch.ones(len(images), 3, 4, 4)

    return Collapsed()


def residuals_of(td):
    sigmas = torch.tensor([80.0, 1.0])
    return values.Residuals(td, torch.zeros(len(td), dtype=torch.int64), torch.ones(len(td)), 2, sigmas, "a network")


@pytest.mark.parametrize("td", [torch.zeros(50, 1, 2, 2), torch.ones(50, 1, 2, 2), torch.randn(7, 1, 1, 1)])
def test_residuals_that_do_not_vary_or_are_few_have_a_box_and_no_advice(td):
    space = values.Space("pixels", torch.randn(50, 1, 2, 2), residuals_of(td))
    advice = td_outliers.advice_on(space.residuals)
    assert isinstance(advice, str)
    entry = td_outliers.measure(space)
    lines = td_outliers.in_words(space, entry, advice)
    assert any(f"no advice on distance and c: {advice}" in line for line in lines)
    assert f"{td.numel()} values" in "".join(lines)
    assert "too few residuals" in lines[-1]
    figure = td_outliers.figure_of([space])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[2].texts][:1] == (
        ["(c) too few residuals in every noise level"] if len(td) < 20 else ["0"]
    )
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("count", [1, 2, 19, 20])
def test_a_few_values_are_measured_and_called_few(count):
    space = values.Space("pixels", torch.arange(float(count)).reshape(1, 1, 1, count), None)
    said = " ".join(td_outliers.in_words(space, td_outliers.measure(space), None))
    assert ("too few values to speak of tails" in said) == (count < 20)
    td_outliers.figure_of([space]).canvas.draw()


def test_a_network_that_gives_nan_is_said_and_its_data_still_drawn(tiny, tmp_path, monkeypatch, capsys):
    run, *_ = tiny
    nan = (torch.full((40, 3, 8, 8), torch.nan),) * 2
    monkeypatch.setattr(values, "temporal_difference", lambda f, x, *_, **__: tuple(part[: len(x)] for part in nan))
    assert call(td_outliers, "--run", run.root, "--samples", 50, "--out", tmp_path) == 0
    assert "no temporal differences: at N = 5 none is finite" in capsys.readouterr().out
    assert call(c_schedules, run.root, "--samples", 50, "--out", tmp_path) == 0
    assert "no residuals: at N = 11 none is finite" in capsys.readouterr().out
    assert "MeasuredC" not in json.loads((tmp_path / "c_schedules.json").read_text())["c"]
    assert call(loss_shapes, "--run", run.root, "--samples", 50, "--out", tmp_path) == 2
    assert "has diverged" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_that_logged_nothing_or_once_still_has_its_spread(rows, tiny, tmp_path, capsys):
    run = RunFolder(shutil.copytree(tiny[0].root, tmp_path / "run"))
    file = run.root / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    without_td = {key: value for key, value in json.loads(lines[0]).items() if key != "td"}
    file.write_text("".join([json.dumps(without_td) + "\n"] * rows + [lines[1][:20]]))
    assert call(c_schedules, run.root, "--samples", 50, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert f"run: {rows or 'no'} logged row" in said
    assert len(json.loads((tmp_path / "c_schedules.json").read_text())["runs"][0]["spread"]) == 7
    assert call(loss_shapes, "--run", run.root, "--samples", 20, "--levels", 21, "--out", tmp_path) == 0
    assert "no pull on the residuals" in capsys.readouterr().out
    assert json.loads((tmp_path / "loss_shapes.json").read_text())["advice"] is None


def test_the_last_line_concludes_from_both_values_and_residuals():
    rng = np.random.default_rng(0)

    def box(x):
        return box_statistics(x).as_dict()

    def advised(law, where, d=64):
        td, level = synthetic(law, where, 2000, d, rng)
        return advise(np.linalg.norm(td, axis=1), level, 21, d, td)

    light, heavy = box(rng.standard_normal(10_000)), box(rng.standard_t(2, 10_000))
    gaussian, whole = advised("Gaussian", "whole"), advised("Student t 2", "whole")
    elements = advised("5 % x10", "elements", d=1024)
    assert td_outliers.in_short(heavy, gaussian).startswith(
        "data values: heavy tails, which clip= of the trainer is for"
    )
    assert "a robust distance should not help" in td_outliers.in_short(heavy, gaussian)
    assert td_outliers.in_short(light, whole).startswith("data values: light tails; temporal")
    assert "a robust distance should help" in td_outliers.in_short(light, whole)
    assert "so a distance per sample should not help, PerElement might" in td_outliers.in_short(light, elements)
    assert "only temporal differences tell" in td_outliers.in_short(light, None)


def test_the_gaussian_beside_has_the_same_size_box_and_no_tail():
    x = np.random.default_rng(0).standard_t(2, 50_000).astype(np.float32)
    box = box_statistics(x)
    gaussian = box_statistics(drawing.gaussian_beside(x, box))
    assert gaussian.count == box.count
    assert gaussian.iqr == pytest.approx(box.iqr, rel=0.03)
    assert gaussian.beyond_inner == pytest.approx(0.007, abs=0.002)


def test_outliers_drawn_are_outliers_the_farthest_among_them():
    x = np.random.default_rng(0).standard_t(2, 200_000).astype(np.float32)
    box = box_statistics(x)
    shown = boxes.outliers_of(x, box)
    assert 100 < len(shown) <= boxes.MOST_POINTS
    assert ((shown < box.inner_fences[0]) | (shown > box.inner_fences[1])).all()
    assert np.abs(x).max() in np.abs(shown)
    assert (
        len(boxes.outliers_of(x[:100], box))
        == ((x[:100] < box.inner_fences[0]) | (x[:100] > box.inner_fences[1])).sum()
    )


def column(label, x):
    box = box_statistics(x)
    return boxes.Column(label, box, boxes.outliers_of(x, box))


def test_the_figure_shows_each_box_its_fences_and_shares():
    rng = np.random.default_rng(0)
    x, levels = rng.standard_t(3, 5000), [(s, box_statistics(rng.standard_t(3, 500))) for s in (0.1, 1.0, 10.0)]
    figure = drawing.draw_outliers(
        [column("pixels", x)], [column("pixels", x), column("latents", 3 * x)], {"pixels": levels}
    )
    figure.canvas.draw()
    data, td, by_level = figure.axes
    label = td.get_xticklabels()[1].get_text()
    assert label.startswith("latents")
    assert f"max|z| {box_statistics(x).max_z:.1f}" in label
    low, high = td.get_ylim()
    assert low < 3 * x.min() < 3 * x.max() < high  # nothing is cut off
    assert {
        round(y, 6) for c in data.collections if hasattr(c, "get_segments") for s in c.get_segments() for y in s[:, 1]
    } == {round(f, 6) for f in (*box_statistics(x).inner_fences, *box_statistics(x).outer_fences)}
    np.testing.assert_allclose(by_level.lines[0].get_ydata(), [b.beyond_inner for _, b in levels])


def test_a_degenerate_box_is_said_in_the_figure():
    x = np.zeros(1000)
    x[:100] = np.arange(100)
    figure = drawing.draw_outliers([column("pixels", x)], [], {})
    assert "IQR = 0" in figure.axes[0].get_xticklabels()[0].get_text()


def test_advice_from_the_script_is_the_advice_of_the_rule(tiny):
    run, images, _, _ = tiny
    found = values.trained_run(run, images, CPU).residuals(5, 400)
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


def test_tails_are_called_light_slightly_heavier_or_heavy():
    rng = np.random.default_rng(0)

    def called(x):
        return td_outliers.heaviness(box_statistics(x).as_dict()).split(" ")[0:2]

    assert called(rng.standard_normal(100_000)) == ["light", "tails:"]
    assert called(rng.uniform(size=100_000)) == ["light", "tails:"]
    assert called(rng.standard_t(12, 100_000)) == ["tails", "slightly"]
    assert called(rng.standard_t(3, 100_000)) == ["heavy", "tails:"]


def test_levels_with_few_samples_are_measured_but_not_drawn(tiny):
    run, images, *_ = tiny
    found = values.trained_run(run, images, CPU).residuals(5, 60)
    counts = torch.bincount(found.level, minlength=4)
    assert counts.min() < 20 < counts.max()
    space = values.Space("pixels", images.train.float(), found)
    drawn = td_outliers.figure_of([space]).axes[2].lines[0].get_xdata()
    assert list(drawn) == pytest.approx(found.sigmas[:4][counts >= 20].tolist())
    assert len(td_outliers.measure(space)["td"]["by_level"]) == int((counts > 0).sum())


def test_a_run_that_is_no_consistency_function_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = SimpleNamespace(config=flow_map())
    monkeypatch.setattr(values, "load_model", lambda run, device: model)
    with pytest.raises(UserError, match="is a run of a FlowMapObjective: temporal differences are of consistency"):
        values.trained_run(RunFolder(tmp_path), None, torch.device("cpu"))
