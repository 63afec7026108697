"""All randomness is a function of (seed, step, stream); the streams stand here, so that no two purposes share one."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What the numbers are for."""

    DRAW = 0
    """Noise, levels and gate of a step; the fits of autoencoder and classifier."""
    ORDER = 1
    """The order of the samples in an epoch."""
    SAMPLING = 2
    COUPLING = 3
    """Couplers that draw, in pools of several batches."""
    DROPOUT = 4
    OUTLIERS = 5
    """Outliers put into latents on purpose."""
    LABELS = 6
    """Which labels training hides."""
    CLASSES = 7
    """Which class each sample is drawn of."""
    POSTERIOR = 8
    """Latents drawn from an encoder's distribution; the step is a number made of the image."""
    PATCHES = 9
    """Where in a photograph patches are cut; the step is its number, the block how much smaller it was made."""


def counter_generator(seed: int, step: int, stream: int = Stream.DRAW, block: int = 0) -> np.random.Generator:
    """numpy's generator for block ``block`` of the rows of (seed, step, stream): no two of them share a number.

    Counter-based (Philox 4x64, Salmon et al. 2011): the four are its key and the high words of its counter, so nothing
    is hashed and nothing can collide, and who needs one block of rows draws that block alone.
    """
    key = np.array([seed % 2**64, int(stream)], dtype=np.uint64)
    counter = np.array([0, 0, block, step], dtype=np.uint64)  # the low words count what is drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(numbers: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 of ``shape``, CPU."""
    drawn: np.ndarray[Any, Any] = numbers.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(drawn)


def uniform(numbers: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1), float64 of ``shape``, CPU."""
    return torch.from_numpy(numbers.random(shape))


def step_generator(seed: int, step: int, stream: int = Stream.DRAW) -> torch.Generator:
    """A CPU generator for (seed, step, stream); different triples give unrelated streams.

    (Up to collisions: torch seeds its CPU generator with 32 bits, so a few pairs among 300,000 steps draw the same.)
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) % 2**64  # neighbours must not share the seed's high bits
    return torch.Generator().manual_seed((mixed ^ (mixed >> 32)) % 2**63)


def two_of(uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent uniform numbers out of the high and the low bits of each: ``[b]`` -> ``[b], [b]``, float64.

    Never 0 or 1, whose quantiles may be infinite. A pure function, unlike a second draw: a rank that has its slice of
    ``uniform`` has its slice of both.
    """
    scaled = uniform.double() * 2**26
    high = scaled.floor()
    return (high + 0.5) / 2**26, (scaled - high).clamp(2**-27, 1 - 2**-27)
