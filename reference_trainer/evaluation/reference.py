"""What samples are compared with: the training images, and what the autoencoder makes of them.

Axes: pixels uint8 [n, ch, h, w], latents [n, ch, h, w], features [n, k].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import encode
from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import Features, vectors_of
from reference_trainer.evaluation.latent_space import Components
from reference_trainer.evaluation.metrics import psnr
from reference_trainer.evaluation.rows import Missing, T, attempt, known
from reference_trainer.model import TrainedModel

MAX_IMAGES = 5000
"""Most images a metric is computed from, on either side."""


@dataclass(frozen=True)
class Reference:
    """What all else is compared with. It does not change while training.

    Reconstructions are the training images through the autoencoder, encoded and decoded. Neither outliers put in on
    purpose nor a clip touch them, so that they are the same for all runs with one autoencoder, whatever those do about
    outliers.
    """

    features: Features
    count: int
    """n, of the training images; as many samples are drawn."""
    images: Tensor | Missing
    """Features of the training images."""
    latents: Tensor | Missing
    """Those of the training images, normalised."""
    components: Components | Missing
    """Of ``latents``."""
    reconstructions: Tensor | Missing
    """Features of the reconstructions."""
    fitted: Tensor | Missing
    """Features of what the latents that the run trains on, with its outliers and clip, decode to; where these are no
    others, ``reconstructions`` itself."""
    psnr: float | Missing
    """Of what has the features ``fitted``, dB."""

    @staticmethod
    def of(model: TrainedModel, train: Tensor, features: Features) -> Reference:
        """Of the training images ``train [n, ch, h, w]``.

        They go through the features twice, as they are and encoded and decoded; those whose latents outliers or the
        clip have changed once more.
        """
        raw = attempt(lambda: encode(model.space.codec, train, model.device))
        latents = attempt(lambda: model.space.normalise(known(raw)))
        trained_on = attempt(lambda: model.space.normalise(model.config.prepare_latents(known(raw))))
        near: list[float] = []  # the pixels are let go once their PSNR is known

        def fitted() -> Tensor:
            pixels = decoded(model, trained_on)
            near.append(psnr(train, pixels))
            return vectors_of(pixels, features)

        makers = {"images": lambda: _telling(train, features), "fitted": fitted}
        vectors = at_once(makers, "features of the reference")
        there = vectors["fitted"]
        return Reference(
            features=features,
            count=len(train),
            images=vectors["images"],
            latents=latents,
            components=attempt(lambda: Components.of(known(latents))),
            reconstructions=attempt(lambda: _untouched(model, known(latents), trained_on, there, features)),
            fitted=there,
            psnr=near[0] if near else Missing(there),
        )


def _untouched(
    model: TrainedModel, latents: Tensor, trained_on: Tensor | Missing, fitted: Tensor | Missing, features: Features
) -> Tensor:
    """Features of what ``latents`` decode to, where ``fitted`` are those of ``trained_on``: only what differs is
    decoded."""
    if isinstance(fitted, Missing) or isinstance(trained_on, Missing):
        return vectors_of(decoded(model, latents), features)
    changed = (latents != trained_on).flatten(1).any(1)
    if not changed.any():
        return fitted
    vectors = fitted.clone()
    vectors[changed] = vectors_of(decoded(model, latents[changed]), features)
    return vectors


def training_images(images: ImageSet, seed: int) -> Tensor:
    """What samples are compared with, uint8 ``[n, ch, h, w]``.

    Shuffled: data come sorted by class, and some metrics look at the first few thousand only.
    """
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    return images.train[order[:MAX_IMAGES]]


def decoded(model: TrainedModel, latents: Tensor | Missing) -> Tensor:
    """Normalised ``[n, ch, h, w]`` -> uint8 ``[n, ch, h, w]``.

    Raises:
        UserError: they are missing, or what they decode to is not finite.
    """
    return model.space.decode(known(latents).to(model.device))


def at_once(makers: Mapping[str, Callable[[], T]], what: str) -> dict[str, T | Missing]:
    """What each of ``makers`` returns, or why it does not; two at a time, under a bar that says ``what``.

    Each is a function of its own, without ambient randomness, so two at a time change no digit.
    """
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(attempt, makers.values())
        bar = tqdm(found, desc=what, unit="set", total=len(makers), leave=False, delay=2)
        return dict(zip(makers, bar, strict=True))


def _telling(train: Tensor, features: Features) -> Tensor:
    """``features`` of the training images.

    Raises:
        UserError: they cannot be had, or they tell no image from another.
    """
    vectors = vectors_of(train, features)
    if (vectors == vectors[0]).all():
        raise UserError(f"the features are the same for all {len(train)} training images")
    return vectors
