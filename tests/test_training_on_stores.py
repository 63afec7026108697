"""Training on a store is training on the folder it was made from; a store that does not fit is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encode import CPU, FITTED, HALF, Half, encode
from torch import Tensor

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import Autoencoder, PretrainedAutoencoder
from reference_trainer.data.images import ImageFolder, to_pixels
from reference_trainer.data.stored import LatentStore, StoredImages
from reference_trainer.errors import UserError
from reference_trainer.evaluation.beforehand import Beforehand
from reference_trainer.evaluation.evaluate import OF_A_STORE, choose_features, evaluate
from reference_trainer.evaluation.table import as_table
from reference_trainer.evaluation.training_set import raw_latents
from reference_trainer.model import load_model
from reference_trainer.networks import DiT
from reference_trainer.presets import digits, ilct, on_data
from reference_trainer.run import RunFolder
from reference_trainer.training import batches as batches_module
from reference_trainer.training.batches import Batches
from reference_trainer.training.loop import train
from reference_trainer.training.start import latents_of_run
from robustcm.fences import ConditionalClip, TukeyClip
from robustcm.semidiscrete import Semidiscrete


def tiny(config: TrainConfig) -> TrainConfig:
    return replace(config, network=DiT(width=8, layers=1, heads=2, patch=4), batch_size=8, steps=3, coupling_pool=1)


def on_store(out: Path) -> TrainConfig:
    return tiny(on_data(ilct(), out))


def test_a_store_brings_its_autoencoder(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store", FITTED)
    config = on_data(digits(), tmp_path / "store")
    assert config.data == LatentStore(path=str(tmp_path / "store"))
    assert config.autoencoder == FITTED
    assert isinstance(config.clip, TukeyClip)


@pytest.mark.parametrize("clip", [None, TukeyClip(k=0.5)])
@pytest.mark.parametrize("flips", [False, True])
def test_batches_of_a_store_are_those_of_the_folder(photos: Path, tmp_path: Path, clip: TukeyClip | None, flips: bool):
    encode(photos, tmp_path / "store", flips=flips)
    stored = replace(on_store(tmp_path / "store"), clip=clip)
    stored = replace(stored, data=LatentStore(path=str(tmp_path / "store"), flips=flips))
    images = stored.load_images(CPU)
    theirs, space = latents_of_run(stored, RunFolder(tmp_path / "a"), images, tmp_path, CPU)
    folder = ImageFolder(path=str(photos), resolution=16).load()
    if flips:
        pixels = torch.cat([folder.train, folder.train.flip(-1), folder.held_out])
        folder = replace(folder, pixels=pixels, names=None, is_held_out=torch.arange(76) >= 72)
    config = replace(stored, autoencoder=HALF)
    ours, of_folder = latents_of_run(config, RunFolder(tmp_path / "b"), folder, tmp_path, CPU)
    torch.testing.assert_close(space.mean, of_folder.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(space.std, of_folder.std, rtol=1e-5, atol=0)
    assert space.recognised_at == pytest.approx(of_folder.recognised_at, rel=1e-4)
    labels = images.train_labels
    assert labels is not None
    assert len(labels) == images.num_train == len(theirs) == (72 if flips else 36)
    for step in (0, 7):
        here, there = Batches(stored, theirs, labels)(step), Batches(config, ours)(step)
        torch.testing.assert_close(here.x, there.x, rtol=1e-4, atol=1e-5)
        assert torch.equal(here.z, there.z)


@pytest.mark.parametrize("autoencoder", [HALF, FITTED])
def test_a_run_on_a_store_is_trained_continued_and_judged(image_folder: Path, tmp_path: Path, autoencoder: Autoencoder):
    encode(image_folder, tmp_path / "store", autoencoder, flips=True)
    config, run = on_store(tmp_path / "store"), RunFolder(tmp_path / "run")
    images = config.load_images(CPU)
    run.claim(config)
    assert train(config, run, images, tmp_path / "cache", CPU)
    assert RunFolder(tmp_path / "run").config() == config
    for checkpoint in run.checkpoints():
        weights = load_file(checkpoint)
        checkpoint.unlink()
    assert train(config, run, config.load_images(CPU), tmp_path / "cache", CPU)  # in the space that was kept
    again = load_file(run.checkpoints()[0])
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    shutil.rmtree(tmp_path / "store" / "autoencoder")  # the run has what it needs to sample
    model = load_model(run, CPU)
    evaluation = evaluate(model, images, choose_features(None, model))
    assert "36 training images of store, decoded from its latents (reconstructions)" in as_table(evaluation)
    assert "reconstructions" not in evaluation["rows"]


def test_the_whole_path_from_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    words = ["--resolution", "16", "--autoencoder", HALF.load, "--dtype", "bfloat16", "--flips", "--shard", "16"]
    assert main(["encode", str(photos), "--out", store, *words]) == 0
    said = capsys.readouterr().out
    assert "40 latents of 3 x 8 x 8 (4 held out, 3 classes) in 3 shards" in said
    options = ["steps=2", "batch_size=8", "coupling_pool=1", "network=DiT(width=8,layers=1,heads=2,patch=4)"]
    assert main(["--data", store, "--out", run, "data.flips=True", "--brief", *options]) == 0
    assert main(["evaluate", run]) == 0
    assert "decoded from its latents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "0"], "a shard needs at least 1 image"),
        (["--resolution", "17"], "resolution must be a multiple of 8"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--autoencoder", "nowhere:load"], "autoencoder nowhere:load: expected module:function"),
        (["--autoencoder", "KLAutoencoder(stepz=3)"], "KLAutoencoder has no stepz"),
    ],
)
def test_words_that_do_not_fit_are_one_line(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
):
    assert main(["encode", str(image_folder), "--out", str(tmp_path / "store"), *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "store").exists()


def test_another_autoencoder_than_the_stores_is_refused(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store")
    config = replace(on_store(tmp_path / "store"), autoencoder=FITTED)
    with pytest.raises(UserError, match=r"is of the autoencoder PretrainedAutoencoder.*the configuration says KLAuto"):
        config.load_images(CPU)


def test_an_autoencoder_that_changed_behind_its_name_is_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode(image_folder, tmp_path / "store")
    monkeypatch.setattr(Half, "factor", 2.0)
    with pytest.raises(UserError, match=r"was encoded by another autoencoder .*encodes differently"):
        on_store(tmp_path / "store").load_images(CPU)


def test_a_store_that_changed_behind_a_run_is_refused(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store")
    config, run = on_store(tmp_path / "store"), RunFolder(tmp_path / "run")
    run.claim(config)
    assert train(config, run, config.load_images(CPU), tmp_path / "cache", CPU)
    shutil.rmtree(tmp_path / "store")
    (image_folder / "00.png").unlink()
    encode(image_folder, tmp_path / "store")
    with pytest.raises(UserError, match=r"was made from something else"):
        train(config, run, config.load_images(CPU), tmp_path / "cache", CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": ConditionalClip()}, "is fitted on 5 samples an element or more, .* got 36 of 192: use TukeyClip"),
        (
            {"objective": replace(ilct().objective, coupler=Semidiscrete())},
            "holds them all in memory: 6000 numbers at most, 6912 here",
        ),
        ({"batch_size": 37}, "batch_size=37 is larger than the 36 training images"),
    ],
)
def test_what_a_store_has_too_few_or_too_many_latents_for_is_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
):
    monkeypatch.setattr(batches_module, "MOST_PAIRED", 6000)
    encode(image_folder, tmp_path / "store")
    config = replace(on_store(tmp_path / "store"), **change)
    with pytest.raises(UserError, match=message):
        train(config, RunFolder(tmp_path / "run"), config.load_images(CPU), tmp_path / "cache", CPU)


def test_latents_of_somebody_elses_train_with_the_autoencoder_that_is_named(tmp_path: Path):
    latents = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "store").mkdir()
    save_file({"latents": latents, "labels": torch.arange(30) % 2}, tmp_path / "store" / "a.safetensors")
    config = on_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"does not say which autoencoder .* name it with autoencoder="):
        config.load_images(CPU)
    config = replace(config, autoencoder=HALF)
    images = config.load_images(CPU)
    assert isinstance(images, StoredImages)
    assert images.train_labels is not None
    run = RunFolder(tmp_path / "run")
    run.claim(config)
    assert train(config, run, images, tmp_path / "cache", CPU)


def test_latents_of_other_channels_than_the_autoencoders_are_refused(tmp_path: Path):
    save_file({"latents": torch.rand(30, 3, 8, 9)}, tmp_path / "a.safetensors")

    class Wide(Half):
        def encode(self, images: Tensor) -> Tensor:
            return images

    import test_encode

    test_encode.wide = Wide  # type: ignore[attr-defined]
    config = replace(on_store(tmp_path), autoencoder=PretrainedAutoencoder(load="test_encode:wide"))
    with pytest.raises(UserError, match=r"has latents \[3, 8, 9\], the autoencoder makes \[3, 16, 18\]"):
        config.load_images(CPU)


class Bright:
    """An encoder and a decoder that are not the inverse of each other."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(2 * latents + 0.1, scale_factor=2)


def bright() -> Bright:
    return Bright()


@pytest.mark.parametrize("clip", [None, TukeyClip(k=0.5)])
def test_samples_are_compared_with_the_latents_of_the_store_and_what_these_decode_to(
    photos: Path, tmp_path: Path, clip: TukeyClip | None
):
    """Encoded once more, they are others: a model that draws them would be found wanting."""
    encode(photos, tmp_path / "store", PretrainedAutoencoder(load="test_training_on_stores:bright"))
    config = replace(on_store(tmp_path / "store"), clip=clip)
    images = config.load_images(CPU)
    assert isinstance(images, StoredImages)
    run = RunFolder(tmp_path / "run")
    run.claim(config)
    assert train(config, run, images, tmp_path / "cache", CPU)
    model = load_model(run, CPU)
    features = choose_features(None, model)
    found = Beforehand.of(model, images, features, seed=3)
    drawn = raw_latents(images, torch.arange(len(images.pixels)), model.space.codec, CPU)
    assert torch.equal(to_pixels(Bright().decode(drawn)), images.pixels)
    here = [int((images.pixels == one).flatten(1).all(1).nonzero()[0]) for one in found.train.first]
    torch.testing.assert_close(found.reference.latents, model.space.normalise(drawn[here]))
    assert found.reference.reconstructions is found.reference.images
    assert ("reconstructions" in found.rows) == (clip is not None)
    halves = found.rows["floor: half against half"]
    assert halves["frechet"] == pytest.approx(halves["frechet_rec"])
    if clip is not None:
        assert found.rows["reconstructions"]["psnr"] < 40
    assert OF_A_STORE in evaluate(model, images, features, seed=3, ahead=found)["notes"]
