"""What an evaluation measures of no weights may be measured while they are trained, and is the same then."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageFolder
from reference_trainer.evaluation.beforehand import may_run_beside
from reference_trainer.evaluation.evaluate import Evaluator, choose_features, evaluate
from reference_trainer.evaluation.features import Imported
from reference_trainer.files import as_json
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train
from robustcm.gates import Above

CPU = torch.device("cpu")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)


@pytest.fixture
def config(image_folder: Path) -> TrainConfig:
    config = TrainConfig(
        data=ImageFolder(path=str(image_folder), resolution=16),
        autoencoder=PixelSpace(),
        clip=None,
        network=DiT(width=8, layers=1, heads=2, patch=16),
        batch_size=4,
        steps=4,
        evaluate_every=2,
    )
    return replace(config, objective=replace(config.objective, gate=Above(1.0)))


@pytest.mark.parametrize("bounds", [True, False])
def test_what_was_measured_beside_training_is_what_is_measured_behind_it(
    config: TrainConfig, bounds: bool, tmp_path: Path, two_cores: None
):
    images, ends = config.data.load(), dict[bool | None, str]()
    for beside in (bounds, None):
        run = RunFolder(tmp_path / str(beside))
        judge = Evaluator(run, images, bounds_beside=beside)
        run.claim(config)
        train(config, run, images, tmp_path, CPU, judge)
        model = load_model(run, CPU)
        assert (judge.beforehand() is None) == (beside is None)
        found = evaluate(model, images, choose_features(None, model), bounds=bounds, ahead=judge.beforehand())
        ends[beside] = as_json([found, run.evaluations()])
    assert ends[bounds] == ends[None]


def test_nothing_of_the_users_runs_beside_training(config: TrainConfig, tmp_path: Path, two_cores: None):
    images, run = config.data.load(), RunFolder(tmp_path / "run")
    run.claim(config)
    train(config, run, images, tmp_path, CPU)
    model = load_model(run, CPU)
    features = choose_features(None, model)
    assert may_run_beside(model, images, features)
    assert not may_run_beside(model, images, Imported("theirs", lambda pixels: pixels.float().flatten(1)))
    theirs = replace(model, space=replace(model.space, codec=Foreign("theirs", torch.nn.Identity())))
    assert not may_run_beside(theirs, images, features)
    assert not may_run_beside(replace(model, device=torch.device("cuda")), images, features)


def test_on_one_core_nothing_runs_beside(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, run = config.data.load(), RunFolder(tmp_path / "run")
    run.claim(config)
    train(config, run, images, tmp_path, CPU)
    model = load_model(run, CPU)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert not may_run_beside(model, images, choose_features(None, model))
