"""`evaluate` and `sample` draw as many images, and of the seed, that the command line asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reference_trainer.__main__ import main
from reference_trainer.evaluation.sets import SAMPLES


@pytest.fixture
def root(tiny: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run folder to write into."""
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny[0].root, tmp_path / "run")
    return str(tmp_path / "run")


def evaluated(root: str, *options: str) -> dict[str, Any]:
    assert main(["evaluate", root, "--device=cpu", *options]) == 0
    return json.loads(Path(root, "evaluation.json").read_text())


def test_evaluate_draws_so_many_samples_as_asked_and_of_that_seed(root: str):
    zero, one = (evaluated(root, "--samples=20", f"--seed={seed}") for seed in (0, 1))
    for name in SAMPLES:
        assert zero["rows"][name]["n"] == one["rows"][name]["n"] == 20
        assert zero["rows"][name]["frechet"] != one["rows"][name]["frechet"]
    assert (zero["seed"], one["seed"]) == (0, 1)
    assert zero["reference"].startswith("20 training images")


def test_sample_draws_the_images_of_its_seed(root: str, tmp_path: Path):
    pictures = []
    for seed in (1, 1, 0):
        out = tmp_path / "drawn.png"
        assert main(["sample", root, "--device=cpu", "--n=4", f"--seed={seed}", f"--out={out}"]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert main(["sample", root, "--device=cpu", "--n=4", f"--out={out}"]) == 0
    assert out.read_bytes() == pictures[2]
