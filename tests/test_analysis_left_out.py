"""The analysis of what is too little, constant or not finite: measured as far as it goes, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_analysis import CPU, HALVED, Doubling, call

from analysis import c_schedules, inputs, loss_shapes, runs, td_outliers, values, variance
from analysis.command import require_writable
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.errors import UserError
from reference_trainer.model import load_model
from reference_trainer.presets import flow_map
from reference_trainer.run import RunFolder


def spoilt():
    """What ``--autoencoder test_analysis_left_out:spoilt`` calls."""
    return Doubling(nan=True)


def test_nan_latents_are_counted_and_reported_and_stop_the_baseline(noise_folder, tmp_path, capsys):
    arguments = [
        "--data",
        noise_folder,
        "--resolution",
        8,
        "--autoencoder",
        "test_analysis_left_out:spoilt",
        "--levels",
        5,
    ]
    assert call(td_outliers, *arguments, "--steps", 2, "--samples", 50, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "no baseline and no temporal differences: 1 of 1728 values are not finite" in said
    assert "1 of 1728 values are NaN" in said
    report = json.loads((tmp_path / "td_outliers.json").read_text())
    assert report["latents"]["data"]["all"]["nan_count"] == 1
    assert "td" in report["pixels"]


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


def test_images_that_changed_since_the_run_are_refused_and_not_measured_under_its_name(
    tiny, noise_folder, tmp_path, capsys
):
    run = RunFolder(shutil.copytree(tiny[0].root, tmp_path / "run"))
    photos = Path(shutil.copytree(noise_folder, tmp_path / "photos"))
    config = json.loads((run.root / "config.json").read_text())
    config["data"]["path"] = str(photos)
    (run.root / "config.json").write_text(json.dumps(config))
    asked = ["--samples", 50, "--images", 10, "--out", tmp_path / "out"]
    assert call(td_outliers, "--run", run.root, *asked) == 0
    Image.new("RGB", (8, 8), "red").save(photos / "07.png")
    for script, words in (
        (td_outliers, ["--run", run.root]),
        (loss_shapes, ["--run", run.root]),
        (c_schedules, [run.root]),
    ):
        assert call(script, *words, *asked) == 2
        assert "but other pixels" in capsys.readouterr().err
    assert call(td_outliers, "--run", run.root, "--data", tmp_path / "photos", *asked) == 2  # the same, named
    others = photos.rename(tmp_path / "others")
    assert call(td_outliers, "--run", run.root, "--data", others, *asked) == 0


def test_an_autoencoder_of_a_run_on_grey_images_is_refused_for_coloured_ones(
    noise_folder, tmp_path, monkeypatch, capsys
):
    codec = KLAutoencoder().build(1, KLAutoencoder()._network(1).state_dict())
    monkeypatch.setattr(inputs, "load_model", lambda *_: SimpleNamespace(space=SimpleNamespace(codec=codec)))
    words = ["--data", noise_folder, "--resolution", 8, "--autoencoder", tmp_path, "--out", tmp_path / "out"]
    assert call(td_outliers, *words) == 2
    said = capsys.readouterr().err
    assert f"--autoencoder {tmp_path} does not take the images of {noise_folder.name}, which are 3 x 8 x 8" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", [td_outliers, c_schedules, loss_shapes, variance])
@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    script, below, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("reference_trainer.data.images.Digits.load", lambda _: pytest.fail("images were loaded"))
    (tmp_path / "file").write_text("")
    assert call(script, "--out", tmp_path / "file" / below) == 2
    said = capsys.readouterr().err
    assert f"cannot write to {tmp_path / 'file' / below}: " in said
    assert said.count("\n") == 1


def test_what_is_not_there_yet_is_not_made_to_try_it(tmp_path, monkeypatch):
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []

    def refused(dir):
        raise PermissionError(13, f"Permission denied in {dir.name}")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(UserError, match=f"Permission denied in {tmp_path.name}; give another folder with --out"):
        require_writable(tmp_path / "a" / "b")


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
@pytest.mark.usefixtures("drawn_pictures")
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
    assert call(td_outliers, *given, "--autoencoder", "test_analysis_left_out:collapsed") == 0
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


def test_levels_with_few_samples_are_measured_but_not_drawn(tiny):
    run, images, *_ = tiny
    found = values.trained_of(load_model(run, CPU), run, images).residuals(5, 60)
    counts = torch.bincount(found.level, minlength=4)
    assert counts.min() < 20 < counts.max()
    space = values.Space("pixels", images.train.float(), found)
    drawn = td_outliers.figure_of([space]).axes[2].lines[0].get_xdata()
    assert list(drawn) == pytest.approx(found.sigmas[:4][counts >= 20].tolist())
    assert len(td_outliers.measure(space)["td"]["by_level"]) == int((counts > 0).sum())


def test_a_run_that_is_no_consistency_function_is_said(tmp_path: Path):
    run = RunFolder(tmp_path)
    with run.locked():
        run.claim(flow_map())
    with pytest.raises(UserError, match="is a run of a FlowMapObjective: temporal differences are of consistency"):
        runs.trained_run(run, 100, torch.device("cpu"))
