"""The analysis scripts measure what they say, draw it, and refuse bad input in one line."""

from __future__ import annotations

import json
import os
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

from analysis import c_schedules, drawing, loss_shapes, td_outliers, values
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.presets import flow_map
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import with_measured_gate
from robustcm.couplers import exact
from robustcm.gates import Above, AboveExplained
from robustcm.losses import cauchy, cauchy_of_r2, sample_r2
from robustcm.objective import Objective
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
    config = values.baseline_config(data, PixelSpace(), (3, 8, 8), 5, 25)
    config = replace(config, network=replace(config.network, width=16, layers=1), log_every=5)
    images = values.load_images(data, 5000)
    return values.baseline_run(config, images, cache, CPU), images, config, cache


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
    assert "advice for pixels" in ran.stdout
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
    monkeypatch.setattr(values, "train", lambda *_: pytest.fail("trained again"))
    assert values.baseline_run(config, images, cache, CPU) == run
    assert run.latest_checkpoint()[0] == before[0] == 25
    monkeypatch.setattr(values, "train", lambda *_: True)
    assert values.baseline_run(replace(config, steps=26), images, cache, CPU) != run


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
    x, not_finite = values.normalised(raw)
    assert not_finite == 2
    finite = x[:, 1][x[:, 1].isfinite()]
    assert float(finite.mean()) == pytest.approx(0, abs=1e-6)
    assert float(finite.std(correction=0)) == pytest.approx(0.5, rel=1e-6)


def test_the_levels_it_names_are_those_the_trainer_takes():
    raw = torch.randn(60, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    space = LatentSpace.of(PixelSpace().build(2, {}), raw)
    x = space.normalise(raw)
    gate = with_measured_gate(Objective(coupler=exact, gate=AboveExplained()), x).gate
    assert isinstance(gate, Above)
    found = td_outliers.recognised_and_explained(x)
    assert found == pytest.approx({"recognised": space.recognised_at, "explained": gate.sigma}, rel=1e-4)
    for useless in (x[:1], torch.ones_like(x), x / 0):
        assert td_outliers.recognised_and_explained(useless) is None


def test_nan_latents_are_counted_and_reported_and_stop_the_baseline(noise_folder, tmp_path, capsys):
    arguments = ["--data", noise_folder, "--resolution", 8, "--autoencoder", "test_analysis:spoilt", "--levels", 5]
    assert call(td_outliers, *arguments, "--steps", 0, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "1 of 1728 values are not finite" in said
    assert "1 of 1728 values are NaN" in said
    assert json.loads((tmp_path / "td_outliers.json").read_text())["latents"]["data"]["all"]["nan_count"] == 1


def test_an_autoencoder_can_be_a_part_a_function_or_a_run(tiny):
    run, *_ = tiny
    assert values.autoencoder_of("KLAutoencoder(latent_channels=8)", CPU).latent_channels == 8
    images = torch.zeros(5, 3, 8, 8)
    assert values.autoencoder_of("test_analysis:Doubling", CPU).codec.encode(images).shape == (5, 3, 4, 4)
    assert torch.equal(values.autoencoder_of(str(run.root), CPU).codec.encode(images), images)


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


def test_fewer_than_twenty_values_are_refused():
    space = values.Space("pixels", torch.randn(1, 1, 4, 4), None)
    with pytest.raises(UserError, match="16 values in pixels: need at least 20"):
        td_outliers.measure(space)


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
    shown = drawing.outliers_of(x, box)
    assert 100 < len(shown) <= drawing.MOST_POINTS
    assert ((shown < box.inner_fences[0]) | (shown > box.inner_fences[1])).all()
    assert np.abs(x).max() in np.abs(shown)
    assert (
        len(drawing.outliers_of(x[:100], box))
        == ((x[:100] < box.inner_fences[0]) | (x[:100] > box.inner_fences[1])).sum()
    )


def column(label, x):
    box = box_statistics(x)
    return drawing.Column(label, box, drawing.outliers_of(x, box))


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
    assert td_outliers.advice_on(space).c == advise(found.r, found.level, 5, 192).c
    assert advise(found.r, found.level, 5, 192).distance in (cauchy, values.ilct().objective.distance)


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
