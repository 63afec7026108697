"""The analysis looks at a store as it looks at a folder: at some of it, and at runs that were trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis import c_schedules, loss_shapes, td_outliers
from analysis.runs import trained_run
from reference_trainer.__main__ import main
from reference_trainer.ablation import ablate
from reference_trainer.data.stored import LatentStore
from reference_trainer.run import RunFolder


class Colours:
    """Latents are the first two colours of images half as large."""

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images[:, :2], 2)

    def decode(self, latents: Tensor) -> Tensor:
        whole = nn.functional.interpolate(latents, scale_factor=2)
        return torch.cat([whole, whole[:, :1]], 1)


def load() -> Colours:
    return Colours()


LOAD = "test_analysis_of_stores:load"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 Gaussian latents of 2 x 4 x 4 with one wild value, in two classes, as somebody else extracted them."""
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    latents = torch.randn(60, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[7, 1, 2, 2] = 50.0
    root = tmp_path / "store"
    root.mkdir()
    save_file({"latents": latents, "labels": torch.arange(60) % 2}, root / "a.safetensors")
    return root


def looked_at(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> tuple[dict, str]:
    assert td_outliers.main([*words, "--out", str(out), "--device", "cpu", "--samples", "40"]) == 0
    return json.loads((out / "td_outliers.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("steps", ["0", "2"])
def test_latents_of_a_store_are_looked_at_with_a_baseline_of_their_own(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str
):
    words = ["--data", str(store), "--autoencoder", LOAD, "--images", "50", "--steps", steps]
    report, said = looked_at(capsys, tmp_path / "out", *words)
    assert list(report) == ["latents"]
    assert report["latents"]["data"]["all"]["count"] == 50 * 32
    assert report["latents"]["data"]["by_channel"][1]["max_z"] > 10
    assert "latents looked at: 50 of the 54 of the store" in said
    assert ("td" in report["latents"]) == (steps == "2")


def test_a_run_on_a_store_is_looked_at(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["steps=2", "batch_size=8", "coupling_pool=1", "network=DiT(width=8,layers=1,heads=2,patch=4)"]
    options.append(f"autoencoder=PretrainedAutoencoder(load={LOAD!r})")
    run = tmp_path / "run"
    assert main(["--data", str(store), "--out", str(run), "--brief", "--device=cpu", *options]) == 0
    report, said = looked_at(capsys, tmp_path / "out", "--run", str(run))
    assert report["latents"]["data"]["all"]["count"] == 54 * 32
    assert report["latents"]["data"]["all"]["max_z"] < 10  # clipped, as the run sees them
    assert "behind TukeyClip" in said
    assert report["latents"]["td"]["origin"].startswith("run run (2 steps)")


def test_distances_and_scales_are_looked_at_on_a_store(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["steps=2", "log_every=1", "batch_size=8", "network=DiT(width=8,layers=1,heads=2,patch=4)"]
    options += ["coupling_pool=1", f"autoencoder=PretrainedAutoencoder(load={LOAD!r})"]
    run, out = tmp_path / "run", ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["--data", str(store), "--out", str(run), "--brief", "--device=cpu", *options]) == 0
    capsys.readouterr()
    assert loss_shapes.main(["--run", str(run), "--samples", "400", *out]) == 0
    assert "residuals of run run (2 steps)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "loss_shapes.json").read_text())["advice"] is not None
    assert c_schedules.main([str(run), "--samples", "20", "--images", "30", *out]) == 0
    (found,) = json.loads((tmp_path / "out" / "c_schedules.json").read_text())["runs"]
    assert len(found["spread"]) == 7
    assert [row[0] for row in found["logged"]] == [1, 2]
    few = trained_run(RunFolder(run), 30, torch.device("cpu"))
    assert few.data.shape == (30, 2, 4, 4)
    assert few.labels is not None
    assert few.data.abs().max() < 10  # clipped, as the run sees them


def test_arms_are_compared_on_a_store_within_seconds(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[ablate.Job] = []
    monkeypatch.setattr(ablate, "run_jobs", lambda jobs, out, *_: seen.extend(jobs))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ablation.md").write_text("the table")
    words = ["--seeds", "0", "--arms", "ours", "--suites", "outliers-1%", "--data", str(store), "--seconds", "1"]
    options = ["batch_size=8", "coupling_pool=1", f"autoencoder=PretrainedAutoencoder(load={LOAD!r})"]
    assert main(["ablate", *words, *options, "--out", str(tmp_path / "out"), "--device=cpu"]) == 0
    assert [(job.arm, job.config.data) for job in seen] == [
        (arm, LatentStore(path=str(store.resolve()))) for arm in ("iLCT", "ours")
    ]
    said = json.loads((tmp_path / "out" / "timing.json").read_text())
    timed = {key.partition(",")[0]: seconds for key, seconds in said.items()}
    assert [job.config.steps for job in seen] == [max(1, round(1 / timed[arm])) for arm in ("iLCT", "ours")]
