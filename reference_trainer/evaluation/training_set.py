"""The training images that all is compared with: the first few in memory, the rest as they come.

Axes: pixels uint8 [n, ch, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_trainer.data.codecs import Codec
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import encode
from reference_trainer.data.stored import StoredImages
from reference_trainer.evaluation.statistics import HELD

MAX_IMAGES = HELD
"""Most images, on either side, whose pixels and latents are in memory at a time; without ``--samples`` the most there
are."""
BATCH = 500
"""Images that are decoded and go through the features at a time; a multiple of what each of the shipped ones takes, so
that it changes no digit."""


def training_images(images: ImageSet, seed: int, n: int = MAX_IMAGES) -> Tensor:
    """What samples are compared with, or the first of it, uint8 ``[n, ch, h, w]``.

    Shuffled: data come sorted by class, and some metrics look at the first few thousand only.
    """
    return images.pixels[_first_places(images, seed, n)]


def _first_places(images: ImageSet, seed: int, n: int) -> Tensor:
    places = images.train_places
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    return places[order[: min(n, MAX_IMAGES)]]


def raw_latents(images: ImageSet, places: Tensor, codec: Codec, device: torch.device) -> Tensor:
    """Of ``images.pixels[places]``, ``[m, ch, h, w]``: encoded, or those that the images of a store are decoded from.

    Args:
        device: where ``codec`` is.
    Raises:
        UserError: an autoencoder of the user's that fails.
    """
    if isinstance(images, StoredImages):
        return images.latents_at(places)
    return encode(codec, images.pixels[places], device)


def held_out_order(images: ImageSet, seed: int) -> Tensor:
    """Places ``[n]`` of the held-out images among all, shuffled: data come sorted by class."""
    places = images.held_out_places
    return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]


def held_out_images(images: ImageSet, seed: int, n: int = MAX_IMAGES) -> Tensor:
    """At most ``n`` of them, uint8 ``[n, ch, h, w]``, in ``held_out_order``."""
    return images.pixels[held_out_order(images, seed)[:n]]


@dataclass(frozen=True)
class TrainingSet:
    """``count`` shuffled training images."""

    images: ImageSet
    first: Tensor
    """uint8 ``[min(count, MAX_IMAGES), ch, h, w]``."""
    count: int
    seed: int
    device: torch.device
    """Where the autoencoder is."""

    @staticmethod
    def of(images: ImageSet, seed: int, n: int = MAX_IMAGES, device: torch.device | None = None) -> TrainingSet:
        """As many as there are, at most ``n``."""
        first = training_images(images, seed, n)
        there = len(images.store.latents("train")) if isinstance(images, StoredImages) else images.num_train
        return TrainingSet(images, first, max(len(first), min(n, there)), seed, device or torch.device("cpu"))

    def raw_latents(self, codec: Codec) -> Iterator[Tensor]:
        """Those of ``first``, see ``raw_latents``, ``BATCH`` at a time; ``codec`` is on ``device``."""
        for places in _first_places(self.images, self.seed, len(self.first)).split(BATCH):
            yield raw_latents(self.images, places, codec, self.device)

    def rest(self) -> Iterator[Tensor]:
        """The images behind ``first``, ``BATCH`` at a time."""
        more, images = self.count - len(self.first), self.images
        if more <= 0:
            return
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(images, StoredImages):
            behind = images.not_decoded()
            order = behind[torch.randperm(len(behind), generator=generator)][:more]
            for part in order.split(BATCH):
                yield images.decoded_at(part, self.device)
        else:
            places = images.train_places
            order = places[torch.randperm(len(places), generator=generator)][len(self.first) : self.count]
            for part in order.split(BATCH):
                yield images.pixels[part]
