"""A fit goes on while the PSNR of images it has not seen rises, says why it stopped, and remembers how good it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_trainer.data import fitting
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.codecs import notes_of
from reference_trainer.data.encode import Encoding, encode_folder
from reference_trainer.data.fitting import CHECK_EVERY, FALLS, PATIENCE, RISE, Course, Fit, fit, fitted_and_judged
from reference_trainer.data.images import ImageFolder, ImageSet, to_pixels, to_unit
from reference_trainer.data.store import Index
from reference_trainer.errors import UserError
from reference_trainer.evaluation.metrics import psnr
from reference_trainer.presets import digits, on_folder

CPU = torch.device("cpu")
SMALL = KLAutoencoder(block_out_channels=(8,), norm_num_groups=4, steps=3, likelihood="gaussian")


def noise(n: int = 40, held_out: int = 4) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet("noise", pixels, None, torch.arange(n) >= n - held_out)


# The rule


def course(curve: list[float], most_steps: int) -> Course:
    """Shown a curve of held-out PSNR, a check after another, as far as it looks."""
    made = Course(most_steps)
    for i, value in enumerate(curve):
        if (step := (i + 1) * CHECK_EVERY) <= made.end:
            made.check(step, value)
    return made


@given(st.integers(1, 40), st.floats(-5, 60))
def test_a_curve_that_stays_ends_behind_three_falls_of_the_learning_rate(rising: int, level: float):
    curve = [level - 0.2 * (rising - i) for i in range(rising)] + [level - 0.2] * 60
    made = course(curve, 20_000)
    assert made.end == rising * CHECK_EVERY + (FALLS + 1) * PATIENCE
    assert made.stopped == "held-out PSNR no longer rose by 0.1 dB in 500 steps"
    assert made(made.end) == pytest.approx(3.0**-FALLS)


@given(st.integers(6, 60), st.floats(1.01, 3))
def test_a_curve_that_rises_enough_goes_on_to_the_cap_at_full_speed(checks: int, more: float):
    rise = more * RISE * CHECK_EVERY / PATIENCE
    made = course([i * rise for i in range(checks)], 20_000)
    assert (made.end, made(checks * CHECK_EVERY)) == (20_000, 1.0)
    assert made.stopped == "the cap of 20000 steps (autoencoder.most_steps)"


@given(st.lists(st.floats(0, 60), max_size=60), st.integers(1, 8000))
def test_whatever_the_curve_it_ends_within_the_cap_where_the_learning_rate_is_0(curve: list[float], most_steps: int):
    made = course(curve[: most_steps // CHECK_EVERY], most_steps)
    assert 1 <= made.end <= most_steps
    rates = [made(step) for step in range(most_steps + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] > 0 == rates[-1]


# What it is fitted on


def test_where_images_are_held_out_all_others_are_fitted_on():
    images = noise()
    fitted, judged = fitted_and_judged(images)
    assert torch.equal(fitted, images.train)
    assert torch.equal(judged, images.held_out)


def test_where_none_are_one_in_twenty_is_kept_from_the_fit():
    images = noise(60, held_out=0)
    fitted, judged = fitted_and_judged(images)
    assert (len(fitted), len(judged)) == (57, 3)
    rows = [{bytes(image.numpy().tobytes()) for image in part} for part in (fitted, judged, images.pixels)]
    assert rows[0] | rows[1] == rows[2]
    assert not rows[0] & rows[1]


# The fit


class Scaled(nn.Module):
    """Reconstructs images times a number, which is told to become ``aim``."""

    def __init__(self, aim: float) -> None:
        super().__init__()
        self.aim, self.gain = aim, nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(images)
        return ((self.gain - self.aim) * images).square().mean()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that looks ten times as often."""
    for name in ("CHECK_EVERY", "PATIENCE", "WARM_UP"):
        monkeypatch.setattr(fitting, name, getattr(fitting, name) // 10)


def scaled(
    images: ImageSet, steps: int | None, most_steps: int = 5000, lr: float = 2e-2, aim: float = 1.0
) -> tuple[Scaled, Fit]:
    network = Scaled(aim)
    asked: dict = {"steps": steps, "most_steps": most_steps, "batch_size": 4, "lr": lr, "seed": 0}
    return network, fit(network, network.loss, lambda unit: network.gain.detach() * unit, images, CPU, **asked)


@pytest.mark.usefixtures("brief")
def test_it_stops_when_nothing_is_left_to_gain():
    network, how = scaled(noise(), None)
    assert float(network.gain.detach()) == pytest.approx(1, abs=3e-3)
    assert how.steps == len(network.seen) < 1000
    assert "no longer rose" in how.stopped
    assert how.psnr_held_out == pytest.approx(58.9, abs=0.05)


@pytest.mark.usefixtures("brief")
def test_the_weights_are_those_of_the_best_look_though_it_got_worse():
    network, how = scaled(noise(), None, aim=2.0)
    assert float(network.gain.detach()) == pytest.approx(1, abs=0.15)
    assert how.steps == len(network.seen) > 200


@pytest.mark.usefixtures("brief")
def test_it_stops_at_the_cap_and_says_so():
    network, how = scaled(noise(), None, most_steps=150, lr=1e-4)
    assert how.steps == len(network.seen) == 150
    assert "cap of 150 steps" in how.stopped


@pytest.mark.usefixtures("brief")
def test_the_images_that_judge_it_are_never_fitted_on():
    images = noise(60, held_out=0)
    network, _ = scaled(images, None, most_steps=120)
    seen = {image.numpy().tobytes() for batch in network.seen for image in batch}
    kept = {image.numpy().tobytes() for image in to_unit(fitted_and_judged(images)[1])}
    assert len(seen) == 57
    assert not seen & kept


@pytest.mark.usefixtures("brief")
def test_one_that_diverges_is_given_up_at_the_first_look(tmp_path: Path):
    with pytest.raises(UserError, match="became NaN or infinite in its fit"):
        replace(SMALL, steps=None, lr=1e30, most_steps=10**9).fit(noise(), CPU, tmp_path)


def test_how_it_went_is_kept_with_the_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = noise()
    codec = SMALL.fit(images, CPU, tmp_path)
    known = notes_of(codec)
    again = to_pixels(codec.decode(codec.encode(to_unit(images.held_out))))
    assert known["psnr_held_out"] == pytest.approx(psnr(images.held_out, again), abs=1e-9)
    assert known["steps"] == 3
    assert f"{known['psnr_held_out']:.2f} dB held out, {known['psnr_train']:.2f} dB on" in capsys.readouterr().out
    assert notes_of(SMALL.fit(images, CPU, tmp_path)) == known  # of the cache
    assert notes_of(SMALL.build(1, codec.tensors())) == known  # of a run
    of_before = {name: tensor for name, tensor in codec.tensors().items() if name != "fit"}
    assert notes_of(SMALL.build(1, of_before)) == {}


def test_the_index_of_a_store_says_how_it_went(image_folder: Path, tmp_path: Path):
    source = ImageFolder(path=str(image_folder), resolution=16)
    encode_folder(Encoding(source=source, autoencoder=SMALL), tmp_path / "store", CPU, tmp_path)
    known = Index.read(tmp_path / "store").codec
    assert known is not None
    assert (known["steps"], known["psnr_held_out"] > 0) == (3, True)


def test_draws_from_a_fit_are_of_the_same_fit(tmp_path: Path):
    images = noise()
    mean = SMALL.fit(images, CPU, tmp_path).encode(to_unit(images.train))
    drawn = replace(SMALL, latents="sample").fit(images, CPU, tmp_path).encode(to_unit(images.train))
    assert len(list(tmp_path.iterdir())) == 1
    assert not torch.isclose(mean, drawn).any(1).all()


def test_folders_are_fitted_by_the_rule_and_digits_in_steps_as_ever():
    assert isinstance(part := on_folder(digits(), "photos").autoencoder, KLAutoencoder)
    assert part.steps is None
    assert isinstance(part := digits().autoencoder, KLAutoencoder)
    assert part.steps == 1100
