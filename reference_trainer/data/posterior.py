"""Latents drawn from an encoder's distribution: a function of the seed and the image, in whatever order they come."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from reference_trainer.data.images import to_pixels
from robustcm.randomness import Stream, step_generator

TakenLatents = Literal["mean", "sample"]


def need_latents(latents: str) -> None:
    """Refuse another word.

    Raises:
        ValueError: just that.
    """
    if latents not in ("mean", "sample"):
        raise ValueError(f"latents is 'mean' or 'sample', got {latents!r}")


def sampled(mean: Tensor, std: Tensor, images: Tensor, seed: int) -> Tensor:
    """One draw for each image: ``mean + std * noise``, ``[n, ch, h, w]``, float32.

    The noise is that of a generator which (seed, the image's pixels) make. So whoever encodes an image again, in
    another batch, shard, process or run, gets the same latents, and a mirrored image gets a draw of its own.

    Args:
        mean, std: ``[n, ch, h, w]`` of the distributions.
        images: ``[n, ch, h, w]`` in -1 .. 1, that they are of.
    """
    pixels = to_pixels(images.float()).cpu().numpy()
    noise = torch.stack([torch.randn(mean.shape[1:], generator=_generator(image.tobytes(), seed)) for image in pixels])
    return mean.float() + std.float() * noise.to(mean.device)


def _generator(image: bytes, seed: int) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(image).digest()[:7], "little")
    return step_generator(seed, number, Stream.POSTERIOR)
