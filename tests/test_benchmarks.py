"""The benchmarks do what they say: on a tiny run what they print and write, and what they take for a difference."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from reference_trainer.__main__ import main, parser
from reference_trainer.commands.train import configuration
from reference_trainer.model import TrainedModel
from reference_trainer.presets import PRESETS
from robustcm.schedules import FixedCurriculum, LevelGrid

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def run(kept_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on the pixels of a few images."""
    folder = tmp_path_factory.mktemp("run")
    options = ["pixels", "steps=3", "batch_size=16", "network=DiT(width=8,layers=1,heads=2,patch=16)"]
    options += [f"--data={kept_images}", "data.resolution=16", "objective.gate=Above(1)"]
    assert main(["train", *options, "--device=cpu", "--brief", "--run", str(folder)]) == 0
    return folder


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch, results: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(name)
    monkeypatch.setattr(sys.modules["_timing"], "RESULTS", results)
    return module


def test_gradient_share_lists_every_variant_once_and_shares_add_to_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = benchmark("gradient_share", monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradient_share.py", str(run), "--batches", "2"])
    module.main()
    assert "32 samples" in capsys.readouterr().out
    (file,) = tmp_path.glob("gradient_share_*.json")
    rows = json.loads(file.read_text())["rows"]
    variants = [tuple(row["variant"]) for row in rows]
    assert len(set(variants)) == len(variants) == (1 + 3 * len(module.SCALES)) * len(module.WEIGHTS)
    assert all(sum(row["share"].values()) == pytest.approx(1) for row in rows)


def test_second_sigma_marks_the_level_the_run_would_take(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = benchmark("second_sigma", monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "argv", ["second_sigma.py", str(run), str(run), "--factor", "1.5", "--n", "36"])
    module.main()
    (file,) = tmp_path.glob("second_sigma_d768_*.json")
    one, *others = json.loads(file.read_text())["rows"]
    assert (one["kind"], one["t"]) == ("1 evaluation", None)
    assert [row["kind"] for row in others] == ["trained", *["between", "trained"] * (len(others) // 2)]
    assert [row["default"] for row in others if row["default"]] == [2]
    levels = [row["t"] for row in others]
    assert levels == sorted(levels, reverse=True)
    assert all(row["frechet"][0] == row["frechet"][1] for row in [one, *others])  # the same run twice
    assert capsys.readouterr().out.count("<-") == 1


def second_sigma_of_two(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: list[float], intervals: list[int]
) -> ModuleType:
    """Of ``run``, given twice, as if its latents were recognised ``at`` these levels, of so many ``intervals``."""
    module = benchmark("second_sigma", monkeypatch, tmp_path)
    load, recognised, grids = module.load_model, iter(at), iter(intervals)

    def other(*arguments: Any) -> TrainedModel:
        model = load(*arguments)
        levels = LevelGrid(curriculum=FixedCurriculum(num_levels=next(grids)))
        config = replace(model.config, objective=replace(model.config.objective, levels=levels))
        return replace(model, config=config, space=replace(model.space, recognised_at=next(recognised)))

    monkeypatch.setattr(module, "load_model", other)
    monkeypatch.setattr(sys, "argv", ["second_sigma.py", str(run), str(run), "--factor", "1.1", "--n", "36"])
    return module


def test_second_sigma_marks_the_level_of_each_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    second_sigma_of_two(run, tmp_path, monkeypatch, [0.5, 2.0], [40, 40]).main()
    assert capsys.readouterr().out.count("<- 1 of 2 runs") == 2
    (file,) = tmp_path.glob("second_sigma_d768_*.json")
    marked = [row["t"] for row in json.loads(file.read_text())["rows"] if row["default"]]
    assert marked == [pytest.approx(t, rel=0.2) for t in (2.0, 0.5)]


def test_second_sigma_refuses_runs_of_different_levels(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        second_sigma_of_two(run, tmp_path, monkeypatch, [0.5, 0.5], [40, 43]).main()
    assert "trained at different levels" in capsys.readouterr().err


def test_computing_says_on_a_gpu_nothing_of_processor_seconds_and_on_a_cpu_nothing_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = benchmark("computing", monkeypatch, tmp_path)
    row = {"way": "tf32", "step": SimpleNamespace(median=0.5), "speed_over_float32": [1.0, 1.1, 1.2]}
    cpu = module.in_words(row | {"processor_over_float32": 1.15, "megabytes": None})
    assert cpu.endswith("2.00 steps/s, 1.10 of float32's (1.00 .. 1.20; by processor seconds 1.15)")
    gpu = module.in_words(row | {"processor_over_float32": None, "megabytes": 7.0})
    assert gpu.endswith("2.00 steps/s, 1.10 of float32's (1.00 .. 1.20), 7 MB a step")


@pytest.fixture
def same_losses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("same_losses")


def test_the_same_losses_are_asked_of_every_preset(same_losses: ModuleType):
    cases = dict(same_losses.CASES)
    assert "--data={images}" in cases.pop("folder")
    assert cases.keys() == {preset.__name__ for preset in PRESETS}
    for preset in PRESETS:
        _, config = configuration(parser().parse_args(["train", *cases[preset.__name__]]))
        assert config == replace(preset(), autoencoder=config.autoencoder)
        assert getattr(config.autoencoder, "steps", 30) == 30


@pytest.mark.parametrize(
    ("old", "new"), [(0.0, -0.0), (1, True), (1, 1.0), (1.0, 1.0000000000000002), (float("nan"), None), ([1], [1, 1])]
)
def test_values_that_are_equal_and_not_the_same_are_a_difference(same_losses: ModuleType, old: Any, new: Any):
    found = same_losses.first_difference({"a": {"b": [3, old]}}, {"a": {"b": [3, new]}})
    assert found == f"a.b[1]: {old} -> {new}"
    for value in (old, new):
        assert same_losses.first_difference({"a": value, "seconds": 1}, {"a": value, "seconds": 2}) == ""
