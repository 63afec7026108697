"""Latents in memory: encoded once, normalised per channel to mean 0 and std sigma_data, and back to images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.autoencoders import Codec, Foreign
from reference_trainer.data.images import ImageSet, to_pixels, to_unit
from reference_trainer.errors import UserError
from reference_trainer.files import load_tensors, save_tensors
from robustcm.gates import recognisable_below
from robustcm.randomness import Stream, step_generator

RECOGNISED = 0.9
"""Posterior weight of the right sample, the data as prior; see ``recognisable_below``."""

SIGMA_DATA = 0.5
"""Standard deviation of every channel after normalisation (Karras et al. 2022); the preconditioning counts on it."""


@dataclass(frozen=True, kw_only=True)
class ImpulsiveOutliers:
    """Latents made impulsive on purpose: a known amount of what the paper finds in the latents of large autoencoders.

    Every element, independently with probability ``share``, has its deviation from its channel's mean multiplied by
    ``factor``. Applied to raw latents, so that the normalisation sees the outliers, as it would natural ones.
    """

    share: float = 0.01
    """Of the elements, 0 to 1."""
    factor: float = 10.0
    """By which their deviation is multiplied."""
    seed: int = 0
    """Of which elements."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    def __call__(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, h, w] -> [n, ch, h, w]``, a function of the latents and ``seed``."""
        generator = step_generator(self.seed, 0, stream=Stream.OUTLIERS)
        hit = torch.rand(raw_latents.shape, generator=generator) < self.share
        mean = raw_latents.mean((0, 2, 3), keepdim=True)
        return torch.where(hit, mean + self.factor * (raw_latents - mean), raw_latents)


@dataclass(frozen=True)
class LatentSpace:
    """An autoencoder and the statistics that normalise its latents; the only way in and out of the model's space."""

    codec: Codec
    mean: Tensor
    """``[ch]``, of the raw latents of the training images."""
    std: Tensor
    """``[ch]``."""
    recognised_at: float
    """Noise level, in the model's units, up to which a training latent shows with weight ``RECOGNISED`` which it is:
    the second evaluation's, unless the user gives one."""

    @staticmethod
    def of(codec: Codec, raw_latents: Tensor) -> LatentSpace:
        """Statistics of ``raw_latents [n, ch, h, w]``.

        Raises:
            UserError: latents that are not finite, or a channel that never changes.
        """
        bad = ~raw_latents.isfinite().flatten(1).all(1)
        if bad.any():
            raise UserError(
                f"{int(bad.sum())} of {len(bad)} images have latents that are NaN or infinite (the first is image "
                f"{int(torch.nonzero(bad)[0])}): the autoencoder does not fit these images"
            )
        std, mean = torch.std_mean(raw_latents.double(), dim=(0, 2, 3))
        if not (std > 0).all():
            constant = int(torch.nonzero(~(std > 0))[0])
            raise UserError(f"channel {constant} of the latents is constant: nothing to learn there; drop it")
        level = SIGMA_DATA  # of a single image every level shows which it is
        if len(raw_latents) > 1:
            scaled = (some_of(raw_latents) - _map(mean, raw_latents)) * (SIGMA_DATA / _map(std, raw_latents))
            level = recognisable_below(scaled, comparing(), share=RECOGNISED)
        return LatentSpace(codec, mean.float(), std.float(), level)

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, h, w] -> [n, ch, h, w]``."""
        return (raw_latents - _map(self.mean, raw_latents)) * (SIGMA_DATA / _map(self.std, raw_latents))

    def undo(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalise``."""
        return latents * (_map(self.std, latents) / SIGMA_DATA) + _map(self.mean, latents)

    def decode(self, latents: Tensor, batch_size: int = 250) -> Tensor:
        """Normalised latents -> uint8 ``[n, ch, h, w]`` on the CPU."""
        return torch.cat([to_pixels(self.codec.decode(self.undo(part))).cpu() for part in latents.split(batch_size)])


def encode(codec: Codec, pixels: Tensor, device: torch.device, batch_size: int = 250) -> Tensor:
    """uint8 ``[n, ch, h, w]`` -> raw latents on the CPU."""
    parts = tqdm(pixels.split(batch_size), desc="encoding", unit="batch", leave=False, delay=2)
    return torch.cat([codec.encode(to_unit(part).to(device)).cpu() for part in parts])


def encode_once(codec: Codec, images: ImageSet, device: torch.device, cache: Path) -> Tensor:
    """``encode`` of the training images, kept in ``cache`` if the codec is the user's, which may take minutes.

    The file's name is made of the images and of what the codec makes of the first few: another codec, another name.
    """
    if not isinstance(codec, Foreign):  # small, or nothing to do
        return encode(codec, images.train, device)
    digest = hashlib.sha256(images.fingerprint().encode())
    digest.update(encode(codec, images.train[:4], device).numpy().tobytes())
    file = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if file.is_file():
        try:
            return load_tensors(file)[0]["raw"]
        except UserError as error:
            tqdm.write(f"encoding again: {error}")
    raw = encode(codec, images.train, device)
    try:
        save_tensors(file, {"raw": raw}, {})
    except UserError as error:
        tqdm.write(f"the latents are not cached: {error}")
    return raw


def some_of(latents: Tensor, most: int = 5000, most_elements: int = 50_000_000) -> Tensor:
    """A random part of ``latents [n, ...]`` small enough to compare each with all."""
    fit = max(2, min(most, most_elements // latents[0].numel()))
    return latents[torch.randperm(len(latents), generator=step_generator(0, 0))[:fit]]


def comparing() -> torch.Generator:
    """The randomness of ``recognisable_below``: one for all, so that training, sampling and analysis agree."""
    return step_generator(0, 1)


def _map(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.to(like.device).reshape(1, -1, 1, 1)
