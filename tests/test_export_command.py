"""The command `export`: the folder, its card, and the document that tells of it, whose snippets run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
)
from exports import CPU, SHAPE, TOKEN, generator, opened, trained

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.from_diffusers import DiffusersAutoencoder
from reference_trainer.evaluation.evaluate import Evaluator, choose_features, evaluate, write_evaluation
from reference_trainer.export import few_step_pipeline
from reference_trainer.export.card import _shortened
from reference_trainer.export.folder import export
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train

ROOT = Path(__file__).parents[1]


def python_in(document: Path) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default run on a few digits, in three steps, with an export of it beside it."""
    root = tmp_path_factory.mktemp("exported")
    config = replace(
        TrainConfig(), network=DiT(width=16, layers=1), autoencoder=KLAutoencoder(steps=2), steps=3, batch_size=32,
        clip=None, second_sigma=0.5,
    )  # fmt: skip
    run, digits = RunFolder(root / "run"), config.data.load()
    pick = torch.randperm(len(digits.pixels), generator=generator())[:100]
    few = replace(digits, pixels=digits.pixels[pick], labels=digits.labels[pick], is_held_out=digits.is_held_out[pick])
    with run.locked():
        run.claim(config)
        train(config, run, few, root / "cache", CPU, Evaluator(run, few))
    model = load_model(run, CPU)
    write_evaluation(run, evaluate(model, few, choose_features(None, model), bounds=False))
    assert main(["export", str(run.root), "--out", str(root / "digits-export"), "--device=cpu"]) == 0
    return root


def test_the_card_says_what_it_is_and_how_it_was_measured(exported: Path):
    text = (exported / "digits-export" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "diffusers"
    assert "consistency-model" in header["tags"]
    measured = json.loads((exported / "run" / "evaluation.json").read_text())
    assert json.dumps(measured["manifest"], indent=1) in text
    assert f"{measured['rows']['1 evaluation']['frechet']:.2f}" in text
    assert "steps=3" in text
    assert f"{measured['manifest']['reference']['n']} training images (" in text
    assert (exported / "digits-export" / "samples.png").stat().st_size > 100
    recipe = json.loads((exported / "digits-export" / "recipe.json").read_text())
    assert recipe == json.loads((exported / "run" / "config.json").read_text())


def test_a_card_of_other_weights_has_no_figures(exported: Path, tmp_path: Path):
    words = ["export", str(exported / "run"), "--out", str(tmp_path / "out"), "--average", "Exponential(decay=0)"]
    assert main([*words, "--device=cpu"]) == 0
    assert "not evaluated before the export" in (tmp_path / "out" / "README.md").read_text()


def test_no_path_of_the_machine_stands_in_the_folder(exported: Path, tmp_path: Path):
    vae = AutoencoderKL(latent_channels=SHAPE[0], norm_num_groups=4, block_out_channels=(8,))
    vae.save_pretrained(tmp_path / "vae")
    codec = DiffusersAutoencoder(name=str(tmp_path / "vae")).build(3, {})
    export(trained(TOKEN, codec=codec), tmp_path / "out")
    folders = exported / "digits-export", tmp_path / "out"
    files = [file for root in folders for file in root.rglob("*") if file.suffix in (".json", ".md", ".py")]
    assert len(files) > 8
    found = [file.name for file in files if re.search(f"{exported}|{tmp_path}|_name_or_path", file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("data=ImageFolder(path='/home/me/photos', resolution=64)", "data=ImageFolder(path='photos', resolution=64)"),
        ("autoencoder=DiffusersAutoencoder(name='stabilityai/sd-vae')", None),
        ('"path": "/home/me/my photos"', '"path": "my photos"'),
    ],
)
def test_paths_are_shortened_and_names_on_the_hub_are_not(text: str, short: str | None):
    assert _shortened(text) == (short or text)


def test_the_document_s_snippets_run_and_draw_the_run_s_images(exported: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(exported)
    opened(exported / "digits-export", monkeypatch)  # for the place of its code
    names: dict[str, Any] = {}
    for snippet in python_in(ROOT / "docs" / "export.md"):
        exec(snippet, names)
    pipe = opened(exported / "digits-export", monkeypatch)
    z, rng = names["z"], torch.Generator().manual_seed(0)
    torch.randn(16, 2, 4, 4, generator=rng)
    images = pipe(latents=z, num_inference_steps=2, generator=rng, output_type="pt").images
    torch.testing.assert_close(images, (names["images"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_the_card_s_snippet_runs(exported: Path, monkeypatch: pytest.MonkeyPatch):
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (exported / "digits-export" / "README.md").read_text(), re.S | re.M
    )
    opened(exported / "digits-export", monkeypatch)
    monkeypatch.chdir(exported / "digits-export")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert [image.size for image in names["images"]] == [(32, 32)] * 4


def test_the_shipped_class_is_what_the_index_names(exported: Path):
    index = json.loads((exported / "digits-export" / "model_index.json").read_text())
    module, name = index["_class_name"]
    assert getattr(few_step_pipeline, name).__module__.endswith(module)
