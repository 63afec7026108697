"""The variance of samples is foretold before training, and what runs came to stands beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analysis.variance import in_groups, main, measured_of
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.errors import UserError
from reference_trainer.presets import flow_map, ilct
from reference_trainer.run import RunFolder
from robustcm.gates import Above
from robustcm.teacher_input import CovarianceKept

CONFIG = TrainConfig()


def claimed(root: Path, config: TrainConfig) -> RunFolder:
    run = RunFolder(root)
    with run.locked():
        run.claim(config)
    return run


def test_dense_levels_keep_the_variance_and_a_gate_adds_what_its_step_adds():
    variances = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    covariance = CovarianceKept(torch.zeros(5), torch.eye(5), variances, 0.4 * variances.sqrt())
    alone = in_groups(covariance, None, 20_000, CONFIG)
    assert all(value == pytest.approx(1, abs=2e-3) for value in alone.values())
    gate = 1.3
    coupled = in_groups(covariance, Above(gate), 20_000, CONFIG)
    ratio = 1 + 2 * gate * covariance.along / (variances + gate**2)
    at_start = 1 + 2 * covariance.along / 80  # the sampler begins with 80 z, not with x + 80 z
    expected = (ratio / at_start * variances)[:4].sum() / variances[:4].sum()
    assert coupled["variance_first_4"] == pytest.approx(float(expected), abs=5e-3)
    assert set(coupled) == {"variance_first_4", "variance_next_12"}  # of five components none is left


def test_a_constant_component_has_no_part_in_it():
    variances = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.1, 0.1, 0.0], dtype=torch.float64)
    with_it, without = (
        in_groups(CovarianceKept(torch.zeros(len(v)), torch.eye(len(v)), v, torch.zeros_like(v)), None, 41, CONFIG)
        for v in (variances, variances[:-1])
    )
    assert with_it == without


@pytest.mark.usefixtures("drawn_pictures")
def test_the_script_tells_it_of_the_digits_and_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = claimed(tmp_path / "run", ilct())
    row = {"variance_first_4": 0.81, "variance_next_12": 0.77, "variance_rest": 0.66}
    (run.root / "evaluation.json").write_text(json.dumps({"latents": {"rows": {"1 evaluation": row}}}))
    out = tmp_path / "out"
    assert main([str(run.root), "--autoencoder", "PixelSpace", "--images", "300", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0.81      0.77      0.66" in said
    assert "covariance not kept" in said
    found = json.loads((out / "variance.json").read_text())
    alone, gated = (found["foretold"][name]["41"] for name in ("no coupling", "above the gate"))
    assert all(alone[name] < min(1, gated[name]) for name in alone)
    assert found["measured"]["run"]["levels"] == 41
    assert (out / "variance.png").stat().st_size > 10_000


def test_too_few_images_for_a_batch_are_said_before_an_autoencoder_is_fitted(
    tmp_path: Path, noise_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(KLAutoencoder, "fit", lambda *_: pytest.fail("fitted"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["--images", "100", *out]) == 2
    assert "batch_size=256 is larger than the 100 training images" in capsys.readouterr().err
    assert main(["--data", str(noise_folder), "--resolution", "8", *out]) == 2
    assert "is larger than the 36 training images" in capsys.readouterr().err


def test_runs_without_what_is_compared_are_refused_in_a_line(tmp_path: Path):
    run = claimed(tmp_path / "run", ilct())
    with pytest.raises(UserError, match=r"no evaluation\.json"):
        measured_of(run)
    (run.root / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="no figures of latents"):
        measured_of(run)
    other = claimed(tmp_path / "other", flow_map())
    (other.root / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="grid of levels"):
        measured_of(other)
