"""Latents, in memory or read as they are needed; normalised per channel to mean 0 and std sigma_data, and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.codecs import Codec, Foreign
from reference_trainer.data.images import ImageSet, to_pixels, to_unit
from reference_trainer.errors import UserError
from reference_trainer.files import as_written, load_tensors, save_tensors
from robustcm.checks import LARGEST, SMALLEST, need_real, need_seed
from robustcm.gates import recognisable_below
from robustcm.randomness import Stream, step_generator

RECOGNISED = 0.9
"""Posterior weight of the right sample, the data as prior; see ``recognisable_below``."""

SIGMA_DATA = 0.5
"""Standard deviation of every channel after normalisation (Karras et al. 2022); the preconditioning counts on it."""


class Latents(Protocol):
    """The latents of a data set, however many."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, h, w) of one."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """Those of ``indices [b]`` (int64, in any order, repeated ones too): float32 ``[b, ch, h, w]`` on the CPU."""
        ...


class InMemory:
    """``Latents`` that are a tensor."""

    def __init__(self, values: Tensor) -> None:
        """``values [n, ch, h, w]``."""
        self.values = values

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        ch, h, w = self.values.shape[1:]
        return ch, h, w

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> Tensor:
        """See ``Latents``."""
        return self.values[indices]


@dataclass(frozen=True)
class Changed:
    """``latents`` with ``change``, a function of each by itself, done to them where they are taken."""

    latents: Latents
    change: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        return self.latents.shape

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, indices: Tensor) -> Tensor:
        """See ``Latents``."""
        return self.change(self.latents.take(indices))


@dataclass(frozen=True)
class WithOutliers:
    """``latents`` made impulsive where they are taken: each by its index, so the same in whatever order they are read.

    Other elements than ``outliers`` puts into the same latents in memory, where it draws for all of them at once.
    """

    latents: Latents
    outliers: ImpulsiveOutliers
    mean: Tensor
    """``[ch]``, of ``latents``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(ch, h, w)."""
        return self.latents.shape

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, indices: Tensor) -> Tensor:
        """See ``Latents``."""
        values, outliers = self.latents.take(indices), self.outliers
        hit = torch.zeros(values.shape, dtype=torch.bool)
        for own, index in zip(hit, indices.tolist(), strict=True):
            generator = step_generator(outliers.seed, index + 1, stream=Stream.OUTLIERS)  # 0 draws for all at once
            torch.lt(torch.rand(own.shape, generator=generator), outliers.share, out=own)
        mean = _map(self.mean.to(values.dtype), values)
        return torch.where(hit, mean + outliers.factor * (values - mean), values)


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
        need_real(self, "share", least=0, most=1)
        need_real(self, "factor", least=SMALLEST, most=LARGEST)
        need_seed(self)

    def __call__(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, h, w] -> [n, ch, h, w]``, a function of the latents and ``seed``."""
        generator = step_generator(self.seed, 0, stream=Stream.OUTLIERS)
        hit = torch.rand(raw_latents.shape, generator=generator) < self.share
        mean = raw_latents.mean((0, 2, 3), keepdim=True)
        return torch.where(hit, mean + self.factor * (raw_latents - mean), raw_latents)


@dataclass(frozen=True, kw_only=True)
class GivenStatistics:
    """Mean and std by which latents are normalised, in the place of their own: one for all channels, or one each.

    As it stands data stay as they are, as OpenAI's consistency models see pixels. For the latents of Stable Diffusion's
    VAE as its diffusion models see them, std 1 or so, ``GivenStatistics(std=(5.49,))``, 1 / scaling_factor.
    """

    mean: tuple[float, ...] = (0.0,)
    """Subtracted."""
    std: tuple[float, ...] = (SIGMA_DATA,)
    """Becomes 0.5; above 0."""

    def __post_init__(self) -> None:
        if not self.mean or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must be one finite number or one a channel, got {self.mean}")
        if not self.std or not all(SMALLEST <= value <= LARGEST for value in self.std):
            raise ValueError(f"std must be one number above 0 or one a channel, got {self.std}")

    def of(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and std ``[ch]``, float64.

        Raises:
            UserError: they are of another number of channels.
        """
        for name in ("mean", "std"):
            if (count := len(getattr(self, name))) not in (1, channels):
                raise UserError(f"statistics.{name} has {count} numbers for {channels} channels: give 1 or {channels}")
        mean, std = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in (self.mean, self.std))
        return mean, std


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
    def of(codec: Codec, raw_latents: Tensor, given: GivenStatistics | None = None) -> LatentSpace:
        """Statistics of ``raw_latents [n, ch, h, w]``, or those ``given``.

        Raises:
            UserError: a channel that never changes; those given are of another number of channels.
        """
        if given is not None:
            return LatentSpace.measured(codec, *given.of(raw_latents.shape[1]), raw_latents)
        std, mean = torch.std_mean(raw_latents.double(), dim=(0, 2, 3))
        return LatentSpace.measured(codec, mean, std, raw_latents)

    @staticmethod
    def measured(codec: Codec, mean: Tensor, std: Tensor, raw_latents: Tensor | Latents) -> LatentSpace:
        """The space with these statistics ``[ch]`` (float64) of ``raw_latents [n, ch, h, w]``.

        Raises:
            UserError: a channel that never changes.
        """
        if not (std > 0).all():
            constant = int(torch.nonzero(~(std > 0))[0])
            raise UserError(f"channel {constant} of the latents is constant: nothing to learn there; drop it")
        return LatentSpace(codec, mean.float(), std.float(), recognised_below(raw_latents, mean, std))

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """``[n, ch, h, w] -> [n, ch, h, w]``."""
        return (raw_latents - _map(self.mean, raw_latents)) * (SIGMA_DATA / _map(self.std, raw_latents))

    def undo(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalise``."""
        return latents * (_map(self.std, latents) / SIGMA_DATA) + _map(self.mean, latents)

    def decode(self, latents: Tensor, batch_size: int = 250) -> Tensor:
        """Normalised latents -> uint8 ``[n, ch, h, w]`` on the CPU.

        Raises:
            UserError: latents or images that are not finite: as bytes they would pass for black ones.
        """
        if bad := len(not_finite(latents)):
            raise UserError(f"{bad} of {len(latents)} latents to decode are NaN or infinite: the network has diverged")
        parts, bad = [], 0
        for part in latents.split(batch_size):
            images = self.codec.decode(self.undo(part))
            bad += len(not_finite(images))
            parts.append(to_pixels(images).cpu())
        if bad:
            raise UserError(f"the decoder gives NaN or infinite values in {bad} of {len(latents)} images: mend it")
        return torch.cat(parts)


def recognised_below(raw_latents: Tensor | Latents, mean: Tensor, std: Tensor) -> float:
    """``LatentSpace.recognised_at`` of ``raw_latents [n, ch, h, w]`` with these statistics ``[ch]``."""
    if len(raw_latents) == 1:
        return SIGMA_DATA  # of a single image every level shows which it is
    some = some_of(raw_latents)
    scaled = (some - _map(mean, some)) * (SIGMA_DATA / _map(std, some))
    return recognisable_below(scaled, comparing(), share=RECOGNISED)


def not_finite(values: Tensor) -> list[int]:
    """Which of ``values [n, ...]`` have an element that is NaN or infinite."""
    return torch.nonzero(~values.isfinite().flatten(1).all(1)).flatten().tolist()


def require_finite(raw_latents: Tensor, images: ImageSet) -> None:
    """Refuse latents of the training images that are not finite.

    Raises:
        UserError: how many, and of which files.
    """
    if bad := not_finite(raw_latents):
        named = ", ".join(images.train_name(index) for index in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {len(raw_latents)} images have latents that are NaN or infinite ({named}{more}): mend the "
            "autoencoder, or take these images away, and run the same command again"
        )


def spread(values: Tensor, most: int = 16) -> Tensor:
    """Up to ``most`` of ``values [n, ...]``, evenly over all of them, the first and the last among them."""
    count = min(most, len(values))
    return values[torch.arange(count) * (len(values) - 1) // max(1, count - 1)]


def encode(codec: Codec, pixels: Tensor, device: torch.device, batch_size: int = 250) -> Tensor:
    """uint8 ``[n, ch, h, w]`` -> raw latents on the CPU."""
    parts = tqdm(pixels.split(batch_size), desc="encoding", unit="batch", leave=False, delay=2)
    return torch.cat([codec.encode(to_unit(part).to(device)).cpu() for part in parts])


def encode_once(codec: Codec, images: ImageSet, device: torch.device, cache: Path) -> Tensor:
    """``encode`` of the training images, kept in ``cache`` if the codec is the user's, which may take minutes.

    The file's name is made of the images and of what the codec makes of a few: another codec, another name. Latents
    that are not finite are not kept: whoever mends the autoencoder shall not meet them again.
    """
    if not isinstance(codec, Foreign):  # small, or nothing to do
        return encode(codec, images.train, device)
    digest = hashlib.sha256(images.fingerprint().encode())
    digest.update(encode(codec, spread(images.train), device).numpy().tobytes())
    file = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if file.is_file():
        try:
            tensors, _ = load_tensors(file)
            with as_written(file):
                raw = tensors["raw"]
            if not not_finite(raw):
                return raw
            tqdm.write(f"encoding again: {file} holds latents that are not finite")
        except UserError as error:
            tqdm.write(f"encoding again: {error}")
    raw = encode(codec, images.train, device)
    if not_finite(raw):
        return raw
    try:
        save_tensors(file, {"raw": raw}, {})
    except UserError as error:
        tqdm.write(f"the latents are not cached: {error}")
    return raw


def some_of(latents: Tensor | Latents, most: int = 5000, most_elements: int = 50_000_000) -> Tensor:
    """A random part of ``latents [n, ...]`` small enough to compare each with all."""
    if isinstance(latents, Tensor):
        return latents[some_indices(len(latents), latents.shape[1:], most, most_elements)]
    return latents.take(some_indices(len(latents), latents.shape, most, most_elements))


def some_indices(n: int, shape: Sequence[int], most: int = 5000, most_elements: int = 50_000_000) -> Tensor:
    """Which of ``n`` latents of ``shape`` are ``some_of`` them."""
    fit = max(2, min(most, most_elements // math.prod(shape)))
    return torch.randperm(n, generator=step_generator(0, 0))[:fit]


def comparing() -> torch.Generator:
    """The randomness of ``recognisable_below``: one for all, so that training, sampling and analysis agree."""
    return step_generator(0, 1)


def _map(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.to(like.device).reshape(1, -1, 1, 1)
