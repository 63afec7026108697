"""What training paid for is not lost behind it: all it will need is tried first, and figures come before files."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reference_trainer.__main__ import main
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.evaluation import evaluate as evaluation_module
from reference_trainer.model import TrainedModel
from reference_trainer.run import RunFolder
from reference_trainer.training import loop
from reference_trainer.training.batches import Batches

NETWORK = "network=DiT(width=8,layers=1,heads=2,patch=8)"
OPTIONS = ["pixels", NETWORK, "clip=None", "steps=2", "batch_size=4", "coupling_pool=1", "data.resolution=16"]


@pytest.fixture
def command(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    return ["train", "--device=cpu", f"--run={tmp_path / 'run'}", f"--data={image_folder}", *OPTIONS]


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("user_features")
    made.raising = lambda: lambda pixels: pixels.nonsense
    made.maps = lambda: lambda pixels: pixels.float()
    made.squares = lambda: lambda pixels: pixels[:, :, 3:4, 3:4].float()
    made.fails_on_many = lambda: lambda pixels: pixels.float().flatten(1)[:, :3] if len(pixels) < 4 else 1 / 0
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batches, "__call__", lambda *_: pytest.fail("a step was trained"))
    monkeypatch.setattr(KLAutoencoder, "_fit", lambda *_: pytest.fail("an autoencoder was fitted"))


@pytest.mark.parametrize("name", ["nowhere:f", "user_features:misspelt", "user_features:raising", "user_features:maps"])
@pytest.mark.parametrize("autoencoder", ["PixelSpace()", "KLAutoencoder()"])
def test_features_that_cannot_be_used_are_refused_before_anything_is_fitted(
    name: str, autoencoder: str, command: list[str], features: ModuleType, monkeypatch, capsys
):
    no_step(monkeypatch)
    assert main([*command, f"autoencoder={autoencoder}", f"--features={name}"]) == 2
    error = capsys.readouterr().err
    assert f"--features {name}" in error
    assert error.count("\n") == 1


def test_features_that_are_good_for_two_images_only_cost_the_rows_not_the_run(
    command: list[str], tmp_path: Path, features: ModuleType, capsys
):
    assert main([*command, "evaluate_every=1", "--brief", "--features=user_features:fails_on_many"]) == 0
    assert "left out: 1 evaluation, 2 evaluations (nothing to compare with: --features" in capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    assert [row["rows"] for row in run.evaluations()] == [{}, {}]
    assert run.latest_checkpoint()[0] == 2
    assert main(["evaluate", str(run.root), "--device=cpu", "--features=user_features:squares"]) == 0
    assert "in user_features:squares" in capsys.readouterr().out


def test_the_features_of_the_run_are_tried_before_the_first_step(command: list[str], monkeypatch, capsys):
    def broken(self, pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken features")

    no_step(monkeypatch)
    monkeypatch.setattr(evaluation_module.PooledLatents, "__call__", broken)
    assert main(command) == 1
    assert "unexpected RuntimeError: broken features" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused_before_the_autoencoder_is_fitted(command, monkeypatch, capsys):
    no_step(monkeypatch)
    assert main([*command, "batch_size=37", "autoencoder=KLAutoencoder()"]) == 2
    assert "batch_size=37 is larger than the 36 training images" in capsys.readouterr().err


@pytest.mark.usefixtures("drawn_pictures")
def test_a_folder_with_one_held_out_image_ends_in_a_table(command: list[str], image_folder: Path, capsys):
    for file in sorted(image_folder.iterdir())[14:]:
        file.unlink()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "left out: floor: held-out images (1 image" in printed
    assert "samples.png" in printed


def in_the_way(run: Path, name: str) -> None:
    """A folder where the file ``name`` should go: for root, who runs this in a container, nothing is read-only."""
    (run / name / "x").mkdir(parents=True)


@pytest.mark.parametrize("name", ["evaluation.json", "samples.png"])
def test_the_table_of_a_training_is_printed_though_nothing_can_be_written_behind_it(
    name: str, command: list[str], tmp_path: Path, capsys
):
    in_the_way(tmp_path / "run", name)
    assert main(command) == 2
    out, error = capsys.readouterr()
    assert "reconstructions" in out
    assert error.splitlines()[-1].startswith("error: cannot")
    assert name in error


def test_evaluate_prints_its_table_where_it_cannot_write(command: list[str], tmp_path: Path, monkeypatch, capsys):
    assert main([*command, "--brief"]) == 0
    capsys.readouterr()

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    assert main(["evaluate", str(tmp_path / "run"), "--device=cpu"]) == 2
    out, error = capsys.readouterr()
    assert "floor: half against half" in out
    assert "Read-only file system" in error
    assert error.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_said_before_it_is_drawn(command, tmp_path: Path, monkeypatch, capsys):
    assert main([*command, "--brief"]) == 0
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "images", lambda *_: pytest.fail("samples were drawn"))
        (tmp_path / "file").touch()
        for out in (tmp_path / "file" / "x.png", tmp_path / "x.nonsense"):
            assert main(["sample", run, "--device=cpu", f"--out={out}"]) == 2
            assert "cannot write" in capsys.readouterr().err
    assert main(["sample", run, "--device=cpu", "--n=2", f"--out={tmp_path / 'new' / 'x.png'}"]) == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.png"]


@pytest.mark.usefixtures("drawn_pictures")
def test_losses_that_are_not_finite_are_null_in_the_log_and_still_drawn(
    command: list[str], tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(loop, "mean_of", lambda *_: float("nan"))
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["c"] is None
    assert (tmp_path / "run" / "losses.png").stat().st_size > 0
