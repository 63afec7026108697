"""Samples moved to the moments of the latents: measured by evaluate, kept with the run, taken by sample; refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reference_trainer import matching
from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.latents import InMemory
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import about_moments
from reference_trainer.evaluation.rows import Missing, in_digits
from reference_trainer.files import load_tensors, save_tensors
from reference_trainer.matching import matched, save_moments, with_kept_moments
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.networks import DiT
from reference_trainer.run import RunFolder
from reference_trainer.training import start
from reference_trainer.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(kept_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 steps on latents of 1 x 4 x 4."""
    config = TrainConfig(
        data=ImageFolder(path=str(kept_images), resolution=16),
        autoencoder=KLAutoencoder(latent_channels=1, block_out_channels=(8, 8), steps=2, likelihood="gaussian"),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=2),
        batch_size=8,
        steps=3,
    )
    run = RunFolder(tmp_path_factory.mktemp("matching") / "run")
    with run.locked():
        run.claim(config)
        train(config, run, config.data.load(), run.root.parent / "cache", CPU)
    return run.root


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy, and few samples to measure on."""
    monkeypatch.setattr(matching, "DRAWN", 500)
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    return RunFolder(Path(shutil.copytree(trained, tmp_path / "run")))


def latents(n: int = 400) -> InMemory:
    """Latents of the shape of the run's, of a mean and covariance of their own."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(16, 16, generator=generator)
    return InMemory((torch.randn(n, 16, generator=generator) @ mix + 2).reshape(n, 1, 4, 4))


def model_of(run: RunFolder) -> TrainedModel:
    return load_model(run, CPU)


@pytest.mark.parametrize("evaluations", [1, 2])
def test_further_samples_come_near_the_moments_of_the_latents(run: RunFolder, evaluations: int):
    data, model = latents(), model_of(run)
    drawn = matched(model, data).latents(2000, model.sigmas(evaluations), seed=0).flatten(1)
    before = model.latents(2000, model.sigmas(evaluations), seed=0).flatten(1)
    wanted = data.values.flatten(1)

    def away(x: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(torch.cov(x.T) - torch.cov(wanted.T)))

    assert away(drawn) < 0.25 * away(before)
    assert (drawn.mean(0) - wanted.mean(0)).norm() < 0.25 * (before.mean(0) - wanted.mean(0)).norm()


def test_what_is_kept_moves_the_same_to_the_bit(run: RunFolder):
    model = matched(model_of(run), latents())
    save_moments(run, model)
    again = with_kept_moments(run, model_of(run))
    for count in (1, 2):
        sigmas = model.sigmas(count)
        assert torch.equal(model.latents(5, sigmas, seed=1), again.latents(5, sigmas, seed=1))
        assert not torch.equal(model.latents(5, sigmas, seed=1), model_of(run).latents(5, sigmas, seed=1))


def test_the_commands(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(run.root)]) == 0
    before = json.loads((run.root / "evaluation.json").read_text())["latents"]["rows"]["1 evaluation"]
    capsys.readouterr()
    assert main(["evaluate", str(run.root), "--match-moments"]) == 0
    table = capsys.readouterr().out
    assert "note: samples are moved to the mean and the covariance of the latents" in table
    assert f"wrote {run.root / 'evaluation-matched.json'}" in table
    found = json.loads((run.root / "evaluation-matched.json").read_text())
    row = found["latents"]["rows"]["1 evaluation"]
    assert abs(row["variance_first_4"] - 1) < 0.5 * abs(before["variance_first_4"] - 1)
    assert main(["sample", str(run.root), "--n", "4", "--match-moments"]) == 0
    out = capsys.readouterr().out
    assert "4 images, NFE 1, moments matched" in out
    assert (run.root / "samples-4-1-0-matched.png").exists()
    assert main(["sample", str(run.root), "--n", "4", "--evaluations", "3", "--match-moments"]) == 2
    assert "moments are matched at 1 and 2 evaluations, not at 3" in capsys.readouterr().err


def test_without_a_measurement_sample_says_how_to_make_it(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert main(["sample", str(run.root), "--match-moments"]) == 2
    assert f"measure them first, with evaluate {run.root} --match-moments" in capsys.readouterr().err


@pytest.mark.parametrize(("other", "says"), [("--averages", "one average"), ("--new-data", "what the run was made")])
def test_it_does_not_go_with(run: RunFolder, other: str, says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(run.root), "--match-moments", other]) == 2
    assert says in capsys.readouterr().err
    assert not run.moments_file.exists()


@pytest.mark.parametrize(("name", "value"), [("step", 2), ("average", "decay 0.9"), ("guidance", 1.5)])
def test_maps_of_another_state_of_the_weights_are_refused(run: RunFolder, name: str, value: object):
    save_moments(run, matched(model_of(run), latents()))
    tensors, about = load_tensors(run.moments_file)
    save_tensors(run.moments_file, tensors, {**about, name: value})
    with pytest.raises(UserError, match=f"was measured of {name} .*evaluate anew"):
        with_kept_moments(run, model_of(run))


def test_maps_of_another_shape_are_refused(run: RunFolder):
    save_moments(run, matched(model_of(run), latents()))
    tensors, about = load_tensors(run.moments_file)
    save_tensors(run.moments_file, {**tensors, "2.matrix": tensors["2.matrix"][:5, :5].contiguous()}, about)
    with pytest.raises(UserError, match=r"moments.safetensors.*2.matrix"):
        with_kept_moments(run, model_of(run))


def test_too_few_latents_are_said_before_anything_is_drawn(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TrainedModel, "latents", lambda *_, **__: pytest.fail("drew samples"))
    with pytest.raises(UserError, match="--match-moments: 16 latents are too few for the covariance of 16 numbers"):
        matched(model_of(run), latents(16))
    monkeypatch.setattr(matching, "MOST_ELEMENTS", 15)
    with pytest.raises(UserError, match="--match-moments: latents of 16 elements, and covariances are of 15 at most"):
        matched(model_of(run), latents())


def test_what_cannot_be_matched_is_said_before_anything_is_encoded(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(start, "latents_of_run", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(matching, "MOST_ELEMENTS", 15)
    assert main(["evaluate", str(run.root), "--match-moments"]) == 2
    assert "covariances are of 15 at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guidance", "2"], "the run was trained without classes: leave --guidance out"),
        (["--match-moments"], "covariances are of 15 at most"),
        ([], "train it first, with the same --out"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_images_are_loaded(
    run: RunFolder, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(TrainConfig, "load_images", lambda *_: pytest.fail("images were loaded"))
    monkeypatch.setattr(matching, "MOST_ELEMENTS", 15)
    if not words:
        run.checkpoints()[0].unlink()
    assert main(["evaluate", str(run.root), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_has_diverged_is_said(run: RunFolder):
    model = model_of(run)
    for weights in model.network.parameters():
        weights.fill_(torch.nan)
    with pytest.raises(UserError, match="--match-moments: samples has numbers that are NaN"):
        matched(model, latents())


def latent_row(first: float, rest: float) -> dict[str, dict[str, float]]:
    return {"1 evaluation": {"variance_first_4": first, "variance_rest": rest}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (latent_row(1.1, 0.9), None),
        (latent_row(0.72, 1.2), "0.72 times"),
        (latent_row(0.9, 1.41), "1.41 times"),
        (latent_row(1.0, 0.0), "0.00 times"),
        ({}, None),
        ({"1 evaluation": Missing("diverged")}, None),
    ],
)
def test_the_table_says_where_it_may_be_worth_it(run: RunFolder, row: Any, said: str | None):
    notes = about_moments(model_of(run), row)
    assert (notes == []) if said is None else (len(notes) == 1 and said in notes[0] and "--match-moments" in notes[0])


def test_a_distance_below_1_has_three_digits_behind_the_point():
    shown = [in_digits(value) for value in (0.0, 0.0931, 0.0004, 1.0, 4.719)]
    assert shown == ["0.00", "0.093", "0.000", "1.00", "4.72"]
    assert [in_digits(value, 1) for value in (0.0931, 4.719)] == ["0.093", "4.7"]
