"""The classes of a data set: counted, named, kept with the run, and asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.commands.sample import in_rows
from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import ByClass, Classes
from reference_trainer.data.codecs import Pixels
from reference_trainer.data.images import Digits, ImageFolder, ImageSet
from reference_trainer.data.latents import LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.evaluation.by_class import about_classes, with_as_asked
from reference_trainer.evaluation.digit_classifier import load_digit_classifier
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.run import RunFolder
from reference_trainer.training import loop

CPU = torch.device("cpu")


# --- Classes ----------------------------------------------------------------------------------------------------------


def classes(*counts: int, names: str = "") -> Classes:
    return Classes(tuple(names.split()) or tuple(map(str, range(len(counts)))), counts, "")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(sum), st.integers(0, 400), st.integers(0, 99))
def test_samples_are_drawn_in_the_proportions_of_the_training_images(counts: list[int], n: int, seed: int):
    labels = classes(*counts).proportional(n, seed)
    drawn = torch.bincount(labels, minlength=len(counts)).tolist()
    assert sum(drawn) == n
    exactly = [n * count / sum(counts) for count in counts]
    assert all(abs(one - share) < 1 for one, share in zip(drawn, exactly, strict=True))
    up = [share - int(share) for one, share in zip(drawn, exactly, strict=True) if one > share]
    down = [share - int(share) for one, share in zip(drawn, exactly, strict=True) if one < share]
    assert not up or not down or min(up) >= max(down) - 1e-9  # the largest remainders are rounded up
    assert torch.equal(labels, classes(*counts).proportional(n, seed))


def test_which_of_equal_classes_gets_one_more_and_their_order_are_the_seeds():
    drawn = [classes(5, 5, 5).proportional(4, seed) for seed in range(20)]
    assert len({tuple(torch.bincount(labels, minlength=3).tolist()) for labels in drawn}) == 3
    assert len({tuple(labels.tolist()) for labels in drawn}) > 10


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).filter(sum), st.integers(1, 50))
def test_a_picture_shows_each_class_evenly_and_no_empty_one(counts: list[int], n: int):
    labels, each = zip(*classes(*counts).rows(n), strict=True)
    assert sum(each) == n
    assert max(each) == each[0] <= min(each) + 1
    assert all(counts[label] for label in labels)
    assert len(set(labels)) == min(n, sum(count > 0 for count in counts))


def test_rows_that_are_short_end_white():
    pixels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    assert in_rows(pixels, [2, 2, 1]).flatten().tolist() == [0, 1, 2, 3, 4, 255]


def test_a_class_is_asked_for_by_its_name_before_its_number():
    those = classes(3, 4, 0, names="cat 0 emu")
    assert [those.label(word) for word in ("cat", "0", "1")] == [0, 1, 1]
    for word, message in (
        ("cut", r"--label cut: the run has no such class, did you mean cat\?"),
        ("3", r"--label 3: the run has no such class: there are cat, 0, emu"),
        ("-1", "no such class"),
        ("9" * 40, "no such class"),
        ("emu", r"the run had no training images of class 2 \(emu\)"),
        ("2", r"the run had no training images of class 2 \(emu\)"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            those.label(word)
        assert "\n" not in str(caught.value)


def image_set(labels: list[int], names: tuple[str, ...] | None = None) -> ImageSet:
    pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet("some", pixels, torch.tensor(labels), torch.arange(len(labels)) == 0, label_names=names)


def test_classes_count_training_images_alone_and_name_the_empty_ones():
    found = Classes.of(image_set([2, 0, 0, 1], names=("a", "b", "c")))
    assert found.counts == (2, 1, 0)
    assert found.about_empty() == "no training images of class 2 (c): no samples will be drawn of it"
    assert set(found.proportional(30, 0).tolist()) == {0, 1}
    assert Classes.of(image_set([0, 0, 1])).about_empty() == ""


def test_labels_out_of_range_are_one_line():
    for labels in ([0, -1, 1], [0, 5, 1]):
        with pytest.raises(UserError, match=rf"some has the label {labels[1]}, expected 0 to 1: mend the labels"):
            Classes.of(image_set(labels, names=("a", "b")))


def test_classes_survive_their_file_and_a_damaged_one_is_one_line(tmp_path: Path):
    file = tmp_path / "classes.json"
    those = classes(3, 0, names="ä\n \udcff")
    those.save(file)
    assert Classes.load(file) == those
    for text in ("", "[]", '{"names": ["a"], "counts": [], "fingerprint": ""}', '{"names": [], "counts": []}'):
        file.write_text(text)
        with pytest.raises(UserError, match="cannot read the classes of the run"):
            Classes.load(file)


def test_the_digits_have_ten_classes_of_450():
    assert Classes.of(Digits().load()).counts == (450,) * 10


class Labelled(nn.Module):
    """Outputs the label."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        return labels.to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)


def test_every_sample_is_of_its_own_class_by_default_in_the_proportions_of_the_data():
    space = LatentSpace(Pixels(), torch.zeros(1), torch.ones(1), 0.2)
    those = classes(30, 10, 60)
    model = TrainedModel(TrainConfig(classes=ByClass()), Labelled(), space, (1, 2, 2), 9, CPU, classes=those)
    asked = torch.arange(300) % 3
    for labels, drawn in (
        (asked, model.latents(300, (80.0,), 5, labels=asked)),
        (those.proportional(300, 5), model.latents(300, (80.0,), 5)),
    ):
        assert torch.equal((2 * drawn).mean((1, 2, 3)).round().long(), labels)  # c_out is 1/2 at 80


def test_as_asked_is_the_share_of_samples_that_the_classifier_takes_for_their_class():
    """Real digits in the place of samples; those of the second set are of the next class, but for the nines."""
    images, features = Digits().load(), load_digit_classifier()
    classes = Classes.of(images)
    space = LatentSpace(Pixels(), torch.zeros(1), torch.ones(1), 0.2)
    model = TrainedModel(TrainConfig(classes=ByClass()), nn.Identity(), space, (1, 32, 32), 0, CPU, classes=classes)
    asked = classes.proportional(200, seed=3)
    others = torch.where(asked == 9, asked, asked + 1)
    first = {label: int(torch.nonzero(images.train_labels == label)[5]) for label in range(10)}
    drawn = {
        name: Statistics.of(features(images.train[[first[int(label)] for label in labels]]))
        for name, labels in zip(("1 evaluation", "2 evaluations"), (asked, others), strict=True)
    }
    rows = with_as_asked({name: {"n": 200.0} for name in drawn} | {"floor": {}}, drawn, model, features, seed=3)
    assert rows["1 evaluation"] == {"n": 200.0, "as_asked": 1.0}
    assert rows["2 evaluations"]["as_asked"] == pytest.approx(0.1)
    assert rows["floor"] == {}
    found = about_classes(model, drawn, features, 200, seed=3)
    assert [row["as_asked"]["2 evaluations"] for row in found["rows"]] == [0.0] * 9 + [1.0]
    assert {row["samples"] for row in found["rows"]} == {20}
    assert with_as_asked({"1 evaluation": {}}, drawn, replace(model, classes=None), features, 3) == {"1 evaluation": {}}


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """24 images of cats, dark, and 12 of emus, bright."""
    generator = np.random.default_rng(0)
    for name, count, shade in (("cat", 24, 0), ("emu", 12, 150)):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(shade, shade + 100, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "animals" / name / f"{i:02}.png")
    return tmp_path / "animals"


TINY = ["pixels", "steps=6", "batch_size=8", "save_every=2", "data.resolution=16", "classes=ByClass", "--device=cpu"]
TINY += ["network=DiT(width=8,layers=1,heads=2,patch=16)"]


@pytest.fixture
def train(animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("ROBUSTCM_CACHE", str(tmp_path / "cache"))
    return lambda *words, out="run": main([*TINY, f"--data={animals}", f"--out={tmp_path / out}", *words])


def test_class_folders_are_labels_and_a_file_beside_them_takes_them_away(animals: Path):
    source = ImageFolder(path=str(animals), resolution=16)
    images = source.load()
    assert images.classes == ("cat", "emu")
    assert images.labels.tolist() == [0] * 24 + [1] * 12
    (animals / "cat" / "00.png").rename(animals / "00.png")
    assert source.load().labels is None


@pytest.mark.usefixtures("drawn_pictures")
def test_a_run_by_class_is_sampled_by_name_number_and_row_by_row(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train() == 0
    run = tmp_path / "run"
    shown = capsys.readouterr().out
    assert "2 classes, samples in the proportions of the training images, guidance 1:" in shown
    rows = json.loads((run / "evaluation.json").read_text())["classes"]["rows"]
    assert [(row["name"], row["images"], row["samples"]) for row in rows] == [("cat", 22, 22), ("emu", 11, 11)]
    assert (run / "classes.png").stat().st_size > 0

    def sample(*words: str) -> np.ndarray:
        assert main(["sample", str(run), "--out", str(tmp_path / "picture.png"), "--device=cpu", *words]) == 0
        return np.asarray(Image.open(tmp_path / "picture.png"))

    assert np.array_equal(sample("--label=emu", "--n=4"), sample("--label=1", "--n=4"))
    assert not np.array_equal(sample("--label=emu", "--n=4"), sample("--label=cat", "--n=4"))
    assert np.array_equal(sample("--label=emu", "--n=4", "--guidance=1"), sample("--label=emu", "--n=4"))
    assert not np.array_equal(sample("--label=emu", "--n=4", "--guidance=9"), sample("--label=emu", "--n=4"))
    assert np.array_equal(sample("--label=emu", "--guidance=0"), sample("--label=cat", "--guidance=0"))
    assert sample("--n=6").shape == (2 * 17, 3 * 17, 3)
    model = load_model(RunFolder(run), CPU)
    emus = torch.ones(3, dtype=torch.long)
    row = model.images(6, model.sigmas(1), 0, torch.cat([0 * emus, emus]))[3:]
    assert np.array_equal(sample("--n=6")[17:33, :16], row[0].permute(1, 2, 0).numpy())
    for words, message in (
        (["--label", "cart"], "--label cart: the run has no such class, did you mean cat?"),
        (["--guidance", "-1"], "guidance must be a finite number >= 0"),
        (["--guidance", "nan"], "must be a number, got 'nan'"),
    ):
        assert main(["sample", str(run), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_run_without_classes_takes_neither_label_nor_guidance(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train("classes=None", "--brief") == 0
    assert not (tmp_path / "run" / "classes.json").exists()
    for word in ("--label=0", "--guidance=2"):
        assert main(["sample", str(tmp_path / "run"), word]) == 2
        assert f"trained without classes: leave {word.partition('=')[0]} out" in capsys.readouterr().err


def test_a_run_by_class_continues_bit_exactly(train: Callable[..., int], tmp_path: Path):
    assert train("--brief", out="whole") == 0
    assert train("--brief", out="parts") == 0
    (tmp_path / "parts" / "checkpoints" / "step_00000006.safetensors").unlink()
    (tmp_path / "parts" / "metrics.jsonl").unlink()
    assert RunFolder(tmp_path / "parts").latest_checkpoint()[0] == 4
    assert train("--brief", out="parts") == 0
    (_, one), (_, two) = (RunFolder(tmp_path / out).latest_checkpoint() for out in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["network/network.adaln_single.labels.weight"].abs().amax(1).gt(0).all()  # no class was trained, too


def test_other_labels_are_seen_and_taken_if_asked(
    train: Callable[..., int],
    animals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    assert train("--brief") == 0
    (animals / "cat").rename(animals / "bat")
    assert train("--brief") == 2
    assert "begun with other labels or names of classes: bring those back" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # new images that do not fit leave all as it was
        patch.setattr(loop, "latents_of_run", Mock(side_effect=UserError("latents of another size")))
        assert train("--brief", "--new-data") == 2
    assert Classes.load(tmp_path / "run" / "classes.json").names == ("cat", "emu")
    assert train("--brief", "--new-data") == 0
    assert Classes.load(tmp_path / "run" / "classes.json").names == ("bat", "emu")
    (animals / "owl").mkdir()
    (animals / "emu" / "11.png").rename(animals / "owl" / "11.png")
    assert train("--brief", "--new-data") == 2
    assert "trained on 2 classes, these are 3: give another --out" in capsys.readouterr().err


def test_data_without_labels_are_refused_before_the_folder_is_claimed(
    train: Callable[..., int], animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (animals / "cat" / "00.png").rename(animals / "00.png")
    assert train() == 2
    assert "classes=ByClass trains by class, and the images of ImageFolder have no labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_there_were_classes_is_loaded_and_goes_on(train: Callable[..., int], tmp_path: Path):
    assert train("classes=None", "--brief") == 0
    run = RunFolder(tmp_path / "run")
    file = run.root / "config.json"
    there = json.loads(file.read_text())
    assert there.pop("classes") is None
    file.write_text(json.dumps(there))
    assert run.config().classes is None
    assert train("classes=None", "--brief") == 0
    assert load_model(run, CPU).images(2, (80.0,), 0).shape == (2, 3, 16, 16)
