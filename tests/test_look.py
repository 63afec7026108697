"""An autoencoder is seen before it is paid for: the figures are right, the picture is there, nothing is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from reference_trainer.__main__ import main
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageFolder, ImageSet, to_pixels, to_unit
from reference_trainer.errors import UserError
from reference_trainer.evaluation.boxes import Column
from reference_trainer.evaluation.look import farthest, seen
from reference_trainer.evaluation.look_picture import SHOWN, Seen, column_of, draw_look
from reference_trainer.evaluation.metrics import psnr
from reference_trainer.plotting import OWN_PICTURE
from robustcm.tails import box_statistics

CPU = torch.device("cpu")


class Half:
    """Images at half their size; NaN where ``bad`` says so."""

    bad = ""

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 2) * (torch.nan if self.bad == "latents" else 1)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=2) * (torch.nan if self.bad == "images" else 1)


def load() -> Half:
    return Half()


@pytest.fixture
def images(image_folder: Path) -> ImageSet:
    return ImageFolder(path=str(image_folder), resolution=16).load()


def there_and_back(pixels: Tensor) -> Tensor:
    return to_pixels(Half().decode(Half().encode(to_unit(pixels))))


def test_each_set_has_the_psnr_of_its_images(images: ImageSet):
    look = seen(Foreign("half", Half()), [("a", images.train, 36), ("b", images.held_out, 4)], CPU)
    for one, pixels in zip(look.sets, (images.train, images.held_out), strict=True):
        assert float(one.psnr.mean()) == pytest.approx(psnr(pixels, there_and_back(pixels)), abs=1e-9)
        assert torch.equal(one.reconstructed, there_and_back(pixels))


def test_its_statistics_are_those_of_the_raw_latents_channel_by_channel(images: ImageSet):
    look = seen(Foreign("half", Half()), [("a", images.pixels, 40)], CPU)
    raw = Half().encode(to_unit(images.pixels)).double()
    assert look.shape == (3, 8, 8)
    torch.testing.assert_close(look.mean, raw.mean((0, 2, 3)))
    for i, column in zip(look.channels, look.columns, strict=True):
        scaled = (raw[:, i] - look.mean[i]) / look.std[i]
        assert column.box.max_z == pytest.approx(float(scaled.abs().max()), rel=1e-3)


def test_of_many_channels_those_that_reach_farthest_are_shown():
    boxes = [box_statistics(torch.cat([torch.randn(99), torch.tensor([float(far)])])) for far in (9, 3, 50, 4, 20)]
    assert farthest(boxes, 3) == (0, 2, 4)


@pytest.mark.parametrize("what", ["latents", "images"])
def test_what_is_not_finite_is_not_drawn(what: str, images: ImageSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Half, "bad", what)
    with pytest.raises(UserError, match=r"of 32 of 32 images a are NaN or infinite: mend the autoencoder"):
        seen(Foreign("half", Half()), [("a", images.train, 36)], CPU)


def test_the_picture_goes_from_the_worst_image_to_the_best(rng: torch.Generator):
    pixels = torch.randint(0, 256, (30, 3, 8, 8), generator=rng).to(torch.uint8)
    levels = torch.randperm(30, generator=rng).double()
    values = torch.randn(3, 500, generator=rng)
    columns = [column_of(str(i), one, box_statistics(one)) for i, one in enumerate(values)]
    assert all(isinstance(column, Column) for column in columns)
    figure = draw_look([Seen("to train on", 99, pixels, pixels, levels)], columns, "half")
    shown = [float(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    assert (len(shown), shown[0], shown[-1]) == (SHOWN, 0, 29)
    assert shown == sorted(shown)
    assert "14.50 dB, the mean over 30 of 99 (worst 0.0, best 29.0)" in figure.axes[0].get_title()


@pytest.mark.usefixtures("drawn_pictures")
def test_the_command_draws_and_says_and_encodes_nothing(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: ImageSet
):
    out = tmp_path / "latents"
    words = ["encode", str(image_folder), "--look", "--resolution", "16", "--autoencoder", "test_look:load"]
    assert main([*words, "--out", str(out), "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert f"{psnr(images.held_out, there_and_back(images.held_out)):.2f} dB, the mean over 4 of 4" in said
    assert "36 of 36 images to train on, 4 of 4 images held out" in said
    assert "3 x 8 x 8 of images 3 x 16 x 16: 4 times fewer numbers" in said
    assert "in latents of this autoencoder" in said
    assert {file.name for file in tmp_path.iterdir()} == {"images", "latents-look.png"}
    with Image.open(tmp_path / "latents-look.png") as picture:
        assert picture.text["Software"] == OWN_PICTURE["Software"]  # type: ignore[attr-defined]


def test_of_many_images_it_looks_at_some(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("reference_trainer.data.encode.PIECE", 10)
    monkeypatch.setattr("reference_trainer.evaluation.look.MOST_OF_A_SET", 3)
    words = ["encode", str(image_folder), "--look", "--resolution", "16", "--autoencoder", "test_look:load"]
    assert main([*words, "--out", str(tmp_path / "a.png")]) == 0
    assert "3 of 36 images to train on, 3 of 4 images held out" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


def test_to_encode_a_place_is_needed(image_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["encode", str(image_folder)]) == 2
    assert "error: encode needs --out STORE" in capsys.readouterr().err
