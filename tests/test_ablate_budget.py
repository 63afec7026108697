"""What the arms of an ablation share: devices, and a budget in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference_trainer.__main__ import main
from reference_trainer.ablation import ablate
from reference_trainer.ablation.ablate import devices_of


@pytest.mark.parametrize(("asked", "given"), [("cpu", ["cpu"]), ("cuda:3", ["cuda:3"]), ("cuda", ["cuda:0", "cuda:1"])])
def test_runs_go_to_the_gpu_that_was_named_or_to_all(asked: str, given: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(torch.device(asked)) == given


def test_under_a_budget_of_seconds_arms_of_other_latents_are_refused_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(ablate, "new_latents", lambda *_: pytest.fail("encoded"))
    words = ["ablate", "--device=cpu", f"--out={tmp_path}", "--seconds=5"]
    assert main([*words, "--arm", "digits", "autoencoder.latent_channels=8"]) == 2
    assert "--seconds measures one size of latents, arm digits autoencoder.latent_channels=8" in capsys.readouterr().err
