"""Patches are where they say, of both sets none shares a pixel, and a package that is missing or other is said."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reference_trainer.data import photographs
from reference_trainer.data.images import ImageSet
from reference_trainer.data.photographs import PHOTOGRAPHS, SIDE, Corner, Photographs, held_out_corner, reduced, spreads
from reference_trainer.errors import UserError
from reference_trainer.optimizers import Muon, RAdam
from reference_trainer.presets import ilct, on_folder, on_images
from reference_trainer.presets import photographs as preset

NAME = re.compile(r"(\w+), 1:(\d), row (\d+), column (\d+)")


@pytest.fixture(scope="module")
def patches() -> ImageSet:
    return Photographs().load()


def places(images: ImageSet) -> list[tuple[int, int, int, int]]:
    """Label, factor, row and column of each patch, read from its name."""
    assert images.names is not None
    label = {photograph.name: number for number, photograph in enumerate(PHOTOGRAPHS)}
    found = [NAME.fullmatch(name).groups() for name in images.names]
    return [(label[name], int(factor), int(row), int(column)) for name, factor, row, column in found]


def test_there_are_thousands_and_every_photograph_is_in_both_sets(patches: ImageSet):
    assert patches.pixels.shape[1:] == (3, SIDE, SIDE)
    assert patches.num_train > 5000
    assert len(patches.held_out) > 500
    for of in (patches.train_labels, patches.labels[patches.is_held_out]):
        assert set(of.tolist()) == set(range(len(PHOTOGRAPHS)))


def test_no_pixel_of_a_photograph_is_in_both_sets(patches: ImageSet):
    """Painted over the photographs, the two sets do not meet."""
    painted = [torch.zeros(2, *photograph.read().shape[1:], dtype=torch.bool) for photograph in PHOTOGRAPHS]
    for (label, factor, row, column), held_out in zip(places(patches), patches.is_held_out.tolist(), strict=True):
        painted[label][int(held_out), row : row + factor * SIDE, column : column + factor * SIDE] = True
    for both in painted:
        assert both[0].any()
        assert both[1].any()
        assert not both.all(0).any()


def test_a_patch_is_the_mean_of_its_square_of_the_photograph(patches: ImageSet):
    """Of its own square alone: an average by numpy, which knows nothing of where the patch was cut from."""
    read = [photograph.read().double().numpy() for photograph in PHOTOGRAPHS]
    where = places(patches)
    for index in range(0, len(where), 97):
        label, factor, row, column = where[index]
        square = read[label][:, row : row + factor * SIDE, column : column + factor * SIDE]
        mean = square.reshape(3, SIDE, factor, SIDE, factor).mean((2, 4))
        np.testing.assert_allclose(patches.pixels[index], mean, atol=0.5)


def test_every_patch_that_stays_has_the_spread_asked_for(patches: ImageSet):
    spread = patches.pixels.float().flatten(2).var(2, correction=0).mean(1).sqrt()
    assert 8 <= spread.min() < 9


@given(st.integers(0, 2**32), st.sampled_from([32, 33, 40]), st.sampled_from([32, 45]))
def test_spreads_are_those_of_each_patch_by_itself(seed: int, h: int, w: int):
    pixels = torch.randint(0, 256, (3, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    found = spreads(pixels)
    assert found.shape == (h - 31, w - 31)
    last = pixels[:, h - 32 :, w - 32 :].double()
    assert float(found[-1, -1]) == pytest.approx(float(last.flatten(1).var(1, correction=0).mean().sqrt()))


def test_made_smaller_is_a_box_average_as_pillow_has_it():
    pixels = PHOTOGRAPHS[0].read()[:, :511, :509]
    for factor in (1, 2, 4):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        cut = image.crop((0, 0, 509 // factor * factor, 511 // factor * factor))
        pillow = torch.from_numpy(np.array(cut.reduce(factor))).permute(2, 0, 1)
        assert (reduced(pixels, factor).int() - pillow.int()).abs().max() <= 1  # a half rounds up here


def test_shifts_are_the_seeds_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", PHOTOGRAPHS[:1])
    first, again, other = (Photographs(spacing=64, seed=seed).load() for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@given(st.integers(0, 20), st.integers(300, 2000), st.integers(300, 2000))
def test_the_corner_lies_in_the_photograph_and_has_a_sixth_of_it(index: int, h: int, w: int):
    corner = held_out_corner(index, h, w)
    assert corner.top == 0 or corner.bottom == h
    assert corner.left == 0 or corner.right == w
    assert (corner.bottom - corner.top) * (corner.right - corner.left) == pytest.approx(0.16 * h * w, rel=0.03)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30))
def test_a_square_is_inside_or_apart_by_its_pixels(top: int, left: int, side: int):
    corner, painted = Corner(10, 40, 20, 60), torch.zeros(100, 100, dtype=torch.bool)
    painted[10:40, 20:60] = True
    covered = painted[top : top + side, left : left + side]
    inside, apart = corner.holds(torch.tensor([top]), torch.tensor([left]), side)
    assert (bool(inside), bool(apart)) == (bool(covered.all()), not bool(covered.any()))


def test_a_missing_package_and_another_file_are_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    for change, message in (({"package": "no_such_package"}, "not installed"), ({"digest": "0" * 16}, "another")):
        monkeypatch.setattr(photographs, "PHOTOGRAPHS", (replace(PHOTOGRAPHS[0], **change),))
        with pytest.raises(UserError, match=message) as caught:
            Photographs().load()
        assert "the extra natural" in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", (replace(PHOTOGRAPHS[0], file="data/nothing.png"),))
    with pytest.raises(UserError, match="no data/nothing"):
        Photographs().load()


def test_the_preset_is_that_of_a_folder_but_for_the_images():
    assert replace(preset(), data=None) == replace(on_folder(type(preset())(), "photos"), data=None)


def test_images_in_colour_have_muon_and_a_larger_c_than_digits_but_what_is_one_s_own_stays():
    ours, mine = preset(), replace(ilct(), optimizer=RAdam())
    assert (ours.objective.c.multiple, ours.optimizer) == (2.0, Muon(eps=1e-8))
    assert on_images(ilct(), Photographs()).optimizer == ours.optimizer  # one optimizer for both sides of a comparison
    assert on_images(mine, Photographs()).objective.c == mine.objective.c
    assert on_images(mine, Photographs()).optimizer == RAdam()


def test_every_photograph_states_its_terms():
    assert all(photograph.terms for photograph in PHOTOGRAPHS)
    assert len({photograph.digest for photograph in PHOTOGRAPHS}) == len(PHOTOGRAPHS)
