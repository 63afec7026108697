"""Features for natural images that need no download and no training: a small wavelet scattering of two orders.

They see how strong edges are by scale, direction, colour and place (first order), and how that strength varies
(second order): whether pictures are sharp, noisy, textured, and made of edges at all, which a Gaussian with their
covariance is not. They do not see what a picture shows.

Axes: pixels uint8 [n, ch, h, w], features [n, k]. Source: Bruna and Mallat 2013, arXiv 1203.1513; here with filters of
7x7 on a pyramid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference_trainer.evaluation.identity import Identity

DIRECTIONS = 4
SIDE = 7
"""Pixels of a filter."""
SMALLEST = 8
"""Side of the smallest level of the pyramid, in pixels; more wherever the image is no power of two."""
COLOURS = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, -1 / 2], [-1 / 4, 1 / 2, -1 / 4]])
"""Brightness, and two differences of colours: rows sum to 1, 0, 0."""


@dataclass(frozen=True)
class Wavelets:
    """The feature map; see the file. 224 numbers of images of 32 x 32 in colour, 288 of 64 x 64."""

    name: str = "wavelets"

    @property
    def identity(self) -> Identity:
        """There are no weights: a name, to be raised where another file than this computes other numbers."""
        return Identity("scattering-1", "none")

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([scattering(part) for part in pixels.split(250)])


def scattering(pixels: Tensor) -> Tensor:
    """uint8 ``[n, 1 or 3, h, w]`` -> float32 ``[n, k]``.

    Low-pass 4x4 a colour; then at each level of the pyramid the mean strength of each direction and colour in each
    quarter of the image, and of the brightness that of each direction of the strengths of each direction, one level on.
    """
    levels = pyramid(in_colours(pixels.float() / 255))
    strengths = [strength(level) for level in levels]
    first = [F.adaptive_avg_pool2d(each, 2) for each in strengths]
    of_brightness = [each[:, :DIRECTIONS] for each in strengths]
    second = [strength(F.avg_pool2d(finer, 2)).mean((2, 3)) for finer, _ in pairwise(of_brightness)]
    parts = [F.adaptive_avg_pool2d(levels[0], 4), *first, *second]
    return torch.cat([part.flatten(1) for part in parts], 1)


def in_colours(images: Tensor) -> Tensor:
    """``[n, ch, h, w]`` -> brightness and, of images in colour, two differences: ``[n, 1 or 3, h, w]``."""
    if images.shape[1] != 3:
        return images
    return torch.einsum("c d, n d h w -> n c h w", COLOURS.to(images), images)


def pyramid(images: Tensor) -> list[Tensor]:
    """``[n, ch, h, w]`` and its halves by averages of 2x2, down to ``SMALLEST``."""
    levels = [images]
    while min(levels[-1].shape[2:]) >= 2 * SMALLEST:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def strength(images: Tensor) -> Tensor:
    """``[n, ch, h, w] -> [n, ch * DIRECTIONS, h, w]``, channel by channel: how much of an edge there is, whichever
    phase: the modulus of a complex wavelet of each direction. The border is mirrored."""
    n = len(images)
    margin = SIDE // 2
    mode = "reflect" if min(images.shape[2:]) > margin else "replicate"
    padded = F.pad(rearrange(images, "n ch h w -> (n ch) 1 h w"), (margin,) * 4, mode=mode)
    real, imaginary = F.conv2d(padded, filters().to(images)).chunk(2, 1)
    modulus = (real.square() + imaginary.square()).sqrt()
    return rearrange(modulus, "(n ch) d h w -> n (ch d) h w", n=n)


def filters() -> Tensor:
    """Morlet wavelets of ``DIRECTIONS``, a wave length of 4 pixels, of mean 0 and norm 1: the real parts, then the
    imaginary: ``[2 * DIRECTIONS, 1, SIDE, SIDE]``."""
    axis = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = (-(x.square() + y.square()) / (2 * 1.6**2)).exp()
    waves = []
    for direction in range(DIRECTIONS):
        angle = math.pi * direction / DIRECTIONS
        phase = math.pi / 2 * (x * math.cos(angle) + y * math.sin(angle))
        real = window * (phase.cos() - (window * phase.cos()).sum() / window.sum())
        imaginary = window * phase.sin()
        waves.append((real / real.norm(), imaginary / imaginary.norm()))
    return torch.stack([real for real, _ in waves] + [imaginary for _, imaginary in waves])[:, None].float()
