"""The filters are band-pass and turn into one another, the features follow what moves, and a Gaussian is told apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_trainer.data.photographs import PHOTOGRAPHS, SIDE
from reference_trainer.evaluation.evaluate import choose_features
from reference_trainer.evaluation.metrics import kernel_distance
from reference_trainer.evaluation.named import features_named
from reference_trainer.evaluation.wavelets import DIRECTIONS, Wavelets, filters, in_colours, pyramid, strength


def wave(angle: float, size: int = 33, length: float = 4.0) -> Tensor:
    """A plane wave ``[1, 1, size, size]`` that runs along ``angle``."""
    axis = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return (2 * math.pi / length * (x * math.cos(angle) + y * math.sin(angle))).cos()[None, None].float()


def test_filters_are_blind_to_a_constant_and_of_norm_one():
    torch.testing.assert_close(filters().sum((1, 2, 3)), torch.zeros(2 * DIRECTIONS), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters().square().sum((1, 2, 3)), torch.ones(2 * DIRECTIONS))


def test_a_quarter_turn_of_the_image_swaps_the_directions():
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    turned = strength(images.rot90(1, (2, 3)))
    torch.testing.assert_close(turned, strength(images).rot90(1, (2, 3)).roll(DIRECTIONS // 2, 1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("direction", range(DIRECTIONS))
def test_a_wave_is_strongest_in_its_own_direction_and_has_one_strength_everywhere(direction: int):
    inside = strength(wave(math.pi * direction / DIRECTIONS))[0, :, 4:-4, 4:-4]
    assert int(inside.mean((1, 2)).argmax()) == direction
    assert inside[direction].std() < 0.05 * inside[direction].mean()  # a modulus: no phase


@given(st.floats(0, 0.5), st.floats(-0.4, 0.5))
def test_contrast_scales_strengths_and_brightness_leaves_them(contrast: float, brightness: float):
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = contrast * strength(images)
    torch.testing.assert_close(strength(contrast * images + brightness), expected, atol=2e-6, rtol=1e-3)


def test_grey_images_have_no_differences_of_colour():
    grey = torch.rand(2, 1, 8, 8)
    as_colour = in_colours(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(as_colour[:, :1], grey)
    assert as_colour[:, 1:].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "k"), [((3, 32, 32), 224), ((3, 64, 64), 288), ((1, 32, 32), 96), ((3, 48, 36), 224), ((1, 3, 3), 32)]
)
def test_the_size_follows_from_the_images_alone(shape: tuple[int, int, int], k: int):
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    vectors = Wavelets()(pixels)
    assert (vectors.shape, vectors.dtype) == ((3, k), torch.float32)
    assert vectors.isfinite().all()
    assert len(pyramid(pixels.float())) == max(1, int(math.log2(min(shape[1:]) / 8)) + 1)


def test_blur_noise_and_a_gaussian_of_the_same_covariance_are_seen_and_another_half_is_not():
    """Of patches of a photograph; the Gaussian has all that a linear measure could see."""
    photograph = PHOTOGRAPHS[4].read()
    windows = photograph.unfold(1, SIDE, 20).unfold(2, SIDE, 20)
    patches = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    patches = patches[torch.randperm(len(patches), generator=generator)]
    first, second = patches[::2], patches[1::2].float()
    flat = second.flatten(1)
    mixed = torch.randn(len(flat), len(flat), generator=generator) @ (flat - flat.mean(0)) / len(flat) ** 0.5
    changed = {
        "half": second,
        "blurred": torch.nn.functional.avg_pool2d(second, 3, 1, 1),
        "noisy": second + 20 * torch.randn(second.shape, generator=generator),
        "gaussian": (flat.mean(0) + mixed).reshape(second.shape),
    }
    vectors = {name: Wavelets()(images.clamp(0, 255).to(torch.uint8)) for name, images in changed.items()}
    distances = {name: kernel_distance(Wavelets()(first), fake) for name, fake in vectors.items()}
    floor = abs(distances.pop("half"))
    assert all(distance > 5 * floor for distance in distances.values()), (floor, distances)


def test_they_are_named_and_have_an_identity_without_weights():
    found = features_named("wavelets", torch.device("cpu"))
    assert found == Wavelets()
    assert choose_features(found, None) is found
