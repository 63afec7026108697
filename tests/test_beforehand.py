"""What an evaluation measures of no weights may be measured while they are trained, and is the same then."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageFolder
from reference_trainer.errors import Terminated, sigterm_raises
from reference_trainer.evaluation import reference
from reference_trainer.evaluation.beforehand import may_run_beside
from reference_trainer.evaluation.evaluate import Evaluator, choose_features, evaluate
from reference_trainer.evaluation.features import Imported
from reference_trainer.evaluation.reference import Broken
from reference_trainer.evaluation.sets import Drawn
from reference_trainer.files import as_json
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
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


class Slow:
    """Features that wait, after the first batch, until they are let go."""

    name = "slow"

    def __init__(self) -> None:
        self.begun, self.go, self.calls = Event(), Event(), 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:  # the first only tries them
            self.begun.set()
            assert self.go.wait(60)
        return pixels.float().flatten(1)


def test_what_is_measured_beside_training_ends_with_it_at_its_next_batch(
    config: TrainConfig, tmp_path: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch
):
    images, run, slow = config.data.load(), RunFolder(tmp_path / "run"), Slow()
    run.claim(config)
    train(config, run, images, tmp_path, CPU)
    monkeypatch.setattr(reference, "BATCH", 2)
    judge = Evaluator(run, images, slow, bounds_beside=True)
    judge.prepare(load_model(run, CPU))
    assert slow.begun.wait(60)
    judge.close()
    slow.go.set()
    with pytest.raises(Broken):
        judge.beforehand()
    assert slow.calls <= 3  # tried, and a batch each of the two sets that are measured at once


def test_a_stop_amid_an_evaluation_waits_for_the_batch_at_hand_and_no_more():
    broken, calls = Event(), list[int]()

    def features(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        assert broken.wait(60)
        return pixels.float()

    model = SimpleNamespace(device=CPU, space=SimpleNamespace(decode=lambda latents: latents))
    three = [torch.zeros(500, 2)] * 3
    with pytest.raises(Terminated), sigterm_raises():
        Drawn.of(model, features, {name: partial(iter, three) for name in "ab"}, broken=broken)  # type: ignore[arg-type]
    assert calls in ([500], [500, 500])  # of each set at most one


@pytest.mark.parametrize("ends", ["stopped", "terminated"])
def test_a_stopped_command_leaves_what_is_measured(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    closed = list[Evaluator]()

    def stopped(*_: object) -> bool:
        assert not closed
        if ends == "terminated":
            raise Terminated("stopped")
        return False

    monkeypatch.setattr(loop, "train", stopped)
    monkeypatch.setattr(Evaluator, "close", lambda judge: closed.append(judge))
    assert main(["pixels", "--out", str(tmp_path / "run"), "--device=cpu"]) == {"stopped": 130, "terminated": 75}[ends]
    assert len(closed) == 1


def test_on_one_core_nothing_runs_beside(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, run = config.data.load(), RunFolder(tmp_path / "run")
    run.claim(config)
    train(config, run, images, tmp_path, CPU)
    model = load_model(run, CPU)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert not may_run_beside(model, images, choose_features(None, model))
