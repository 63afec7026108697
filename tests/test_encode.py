"""A folder of images becomes a store, killed or not, whose bytes depend on the images and options alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reference_trainer.data import encode as encoding_module
from reference_trainer.data.autoencoders import Autoencoder, KLAutoencoder, PixelSpace, PretrainedAutoencoder
from reference_trainer.data.encode import Encoding, encode_folder, images_to_fit, split_of
from reference_trainer.data.images import ImageFolder, to_unit
from reference_trainer.data.index import CODEC, INDEX, Index
from reference_trainer.data.store import Store
from reference_trainer.data.stored import autoencoder_from_dict, autoencoder_to_dict
from reference_trainer.errors import UserError

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


def test_latents_that_are_all_nan_keep_nothing_and_the_mended_autoencoder_is_taken(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(Half, "factor", float("nan"))
        with pytest.raises(UserError, match=r"test_encode:load gives NaN or infinite latents of each .*: mend it"):
            encode(image_folder, tmp_path / "store")
    assert not (tmp_path / "store" / CODEC).exists()
    assert encode(image_folder, tmp_path / "store").count == 40


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


def fitted_on(folder: Path, autoencoder: Autoencoder = FITTED) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the images that are fitted on where there are many, and all names in the order of a folder."""
    asked = encoding(folder, autoencoder)
    files = asked.source.open()
    names = images_to_fit(asked, files, split_of(asked, files)).names
    return names or (), tuple(map(files.name, range(len(files))))


@pytest.mark.parametrize("broken", [(), (0,), (9,), (3, 4, 17), (12, 38)])
def test_nothing_that_is_held_out_is_fitted_on_whatever_cannot_be_read(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]
):
    files = sorted(image_folder.iterdir())
    for number in broken:
        files[number].write_bytes(b"no image")
    in_store = ImageFolder(path=str(image_folder), resolution=16).load()
    trained = [name for name, held_out in zip(in_store.names or (), in_store.is_held_out, strict=True) if not held_out]
    monkeypatch.setattr(encoding_module, "FIT_MOST", 12)
    monkeypatch.setattr(encoding_module, "PIECE", 7)
    fitted, names = fitted_on(image_folder)
    assert len(fitted) == 12
    assert set(fitted) <= set(trained)
    if not broken:  # as it always was
        places = [i for i in range(40) if i % 10 != 9]
        assert fitted == tuple(names[places[3 * i]] for i in range(12))


def test_an_autoencoder_that_is_not_fitted_reads_no_more_than_it_is_tried_on(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoding_module, "PIECE", 7)
    seen = list[int]()
    read = encoding_module.read
    monkeypatch.setattr(
        encoding_module, "read", lambda files, part, *more: seen.extend(part) or read(files, part, *more)
    )
    fitted_on(image_folder, HALF)
    assert len(seen) == 7
