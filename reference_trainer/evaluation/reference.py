"""What samples are compared with: the training images, and what the autoencoder makes of them.

Axes: pixels uint8 [n, ch, h, w], latents [n, ch, h, w], features [n, k].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from threading import Event

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.latents import encode
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import STOPS, Stop, UserError
from reference_trainer.evaluation.features import Features, vectors_of
from reference_trainer.evaluation.kept import Kept
from reference_trainer.evaluation.latent_space import Components
from reference_trainer.evaluation.metrics import psnr
from reference_trainer.evaluation.rows import Missing, T, attempt, known
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import BATCH, TrainingSet
from reference_trainer.model import TrainedModel


@dataclass(frozen=True)
class Reference:
    """What all else is compared with. It does not change while training.

    Reconstructions are the training images through the autoencoder, encoded and decoded. Neither outliers put in on
    purpose nor a clip touch them, so that they are the same for all runs with one autoencoder, whatever those do about
    outliers. The images of a store are reconstructions already, and their latents those of the store.
    """

    features: Features
    count: int
    """n, of the training images; as many samples are drawn."""
    images: Statistics | Missing
    """Features of the training images."""
    latents: Tensor | Missing
    """Those of the first ``MAX_IMAGES`` training images, normalised."""
    components: Components | Missing
    """Of ``latents``."""
    reconstructions: Statistics | Missing
    """Features of the reconstructions."""
    fitted: Statistics | Missing
    """Features of what the latents that the run trains on, with its outliers and clip, decode to, of the first
    ``MAX_IMAGES``: what is clipped depends on the others. Where these are no others, ``reconstructions`` itself (of a
    store ``images``)."""
    psnr: float | Missing
    """Of what has the features ``fitted``, dB."""

    @staticmethod
    def of(
        model: TrainedModel,
        train: TrainingSet,
        features: Features,
        kept: Kept | None = None,
        broken: Event | None = None,
    ) -> Reference:
        """Of the training images ``train``.

        They go through the features twice, as they are and encoded and decoded, those of a store once; those whose
        latents outliers or the clip have changed once more.

        Args:
            kept: where the statistics of a run before are found, and those of this one left.
            broken: once it is set, nothing more is encoded, decoded or measured.
        Raises:
            Broken: it was set meanwhile.
        """
        stored, broken = isinstance(train.images, StoredImages), broken or Event()
        raw = attempt(lambda: torch.cat([*unbroken(train.raw_latents(model.space.codec), broken)]))
        latents = attempt(lambda: model.space.normalise(known(raw)))
        trained_on = attempt(lambda: model.space.normalise(model.config.prepare_latents(known(raw))))
        near: list[float] = []  # the pixels are let go once their PSNR is known

        def images() -> Statistics:
            found = kept.once(of_all) if kept else of_all()
            if (found.some == found.some[0]).all():
                raise UserError(f"the features are the same for all {found.count} training images")
            return found

        def of_all() -> Statistics:
            return gathered(features, unbroken(chain(train.first.split(BATCH), train.rest()), broken))

        def fitted() -> Statistics:
            pixels = torch.cat([*unbroken(images_of(model, trained_on), broken)])
            near.append(psnr(train.first, pixels))
            return gathered(features, unbroken(pixels.split(BATCH), broken))

        makers: dict[str, Callable[[], Statistics]] = {"images": images, "fitted": fitted}
        if stored and not _changed(latents, trained_on):
            del makers["fitted"]
        there = at_once(makers, "features of the reference", broken)
        if stored:
            first = reconstructions = there["images"]
            there = {"fitted": first} | there
        else:
            first = attempt(lambda: _untouched(model, known(latents), trained_on, there["fitted"], features))
            reconstructions = attempt(lambda: _with_the_rest(model, known(first), train, features, kept, broken))
        return Reference(
            features=features,
            count=train.count,
            images=there["images"],
            latents=latents,
            components=attempt(lambda: Components.of(known(latents))),
            reconstructions=reconstructions,
            fitted=reconstructions if first is there["fitted"] else there["fitted"],
            psnr=near[0] if near else Missing("nothing was decoded"),
        )


def _changed(latents: Tensor | Missing, trained_on: Tensor | Missing) -> bool:
    """Whether outliers or a clip have changed the latents, as far as these are known."""
    if isinstance(latents, Missing) or isinstance(trained_on, Missing):
        return type(latents) is not type(trained_on)
    return not torch.equal(latents, trained_on)


def _untouched(
    model: TrainedModel, latents: Tensor, trained_on: Tensor | Missing, fitted: Statistics | Missing, features: Features
) -> Statistics:
    """Features of what ``latents`` decode to, where ``fitted`` are those of ``trained_on``: only what differs is
    decoded."""
    if isinstance(fitted, Missing) or isinstance(trained_on, Missing):
        return gathered(features, images_of(model, latents))
    changed = (latents != trained_on).flatten(1).any(1)
    if not changed.any():
        return fitted
    vectors = fitted.some.clone()
    vectors[changed] = vectors_of(decoded(model, latents[changed]), features)
    return Statistics.of(vectors)


def _with_the_rest(
    model: TrainedModel, first: Statistics, train: TrainingSet, features: Features, kept: Kept | None, broken: Event
) -> Statistics:
    """The features of the reconstructions of all of ``train``, where ``first`` are those of its first images."""
    if train.count == len(train.first):
        return first

    def reconstructed(pixels: Tensor) -> Tensor:
        return decoded(model, model.space.normalise(encode(model.space.codec, pixels, model.device)))

    def rest() -> Statistics:
        return gathered(features, map(reconstructed, unbroken(train.rest(), broken)))

    return first.merged(kept.also(reconstructed(train.first[:4])).once(rest) if kept else rest())


def gathered(features: Features, batches: Iterable[Tensor]) -> Statistics:
    """The statistics of ``features`` of uint8 images that come in ``batches``.

    Raises:
        UserError: see ``vectors_of``.
    """
    return Statistics.gathered(vectors_of(batch, features) for batch in batches)


def images_of(model: TrainedModel, latents: Tensor | Missing) -> Iterator[Tensor]:
    """What normalised ``latents [n, ...]`` decode to, ``BATCH`` images at a time."""
    return (decoded(model, part) for part in known(latents).split(BATCH))


def decoded(model: TrainedModel, latents: Tensor | Missing) -> Tensor:
    """Normalised ``[n, ch, h, w]`` -> uint8 ``[n, ch, h, w]``.

    Raises:
        UserError: they are missing, or what they decode to is not finite.
    """
    return model.space.decode(known(latents).to(model.device))


class Broken(Stop):
    """Ends a measurement that nobody waits for any more."""


def unbroken(parts: Iterable[T], broken: Event) -> Iterator[T]:
    """``parts`` as long as ``broken`` is not set.

    Raises:
        Broken: it was.
    """
    for part in parts:
        if broken.is_set():
            raise Broken
        yield part


def at_once(makers: Mapping[str, Callable[[], T]], what: str, broken: Event | None = None) -> dict[str, T | Missing]:
    """What each of ``makers`` returns, or why it does not; two at a time, under a bar that says ``what``.

    Each is a function of its own, without ambient randomness, so two at a time change no digit; code of the user's,
    which need not be, is entered by one of them at a time.

    Args:
        broken: set when a stop comes, for makers that look at it: the pool waits for them.
    """
    with ThreadPoolExecutor(2) as pool:
        try:
            found = pool.map(attempt, makers.values())
            bar = tqdm(found, desc=what, unit="set", total=len(makers), leave=False, delay=2)
            return dict(zip(makers, bar, strict=True))
        except STOPS:
            pool.shutdown(wait=False, cancel_futures=True)
            if broken is not None:
                broken.set()
            raise
