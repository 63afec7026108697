"""A Hugging Face dataset is read row by row, offline; what it does not say has to be said, in one line."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.hub import HubImages, Rows, is_dataset
from reference_trainer.data.images import ImageFolder
from reference_trainer.data.reading import Notes, Source, read
from reference_trainer.data.store import Store
from reference_trainer.errors import UserError

datasets = pytest.importorskip("datasets")
CLASSES = ("ants", "bees", "dogs", "eels")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As with HF_HUB_OFFLINE=1, which is read when the packages are imported; the user's cache stays as it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def cell(image: np.ndarray | int) -> dict[str, Any]:
    stream = io.BytesIO()
    array = np.full((12, 12, 3), image, np.uint8) if isinstance(image, int) else image
    Image.fromarray(array).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def features(**kinds: Any) -> Any:
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))} | kinds)


def table(n: int = 12, **columns: Any) -> Any:
    """Images of brightness 0, 1, ...; labels 0, 1, 3, 0, ..."""
    rows = {"image": [cell(i) for i in range(n)], "label": [(0, 1, 3)[i % 3] for i in range(n)]}
    kinds = {name: kind for name, (kind, _) in columns.items()}
    return datasets.Dataset.from_dict(rows | {name: value for name, (_, value) in columns.items()}, features(**kinds))


def saved(what: Any, folder: Path) -> Path:
    what.save_to_disk(str(folder))
    return folder


def as_parquet(folder: Path, **splits: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def both(folder: Path) -> Path:
    return saved(datasets.DatasetDict(train=table(), test=table(5)), folder)


def both_as_parquet(folder: Path) -> Path:
    return as_parquet(folder, train=table(), test=table(5))


def opened(folder: Path, **options: Any) -> Rows:
    return HubImages(path=str(folder), resolution=16, **options).open()


def brightness(rows: Rows) -> list[int]:
    return read(rows, range(len(rows)), 8, Notes())[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("made", [both, both_as_parquet])
def test_one_split_is_read_with_its_classes(made: Callable[[Path], Path], tmp_path: Path):
    folder = made(tmp_path / "data")
    assert is_dataset(folder)
    rows = opened(folder, split="test")
    assert brightness(rows) == [0, 1, 2, 3, 4]
    assert rows.labels is not None
    assert rows.labels.of.tolist() == [0, 1, 3, 0, 1]
    assert (rows.labels.classes, rows.labels.names) == (4, CLASSES)
    assert rows.name(3) == "test[3]"


@pytest.mark.parametrize("made", [both, both_as_parquet])
def test_of_several_splits_one_has_to_be_named(made: Callable[[Path], Path], tmp_path: Path):
    folder = made(tmp_path / "data")
    with pytest.raises(UserError, match=r"data has the splits train, test: say which to read with --split, as in"):
        opened(folder)
    with pytest.raises(UserError, match=r"data has no split dev: there are train, test$"):
        opened(folder, split="dev")


def test_one_split_needs_no_name(tmp_path: Path):
    assert len(opened(as_parquet(tmp_path / "data", train=table(3)))) == 3
    assert len(opened(saved(datasets.DatasetDict(dev=table(3)), tmp_path / "saved"))) == 3
    alone = saved(table(3), tmp_path / "alone")
    assert opened(alone).name(1) == "alone[1]"
    with pytest.raises(UserError, match=r"alone has no splits: leave --split out"):
        opened(alone, split="train")


def test_rows_that_were_chosen_are_those_that_are_read(tmp_path: Path):
    rows = opened(saved(table().select([7, 2, 3]), tmp_path / "data"))
    assert brightness(rows) == [7, 2, 3]
    assert rows.labels is not None
    assert rows.labels.of.tolist() == [1, 3, 0]
    assert [rows.stamp(i) for i in range(3)] == [(len(cell(i)["bytes"]),) for i in (7, 2, 3)]


def encode(source: Source, out: Path) -> Store:
    encoding = Encoding(source=source, autoencoder=PixelSpace(), shard=15)
    encode_folder(encoding, out, torch.device("cpu"), out.with_name("cache"))
    return Store.open(out)


def test_the_store_of_a_dataset_is_that_of_its_images_in_a_folder(image_folder: Path, tmp_path: Path):
    files = sorted(image_folder.iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows = {"image": cells, "label": [i % 2 for i in range(len(files))]}
    folder = saved(datasets.Dataset.from_dict(rows, features()), tmp_path / "data")
    ours = encode(HubImages(path=str(folder), resolution=16), tmp_path / "a")
    theirs = encode(ImageFolder(path=str(image_folder), resolution=16), tmp_path / "b")
    indices = torch.arange(36)
    assert torch.equal(ours.latents().take(indices), theirs.latents().take(indices))
    assert ours.labels is not None
    assert ours.labels.tolist() == rows["label"]
    assert ours.index.label_names == CLASSES


def test_other_rows_do_not_go_on_with_the_store(tmp_path: Path):
    recipes = set()
    for rows in (table(12), table(11), table(12).select([1, 0, *range(2, 12)])):
        folder = saved(rows, tmp_path / str(len(recipes)))
        source = HubImages(path=str(folder))
        recipes.add(Encoding(source=source, autoencoder=PixelSpace()).recipe(source.open()))
    assert len(recipes) == 3
    folder = saved(table(12), tmp_path / "moved")
    assert Encoding(source=HubImages(path=str(folder)), autoencoder=PixelSpace()).recipe(opened(folder)) not in recipes


def test_a_corrupt_cell_and_an_empty_one_are_named(tmp_path: Path):
    rows = {"image": [cell(0), {"bytes": b"no image", "path": None}, None, cell(3)], "label": [0, 1, 2, 3]}
    notes = Notes()
    found = opened(saved(datasets.Dataset.from_dict(rows, features()), tmp_path / "data"))
    _, kept = read(found, range(4), 8, notes)
    assert kept == (0, 3)
    assert [line.partition(" ")[0] for line in notes.unreadable] == ["data[1]", "data[2]"]


def test_images_that_lie_elsewhere_are_read_from_there(image_folder: Path, tmp_path: Path):
    rows = {"image": [str(file) for file in sorted(image_folder.iterdir())], "label": [0] * 40}
    found = opened(saved(datasets.Dataset.from_dict(rows, features()), tmp_path / "data"))
    _, kept = read(found, range(40), 8, Notes())
    assert len(kept) == 40


# Columns


def test_of_several_columns_one_has_to_be_named(tmp_path: Path):
    coarse = (datasets.ClassLabel(names=["x", "y"]), [1, 0, 1])
    mask = (datasets.Image(), [cell(200), cell(201), cell(202)])
    folder = saved(table(3, coarse=coarse, mask=mask), tmp_path / "data")
    with pytest.raises(UserError, match=r"has several columns of images, image, mask .*--image-column"):
        opened(folder)
    with pytest.raises(UserError, match=r"has several columns of classes, label, coarse: name one with --label-column"):
        opened(folder, image_column="mask")
    rows = opened(folder, image_column="mask", label_column="coarse")
    assert brightness(rows) == [200, 201, 202]
    assert rows.labels is not None
    assert rows.labels.of.tolist() == [1, 0, 1]


def test_whole_numbers_that_are_named_are_classes(tmp_path: Path):
    rows = opened(saved(table(3, kind=(datasets.Value("int64"), [4, 0, 2])), tmp_path / "data"), label_column="kind")
    assert rows.labels is not None
    assert (rows.labels.of.tolist(), rows.labels.classes, rows.labels.names) == ([4, 0, 2], 5, None)


def test_bytes_that_are_named_are_images(tmp_path: Path):
    raw = (datasets.Value("binary"), [cell(i)["bytes"] for i in (50, 60)])
    assert brightness(opened(saved(table(2, raw=raw), tmp_path / "data"), image_column="raw")) == [50, 60]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "img"}, r"no column img in data of .*data: there are image, label, text$"),
        ({"label_column": "class"}, r"no column class in data of .*: there are image, label, text$"),
        ({"label_column": "text"}, r"label 0 of the column text in data of .* is 'a', expected a whole number"),
        ({"image_column": "label"}, r"the column label in data of .* has no images \(.*\): name another"),
    ],
)
def test_columns_that_do_not_fit_are_one_line(options: dict[str, str], message: str, tmp_path: Path):
    folder = saved(table(2, text=(datasets.Value("string"), ["a", "b"])), tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        opened(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_dataset_without_images_is_refused(tmp_path: Path):
    folder = saved(datasets.Dataset.from_dict({"a": [1], "b": ["x"]}), tmp_path / "data")
    with pytest.raises(UserError, match=r"has no column of images \(all: a, b\): name one with --image-column"):
        opened(folder)


@pytest.mark.parametrize(("values", "message"), [([0, -1, 2], "is -1"), ([0, None, 2], "is None")])
def test_a_label_that_is_missing_is_refused(values: list[int | None], message: str, tmp_path: Path):
    rows = {"image": [cell(i) for i in range(3)], "label": values}
    with pytest.raises(UserError, match=rf"label 1 of the column label .* {message}, expected a whole number from 0"):
        opened(saved(datasets.Dataset.from_dict(rows, features()), tmp_path / "data"))


def test_a_split_without_labels_has_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = {"image": [cell(i) for i in range(3)], "label": [-1, -1, -1]}
    assert opened(saved(datasets.Dataset.from_dict(rows, features()), tmp_path / "data")).labels is None
    assert "has no labels: encoded without classes" in capsys.readouterr().out


# What cannot be had


def test_without_network_a_name_is_one_line_that_says_how_to_pass_a_folder(capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match=r"no someone/faces here, and no dataset .*without network, give the path of"):
        opened(Path("someone/faces"), split="train")
    said = capsys.readouterr()
    assert said.out == "there is no someone/faces here: asking the Hugging Face hub for it\n"
    assert said.err == ""


@pytest.mark.parametrize(("here", "said"), [(True, r"data is a Hugging Face"), (False, r"there is no someone/faces")])
def test_without_the_package_it_is_one_line(here: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = both(tmp_path / "data") if here else Path("someone/faces")
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{said}.*pip install datasets$"):
        opened(folder)


def test_a_damaged_dataset_is_one_line(tmp_path: Path):
    folder = saved(table(), tmp_path / "data")
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot open .*data as a Hugging Face dataset \(.*\): copy it again"):
        opened(folder)
    folder = as_parquet(tmp_path / "tables", train=table())
    (file,) = folder.glob("data/*")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"cannot open .*tables as a Hugging Face dataset \(.*\): copy it again"):
        opened(folder)


def test_tables_beside_images_are_no_dataset(tmp_path: Path, image_folder: Path):
    assert not is_dataset(tmp_path)
    (image_folder / "00000.parquet").touch()
    assert not is_dataset(image_folder)
    assert not is_dataset(image_folder.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").touch()
    assert not is_dataset(tmp_path / "other")
    (tmp_path / "other" / "a.parquet").touch()
    assert is_dataset(tmp_path / "other")
