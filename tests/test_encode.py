"""A folder of images becomes a store, killed or not; training on the store is training on the folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.config import TrainConfig
from reference_trainer.data import encode as encoding_module
from reference_trainer.data.autoencoders import Autoencoder, KLAutoencoder, PixelSpace, PretrainedAutoencoder
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.images import ImageFolder, to_unit
from reference_trainer.data.index import CODEC, INDEX, Index
from reference_trainer.data.store import Store
from reference_trainer.data.stored import LatentStore, StoredImages, autoencoder_from_dict, autoencoder_to_dict
from reference_trainer.errors import UserError
from reference_trainer.evaluation.evaluate import choose_features, evaluate
from reference_trainer.evaluation.table import as_table
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

CPU = torch.device("cpu")
HALF = PretrainedAutoencoder(load="test_encode:load")
FITTED = KLAutoencoder(latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, steps=2, batch_size=4)


class Half:
    """Images at half their size, times ``factor``."""

    factor = 1.0

    def encode(self, images: Tensor) -> Tensor:
        return self.factor * nn.functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents / self.factor, scale_factor=2)


def load() -> Half:
    return Half()


def encoding(folder: Path, autoencoder: Autoencoder = HALF, **options: object) -> Encoding:
    return replace(
        Encoding(source=ImageFolder(path=str(folder), resolution=16), autoencoder=autoencoder, shard=15),
        **options,  # type: ignore[arg-type]
    )


def encode(folder: Path, out: Path, autoencoder: Autoencoder = HALF, **options: object) -> Index:
    return encode_folder(encoding(folder, autoencoder, **options), out, CPU, out.with_name("cache"))


@pytest.fixture
def photos(image_folder: Path) -> Path:
    """The 40 images in three class folders."""
    for number, file in enumerate(sorted(image_folder.iterdir())):
        folder = image_folder / ("cats", "dogs", "eels")[number % 3]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    return image_folder


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


# What is in it


def test_the_store_has_the_latents_of_the_images_in_their_order(photos: Path, tmp_path: Path):
    index = encode(photos, tmp_path / "store")
    images = ImageFolder(path=str(photos), resolution=16).load()
    store = Store.open(tmp_path / "store")
    for part, pixels in (("train", images.train), ("held_out", images.held_out)):
        latents = store.latents(part)  # type: ignore[arg-type]
        assert torch.equal(latents.take(torch.arange(len(latents))), Half().encode(to_unit(pixels)))
    assert (index.count, index.held_out, index.shape) == (40, 4, (3, 8, 8))
    assert [shard.count for shard in index.shards] == [15, 15, 10]


def test_labels_are_the_class_folders_in_the_order_of_their_names(photos: Path, tmp_path: Path):
    index = encode(photos, tmp_path / "store")
    assert index.label_names == ("cats", "dogs", "eels")
    names = ImageFolder(path=str(photos), resolution=16).load().names
    assert names is not None
    expected = torch.tensor([("cats", "dogs", "eels").index(name.partition("/")[0]) for name in names])
    store = Store.open(tmp_path / "store")
    assert store.labels is not None
    assert torch.equal(store.labels, expected)


def test_without_classes_the_shards_still_have_labels_for_lightningdit(image_folder: Path, tmp_path: Path):
    assert encode(image_folder, tmp_path / "store").classes == 0
    tensors = load_file(tmp_path / "store" / "latents_rank00_shard002.safetensors")
    assert torch.equal(tensors["labels"], torch.zeros(10, dtype=torch.long))
    assert Store.open(tmp_path / "store").labels_of("train") is None


def test_flips_are_the_latents_of_the_mirrored_images(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store", flips=True)
    tensors = load_file(tmp_path / "store" / "latents_rank00_shard000.safetensors")
    torch.testing.assert_close(tensors["latents_flip"], tensors["latents"].flip(-1))  # as Half has it
    assert not torch.equal(tensors["latents_flip"], tensors["latents"])


@pytest.mark.parametrize(("dtype", "kind"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_is_that_of_the_latents_and_of_the_statistics(
    image_folder: Path, tmp_path: Path, dtype: str, kind: torch.dtype
):
    index = encode(image_folder, tmp_path / "store", dtype=dtype)
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    rounded = Half().encode(to_unit(images.train)).to(kind)
    assert torch.equal(Store.open(tmp_path / "store").latents().take(torch.arange(36)), rounded.float())
    std, mean = torch.std_mean(rounded.double(), dim=(0, 2, 3))
    torch.testing.assert_close(index.moments["latents"].mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(index.moments["latents"].std, std, rtol=1e-12, atol=1e-12)


def test_the_pieces_of_a_shard_change_nothing(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode(image_folder, tmp_path / "a")
    monkeypatch.setattr(encoding_module, "PIECE", 4)
    encode(image_folder, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("part", [HALF, FITTED, PixelSpace()])
def test_an_autoencoder_is_the_same_behind_the_index(part: Autoencoder):
    assert autoencoder_from_dict(autoencoder_to_dict(part)) == part


# Killed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("autoencoder", [HALF, FITTED])
@pytest.mark.parametrize("shards_done", [0, 1, 3])
def test_a_killed_encode_goes_on_and_ends_with_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoencoder: Autoencoder, shards_done: int
):
    encode(photos, tmp_path / "whole", autoencoder, flips=True)
    write, written = encoding_module.write_shard, []

    def killed_at(file: Path, tensors: dict[str, Tensor], about: dict) -> str:
        if len(written) == shards_done:
            file.with_name(f".{file.name}.1.tmp").write_bytes(b"half")
            raise Killed
        written.append(file.name)
        return write(file, tensors, about)

    with monkeypatch.context() as patched:
        patched.setattr(encoding_module, "write_shard", killed_at)
        if shards_done == 3:  # behind the last shard, before the index
            patched.setattr(Index, "write", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            encode(photos, tmp_path / "killed", autoencoder, flips=True)
    assert not (tmp_path / "killed" / INDEX).exists()
    if shards_done:
        with pytest.raises(UserError, match=r"not finished: run the encode command again"):
            Store.open(tmp_path / "killed")
    again = []
    monkeypatch.setattr(encoding_module, "write_shard", lambda file, *a: (again.append(file.name), write(file, *a))[1])
    encode(photos, tmp_path / "killed", autoencoder, flips=True)
    assert len(again) == 3 - shards_done
    found = {name: data for name, data in content(tmp_path / "killed").items() if not name.startswith(".")}
    assert found == content(tmp_path / "whole")


def test_a_finished_store_stays_as_it_is(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = encode(image_folder, tmp_path / "store")
    monkeypatch.setattr(encoding_module, "write_shard", lambda *_: pytest.fail("written again"))
    again = encode(image_folder, tmp_path / "store")
    assert again.shards == index.shards


@pytest.mark.parametrize(
    "other", [{"dtype": "F16"}, {"flips": True}, {"shard": 7}, {"autoencoder": FITTED}, {"images": 39}], ids=str
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_images_or_options_do_not_mix_with_what_is_there(
    image_folder: Path, tmp_path: Path, other: dict, finished: bool
):
    encode(image_folder, tmp_path / "store")
    if not finished:
        (tmp_path / "store" / INDEX).unlink()
    before = content(tmp_path / "store")
    if "images" in other:
        (image_folder / "00.png").unlink()
    options = {name: value for name, value in other.items() if name != "images"}
    with pytest.raises(UserError, match=r"is of other images, another autoencoder or other options: give another"):
        encode(image_folder, tmp_path / "store", **options)
    assert content(tmp_path / "store") == before


def test_before_the_first_shard_the_codec_tells_what_was_begun(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store")
    for file in (tmp_path / "store").glob("*.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"was begun with other images or options"):
        encode(image_folder, tmp_path / "store", flips=True)


def test_shards_without_their_codec_are_not_gone_on_with(image_folder: Path, tmp_path: Path):
    encode(image_folder, tmp_path / "store")
    (tmp_path / "store" / INDEX).unlink()
    (tmp_path / "store" / CODEC).unlink()
    with pytest.raises(UserError, match=r"has shards, but no .*codec.safetensors: put it back"):
        encode(image_folder, tmp_path / "store")


# Images and autoencoders that do not fit


def test_a_corrupt_image_is_left_out_and_said_once(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (image_folder / "07.png").write_bytes(b"no image")
    (image_folder / "30.png").write_bytes((image_folder / "30.png").read_bytes()[:60])
    index = encode(image_folder, tmp_path / "store")
    assert index.count == 38
    images = ImageFolder(path=str(image_folder), resolution=16).load()
    latents = Store.open(tmp_path / "store").latents()
    assert torch.equal(latents.take(torch.arange(len(latents))), Half().encode(to_unit(images.train)))
    mean = Half().encode(to_unit(images.train)).double().mean((0, 2, 3))  # no held-out image among them
    torch.testing.assert_close(index.moments["latents"].mean, mean, rtol=1e-12, atol=1e-12)
    said = [line for line in capsys.readouterr().out.splitlines() if "unreadable images (2 of 40)" in line]
    assert len(said) == 2  # by the encode and by the load above


def test_a_shard_of_unreadable_images_is_empty(image_folder: Path, tmp_path: Path):
    for number in range(15, 30):
        (image_folder / f"{number}.png").write_bytes(b"")
    assert [shard.count for shard in encode(image_folder, tmp_path / "store").shards] == [15, 0, 10]
    assert len(Store.open(tmp_path / "store").latents()) == 23


def test_too_few_images_are_refused_before_anything_is_fitted(image_folder: Path, tmp_path: Path):
    for number in range(9, 40):
        (image_folder / f"{number:02}.png").unlink()
    with pytest.raises(UserError, match=r"9 readable images below .*, need at least 10"):
        encode(image_folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_latents_too_large_for_float16_are_refused(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Half, "factor", 1e6)
    with pytest.raises(UserError, match=r"of 15 images .* \(00.png, 01.png, 02.png and 12 more\): .*--dtype float32"):
        encode(image_folder, tmp_path / "store", dtype="F16")
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_latents_that_are_nan_name_their_images(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = to_unit(ImageFolder(path=str(image_folder), resolution=16).load().pixels[33])

    def encode_badly(self: Half, images: Tensor) -> Tensor:
        latents = nn.functional.avg_pool2d(images, 2)
        latents[(images == bad).flatten(1).all(1)] = torch.nan
        return latents

    monkeypatch.setattr(Half, "encode", encode_badly)
    with pytest.raises(UserError, match=r"latents of 1 images are NaN or infinite .33.png.: mend the autoencoder"):
        encode(image_folder, tmp_path / "store")
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2  # what was written stays


def test_a_disk_that_fills_leaves_whole_shards(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode(image_folder, tmp_path / "whole")
    replace_file = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name.endswith("shard001.safetensors"):
            raise OSError(28, "No space left on device")
        return replace_file(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=r"shard001.*No space left.*run the same command again"):
            encode(image_folder, tmp_path / "store")
    assert [file.name for file in (tmp_path / "store").glob("*.*")] == ["latents_rank00_shard000.safetensors"]
    encode(image_folder, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_many_images_fit_an_autoencoder_on_some(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(encoding_module, "FIT_MOST", 12)
    assert encode(image_folder, tmp_path / "store", FITTED).count == 40
    assert "the autoencoder is fitted on 12 of 40 images" in capsys.readouterr().out


# Training on it


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
