"""A zip of a folder is read as the folder, in memory; what is wrong with it is named, and nothing is written."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reference_trainer.data import zipped
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import LEFT_OUT, Encoding, encode_folder
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.index import Index
from reference_trainer.data.reading import Notes, Source, read
from reference_trainer.data.store import Store
from reference_trainer.data.zipped import ZippedFiles, ZippedImages
from reference_trainer.errors import UserError

Said = pytest.CaptureFixture


def png(brightness: int = 99) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (brightness, 30, 200)).save(stream, "PNG")
    return stream.getvalue()


def zip_of(file: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file


def opened(file: Path, split: str | None = None) -> ZippedFiles:
    return ZippedImages(path=str(file), split=split, resolution=16).open()


def labels(files: ZippedFiles) -> list[int] | None:
    return None if files.labels is None else files.labels.of.tolist()


def encode(source: Source, out: Path) -> Index:
    encoding = Encoding(source=source, autoencoder=PixelSpace(), shard=15)
    return encode_folder(encoding, out, torch.device("cpu"), out.with_name("cache"))


@pytest.fixture
def folder(photos: Path) -> Path:
    """``photos``, and among its class folders one without any."""
    (photos / "deer").mkdir()
    return photos


def packed(folder: Path, file: Path, below: str = "") -> Path:
    members = {}
    for each in sorted(folder.rglob("*"), reverse=True):  # the order in the zip is anybody's
        name = below + each.relative_to(folder).as_posix()
        members[f"{name}/" if each.is_dir() else name] = b"" if each.is_dir() else each.read_bytes()
    return zip_of(file, members)


# As a folder


@pytest.mark.parametrize("below", ["", "photos/", "a/b/"])
def test_the_store_of_a_zip_is_that_of_the_folder(folder: Path, tmp_path: Path, below: str):
    (folder / "dogs" / "01.png").write_bytes(b"no image")
    of_folder = encode(ImageFolder(path=str(folder), resolution=16), tmp_path / "a")
    file = packed(folder, tmp_path / "photos.zip", below)
    of_zip = encode(ZippedImages(path=str(file), resolution=16), tmp_path / "b")
    assert of_zip.label_names == of_folder.label_names == ("cats", "deer", "dogs", "eels")
    assert of_zip.count == of_folder.count == 39
    one, other = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    for part in ("train", "held_out"):
        indices = torch.arange(len(one.latents(part)))
        assert torch.equal(one.latents(part).take(indices), other.latents(part).take(indices))
        assert torch.equal(one.labels_of(part), other.labels_of(part))  # type: ignore[arg-type]
    assert (tmp_path / "a" / LEFT_OUT).read_text() == (tmp_path / "b" / LEFT_OUT).read_text()


def test_another_zip_does_not_go_on_with_the_store(folder: Path, tmp_path: Path):
    file = packed(folder, tmp_path / "photos.zip")
    source = ZippedImages(path=str(file), resolution=16)
    index = encode(source, tmp_path / "store")
    assert index.preprocessing is not None
    assert index.preprocessing["source"] == {
        **{"kind": "ZippedImages", "path": "photos.zip", "resolution": 16, "held_out_every": 10}
    }
    moved = file.rename(tmp_path / "moved.zip")
    assert encode(replace(source, path=str(moved)), tmp_path / "store").shards == index.shards
    content = bytearray((folder / "eels" / "02.png").read_bytes())
    content[-20] ^= 1  # as long, and not the same
    (folder / "eels" / "02.png").write_bytes(content)
    with pytest.raises(UserError, match=r"is of other images, another autoencoder or other options"):
        encode(replace(source, path=str(packed(folder, moved))), tmp_path / "store")


@pytest.mark.parametrize(
    "other", [{"labels": [["00/a.png", 1], ["00/b.png", 0]]}, {"labels": [["00/a.png", 0], ["00/b.png", 5]]}]
)
def test_other_labels_make_another_recipe(tmp_path: Path, other: dict):
    images = {"00/a.png": png(), "00/b.png": png()}
    recipes = set()
    for table in ({"labels": [["00/a.png", 0], ["00/b.png", 1]]}, other):
        file = zip_of(tmp_path / "x.zip", images | {"dataset.json": json.dumps(table).encode()})
        source = ZippedImages(path=str(file))
        recipes.add(Encoding(source=source, autoencoder=PixelSpace()).recipe(source.open()))
    assert len(recipes) == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_pixels_are_those_that_went_in(tmp_path: Path, method: int):
    files = opened(zip_of(tmp_path / "x.zip", {f"{i}.png": png(i) for i in (3, 250)}, method))
    pixels, kept = read(files, range(2), 8, Notes())
    assert pixels[:, 0, 0, 0].tolist() == [250, 3]  # "250.png" comes first
    assert kept == (0, 1)


# What is in it


def test_hidden_members_and_copies_are_passed_over(tmp_path: Path):
    members = {name: png() for name in ("a.png", ".b.png", "__MACOSX/a.png", "c/.d/e.png", "c/@eaDir/f.png")}
    assert opened(zip_of(tmp_path / "x.zip", members | {"notes.txt": b""})).names == ("a.png",)


def test_the_order_is_that_of_the_folders(tmp_path: Path):
    names = ("a/1.png", "a b/1.png", "a.x/1.png")  # as texts, "a b" and "a.x" come before "a/"
    assert opened(zip_of(tmp_path / "x.zip", {name: png() for name in reversed(names)})).names == names


def test_only_the_split_is_read(tmp_path: Path):
    members = {f"x/{split}/{kind}/1.png": png() for split in ("train", "val") for kind in ("cat", "dog")}
    file = zip_of(tmp_path / "x.zip", members)
    assert opened(file, "val").names == ("cat/1.png", "dog/1.png")
    assert labels(opened(file, "val")) == [0, 1]
    with pytest.raises(UserError, match=r"in .*x.zip/x are in train, val: say which to read with --split"):
        opened(file)
    with pytest.raises(UserError, match=r"no image files in .*x.zip/x/test: for --split there are train, val$"):
        opened(file, "test")


def test_the_only_split_is_not_taken_for_the_folder_of_all(tmp_path: Path):
    file = zip_of(tmp_path / "x.zip", {"train/cat/1.png": png(), "train/dog/1.png": png()})
    with pytest.raises(UserError, match=r"are in train: say which to read with --split, as in --split train"):
        opened(file)
    assert labels(opened(file, "train")) == [0, 1]


def test_labels_of_edm_count_and_its_folders_do_not(tmp_path: Path):
    members = {f"{i:05}/img{i:08}.png": png() for i in range(4)}
    table = {"labels": [[name, 3 - i] for i, name in enumerate(members)]}
    file = zip_of(tmp_path / "x.zip", members | {"dataset.json": json.dumps(table).encode()})
    assert labels(opened(file)) == [3, 2, 1, 0]
    assert labels(opened(zip_of(tmp_path / "x.zip", members | {"dataset.json": b'{"labels": null}'}))) is None


def test_a_table_is_found_beside_the_folder_of_all(tmp_path: Path):
    members = {"faces/00/a.png": png(), "faces/00/b.png": png()}
    table = json.dumps({"labels": [["00/a.png", 1], ["00/b.png", 0]]}).encode()
    assert labels(opened(zip_of(tmp_path / "x.zip", members | {"faces/dataset.json": table}))) == [1, 0]


# What is wrong with it


def test_a_corrupt_member_is_named_and_the_others_are_read(tmp_path: Path):
    file = zip_of(tmp_path / "x.zip", {"a.png": png(), "b.png": png(), "c.png": b"", "d.png": b"no"}, 0)
    content = bytearray(file.read_bytes())
    content[content.index(b"b.png") + 40] ^= 255
    file.write_bytes(content)
    notes = Notes()
    _, kept = read(opened(file), range(4), 8, notes)
    assert kept == (0,)
    assert [line.partition(" ")[0] for line in notes.unreadable] == ["b.png", "c.png", "d.png"]
    assert "Bad CRC-32" in notes.unreadable[0]


def test_a_bomb_is_named_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zipped, "MOST_BYTES", 2**20)
    file = zip_of(tmp_path / "x.zip", {"a.png": png(), "bomb.png": png() + bytes(2**22)})
    assert file.stat().st_size < 2**14
    notes = Notes()
    _, kept = read(opened(file), range(2), 8, notes)
    assert kept == (0,)
    assert notes.unreadable == ["bomb.png (it unpacks to more than 1 MiB)"]


def test_a_table_that_is_a_bomb_or_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zipped, "MOST_BYTES", 2**20)
    file = zip_of(tmp_path / "x.zip", {"a.png": png(), "dataset.json": bytes(2**22)})
    with pytest.raises(UserError, match=r"cannot read dataset.json in .* \(it unpacks to more than 1 MiB\)"):
        opened(file)


def test_names_that_lead_out_are_said_and_nothing_is_written(tmp_path: Path, capsys: Said):
    names = ["a.png", "../b.png", "/c.png", "d/../../e.png", "..\\f.png"]
    (tmp_path / "below").mkdir()
    file = zip_of(tmp_path / "below" / "x.zip", {name: png() for name in names})
    files = opened(file)
    read(files, range(len(files)), 8, Notes())
    assert files.names == ("a.png",)
    assert "skipped names that lead out of the zip (4): ../b.png; /c.png; d/../../e.png and 1 more" in (
        capsys.readouterr().out
    )
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["below", "x.zip"]


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of what it writes
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as written:
            for name in ("a.png", "b/c.png", "b\\c.png", "a.png"):
                written.writestr(name, png())
    with pytest.raises(UserError, match=r"has 2 names more than once \(b/c.png, a.png\): zip it anew"):
        opened(tmp_path / "x.zip")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4" + bytes(50)])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot open .*x.zip as a zip \(.*\): it is none, or was cut short"):
        opened(tmp_path / "x.zip")


def test_a_zip_that_was_cut_short_is_refused(tmp_path: Path):
    file = zip_of(tmp_path / "x.zip", {f"{i}.png": png(i) for i in range(9)})
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut short; copy it again"):
        opened(file)


def test_a_zip_without_images_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no image files in .*x.zip: expected names like"):
        opened(zip_of(tmp_path / "x.zip", {"a.txt": b"", "b.png/": b""}))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4), st.booleans()
)
def test_a_damaged_zip_is_read_or_refused(tmp_path: Path, changes: list[tuple[float, int]], cut: bool):
    members = {"a/1.png": png(), "b/2.png": png(9), "dataset.json": b'{"labels": [["a/1.png", 0], ["b/2.png", 1]]}'}
    content = bytearray(zip_of(tmp_path / "x.zip", members).read_bytes())
    for place, change in changes:
        content[int(place * len(content))] ^= change
    (tmp_path / "x.zip").write_bytes(content[: -len(content) // 3] if cut else content)
    with suppress(UserError):
        files = opened(tmp_path / "x.zip")
        notes = Notes()
        _, kept = read(files, range(len(files)), 8, notes)
        assert len(kept) + len(notes.unreadable) == len(files)
