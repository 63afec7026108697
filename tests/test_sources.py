"""What ``encode DATA`` reads is what DATA is; what is left out is counted and listed, killed or not."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from reference_trainer.__main__ import main
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import LEFT_OUT, Encoding, encode_folder
from reference_trainer.data.hub import HubImages
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.reading import Source
from reference_trainer.data.sources import source_of
from reference_trainer.data.store import INDEX, Index, Store
from reference_trainer.data.zipped import ZippedImages
from reference_trainer.errors import UserError
from reference_trainer.plotting import OWN_PICTURE
from reference_trainer.presets import digits, on_data

Said = pytest.CaptureFixture


def encode(source: Source, out: Path) -> Index:
    encoding = Encoding(source=source, autoencoder=PixelSpace(), shard=15)
    return encode_folder(encoding, out, torch.device("cpu"), out.with_name("cache"))


def of_folder(folder: Path) -> ImageFolder:
    return ImageFolder(path=str(folder), resolution=16)


def zipped(folder: Path) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as written:
        for each in sorted(folder.rglob("*.png")):
            written.write(each, each.relative_to(folder))
    return file


@pytest.fixture
def splits(image_folder: Path) -> Path:
    """30 images in train/cats and train/dogs, 10 in val/dogs; val/cats is empty."""
    for number, file in enumerate(sorted(image_folder.iterdir())):
        below = image_folder / ("train" if number < 30 else "val") / ("cats" if number < 20 else "dogs")
        below.mkdir(parents=True, exist_ok=True)
        file.rename(below / file.name)
    (image_folder / "val" / "cats").mkdir()
    return image_folder


# Which it is


def test_what_lies_there_decides(image_folder: Path, tmp_path: Path):
    file, saved = zipped(image_folder), tmp_path / "saved"
    assert source_of(str(image_folder), 16) == of_folder(image_folder)
    assert source_of(str(file), 16, split="val") == ZippedImages(path=str(file), split="val", resolution=16)
    file = file.rename(file.with_suffix(".cbz"))
    assert source_of(str(file), 16) == ZippedImages(path=str(file), resolution=16)
    saved.mkdir()
    (saved / "dataset_dict.json").touch()
    columns = {"subset": "a", "image_column": "b", "label_column": "c"}
    for data in (str(saved), "owner/name", "name", "owner/a.b-c_d"):
        found = source_of(data, 16, split="train", **columns)
        assert found == HubImages(path=data, split="train", resolution=16, **columns)


@pytest.mark.parametrize("data", ["/nowhere/photos", "a/b/c", "photos/", "../photos", "~/photos", "ph\0tos", "a" * 300])
def test_what_is_nowhere_and_no_name_is_refused(data: str):
    with pytest.raises(UserError, match=r"there is no .*: give a folder of images, a zip, or|cannot look at"):
        source_of(data, 16)


def test_a_file_that_is_no_zip_is_refused(image_folder: Path):
    with pytest.raises(UserError, match=r"00.png is a file, but no zip: give a zip, a folder of images, or"):
        source_of(str(image_folder / "00.png"), 16)


def test_a_store_is_not_encoded_again(image_folder: Path, tmp_path: Path):
    encode(of_folder(image_folder), tmp_path / "store")
    with pytest.raises(UserError, match=r"store has latents, not images: train on them with --data .*store"):
        source_of(str(tmp_path / "store"), 16)


def test_options_of_a_dataset_are_refused_elsewhere(image_folder: Path):
    with pytest.raises(UserError, match=r"--image-column is for Hugging Face datasets, and .* is none"):
        source_of(str(image_folder), 16, image_column="img")


@pytest.mark.parametrize("kind", [ZippedImages, HubImages])
@pytest.mark.parametrize(("field", "value"), [("resolution", 0), ("resolution", 12), ("held_out_every", 1)])
def test_numbers_out_of_range_are_refused(kind: type, field: str, value: int):
    with pytest.raises(ValueError, match=field):
        kind(path="x", **{field: value})


# Splits and labels of a folder


def test_only_the_split_that_is_named_is_read(splits: Path, tmp_path: Path, capsys: Said):
    index = encode(source_of(str(splits), 16, split="train"), tmp_path / "train")
    assert (index.count, index.label_names) == (30, ("cats", "dogs"))
    (splits / "val" / "eels").mkdir()
    shutil.copy(splits / "train" / "cats" / "00.png", splits / "val" / "eels")
    index = encode(source_of(str(splits), 16, split="val"), tmp_path / "val")
    assert (index.count, index.label_names) == (11, ("cats", "dogs", "eels"))
    assert Store.open(tmp_path / "val").labels_of("held_out") == torch.tensor([1])  # though there are no cats
    assert "1 of 3 class folders below" in capsys.readouterr().out


def test_train_and_val_are_no_classes(splits: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"below .*images are in train, val: say which to read with --split, as in"):
        encode(source_of(str(splits), 16), tmp_path / "store")
    with pytest.raises(UserError, match=r"has no folder test for --split: there are train, val$"):
        source_of(str(splits), 16, split="test")
    assert not (tmp_path / "store").exists()


def test_a_table_of_edm_gives_labels_to_a_folder_too(image_folder: Path, tmp_path: Path):
    names = [file.name for file in sorted(image_folder.iterdir())]
    labels = [number % 3 for number in range(40)]
    table = {"labels": [list(pair) for pair in zip(names, labels, strict=True)]}
    (image_folder / "dataset.json").write_text(json.dumps(table))
    index = encode(of_folder(image_folder), tmp_path / "store")
    assert (index.classes, index.label_names) == (3, None)
    store = Store.open(tmp_path / "store")
    assert store.labels is not None
    assert store.labels.tolist() == labels
    table["labels"][0][1] = 2
    (image_folder / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"is of other images"):
        encode(of_folder(image_folder), tmp_path / "store")


def test_a_label_stays_with_its_image_whatever_is_left_out(splits: Path, tmp_path: Path):
    whole = encode(of_folder(splits / "train"), tmp_path / "a")
    (splits / "train" / "cats" / "07.png").write_bytes(b"no image")
    encode(of_folder(splits / "train"), tmp_path / "b")
    expected = load_file(tmp_path / "a" / whole.shards[0].name)
    found = load_file(tmp_path / "b" / whole.shards[0].name)
    rest = torch.arange(15) != 7
    assert torch.equal(found["latents"], expected["latents"][rest])
    assert torch.equal(found["labels"], expected["labels"][rest])


# What is left out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_left_out_is_counted_and_listed(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, killed: bool
):
    for name in ("07.png", "30.png"):
        (image_folder / name).write_bytes(b"no image")
    own = PngImagePlugin.PngInfo()
    own.add_text("Software", OWN_PICTURE["Software"])
    Image.new("RGB", (16, 16)).save(image_folder / "12.png", pnginfo=own)
    if killed:
        with monkeypatch.context() as patched:
            patched.setattr(Index, "write", lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                encode(of_folder(image_folder), tmp_path / "store")
        (tmp_path / "store" / LEFT_OUT).unlink()
        (tmp_path / "store" / "latents_rank00_shard002.safetensors").unlink()
        capsys.readouterr()
    index = encode(of_folder(image_folder), tmp_path / "store")
    assert (tmp_path / "store" / LEFT_OUT).read_text().splitlines() == [
        "07.png (no image, or of a kind Pillow cannot read)",
        "30.png (no image, or of a kind Pillow cannot read)",
        "12.png (a picture that the trainer drew)",
    ]
    assert index.count == 37
    assert index.preprocessing is not None
    assert (index.preprocessing["images"], index.preprocessing["left_out"]) == (40, 3)
    assert "skipped unreadable images (2 of 40): 07.png" in capsys.readouterr().out


def test_where_nothing_is_left_out_there_is_no_list(image_folder: Path, tmp_path: Path):
    assert encode(of_folder(image_folder), tmp_path / "store").preprocessing == {
        **{"resolution": 16, "square": "largest, centred", "resize": "Lanczos", "images": 40, "left_out": 0},
        "source": {
            **{"kind": "ImageFolder", "path": "images", "resolution": 16, "held_out_every": 10},
            "on_unreadable": "skip",
        },
    }
    assert not (tmp_path / "store" / LEFT_OUT).exists()


def test_stop_stops_at_the_first(image_folder: Path, tmp_path: Path):
    (image_folder / "07.png").write_bytes(b"no image")
    source = ImageFolder(path=str(image_folder), resolution=16, on_unreadable="stop")
    with pytest.raises(UserError, match=r"cannot read .*07.png"):
        encode(source, tmp_path / "store")


# From the command line


def test_a_zip_becomes_a_store_to_train_on(splits: Path, tmp_path: Path, capsys: Said):
    (splits / "train" / "dogs" / "25.png").write_bytes(b"no image")
    file, store = zipped(splits), str(tmp_path / "store")
    words = ["--split", "train", "--resolution", "16", "--autoencoder", "PixelSpace", "--shard", "15"]
    assert main(["encode", str(file), "--out", store, *words]) == 0
    said = capsys.readouterr().out
    assert "29 latents of 3 x 16 x 16 (2 held out, 2 classes) in 2 shards" in said
    assert f"1 of 30 images are left out: {Path(store) / LEFT_OUT} says why" in said
    options = ["steps=2", "batch_size=8", "coupling_pool=1", "network=DiT(width=8,layers=1,heads=2,patch=4)"]
    assert main(["--data", store, "--out", str(tmp_path / "run"), "--brief", *options]) == 0


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("{}", [], "say which to read with --split"),
        ("{}/val", ["--subset", "a"], "--subset is for Hugging Face datasets"),
        ("{}", ["--split", "test"], "has no folder test for --split"),
        ("{}/nowhere", [], "there is no "),
    ],
)
def test_what_does_not_fit_is_one_line(
    splits: Path, tmp_path: Path, capsys: Said, data: str, words: list[str], message: str
):
    assert main(["encode", data.format(splits), "--out", str(tmp_path / "store"), *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "store" / INDEX).exists()


@pytest.mark.parametrize("kind", ["zip", "Hugging Face dataset"])
def test_train_says_to_encode_an_archive_first(image_folder: Path, tmp_path: Path, kind: str):
    data = zipped(image_folder)
    if kind != "zip":
        data = tmp_path / "saved"
        data.mkdir()
        (data / "dataset_dict.json").touch()
    command = rf"`python -m reference_trainer encode \S*{data.name} --out {data.stem}-latents`"
    with pytest.raises(UserError, match=rf"is a {kind}: encode it first with {command}, then train with --data "):
        on_data(digits(), data)
