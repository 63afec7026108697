"""The sets that are measured: how their latents are drawn, what they decode to, and their rows.

Axes: latents [n, ch, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Event
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.evaluation.features import Features, scales_kernel
from reference_trainer.evaluation.latent_space import Components, compare_latents
from reference_trainer.evaluation.reference import Reference, at_once, decoded, gathered, images_of, unbroken
from reference_trainer.evaluation.rows import Missing, Row, attempt, known, measure, split_rows, to_reconstructions
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import BATCH, MAX_IMAGES
from reference_trainer.model import TrainedModel

SAMPLES = ("1 evaluation", "2 evaluations")
FITTED, HELD_OUT, HALVES = "reconstructions", "floor: held-out images", "floor: half against half"
GAUSSIAN, CEILING = "bound: Gaussian latents decoded", "ceiling: noise decoded"
ORDER = (*SAMPLES, FITTED, HELD_OUT, HALVES, GAUSSIAN, CEILING)
"""Of the table's rows."""
LATENTS = "latents"
Rows = dict[str, Row | Missing]
Makers = Mapping[str, Callable[[], Iterator[Tensor]]]


@dataclass(frozen=True)
class Drawn:
    """Sets of latents by name, and the features of what they decode to."""

    latents: dict[str, Tensor | Missing]
    """At most ``MAX_IMAGES`` of each."""
    vectors: dict[str, Statistics | Missing]
    """Of these and of what was drawn behind them."""

    @staticmethod
    def of(
        model: TrainedModel,
        features: Features,
        makers: Makers,
        more: Makers | None = None,
        broken: Event | None = None,
    ) -> Drawn:
        """``makers`` give the latents, normalised, part by part; ``more`` those behind them, which are not kept.

        Args:
            broken: once it is set, nothing more is drawn, decoded or measured.
        Raises:
            Broken: it was set meanwhile.
        """
        broken = broken or Event()

        def drawn(make: Callable[[], Iterator[Tensor]]) -> Tensor:
            return torch.cat([*unbroken(make(), broken)])

        latents = at_once({name: partial(drawn, make) for name, make in makers.items()}, "samples", broken)

        def vectors(name: str) -> Statistics:
            behind = map(partial(decoded, model), (more or {}).get(name, lambda: iter(()))())
            return gathered(features, unbroken(chain(images_of(model, latents[name]), behind), broken))

        sets = {name: partial(vectors, name) for name in latents}
        return Drawn(latents, at_once(sets, "features of the samples", broken))

    def __or__(self, other: Drawn) -> Drawn:
        """Those of both."""
        return Drawn(self.latents | other.latents, self.vectors | other.vectors)


def samplers(model: TrainedModel, n: int, seed: int) -> Makers:
    """What draws n latents at 1 and at 2 network evaluations, ``BATCH`` at a time."""
    labels = None if model.classes is None else model.classes.proportional(n, seed)

    def draw(evaluations: int) -> Iterator[Tensor]:
        sigmas = model.sigmas(evaluations)
        for first in range(0, n, BATCH):
            own = None if labels is None else labels[first : first + BATCH]
            yield model.latents(min(BATCH, n - first), sigmas, seed, labels=own, first=first)

    return {name: partial(draw, i + 1) for i, name in enumerate(SAMPLES)}


def further_samples(model: TrainedModel, n: int, seed: int) -> Makers:
    """What draws those behind the first ``MAX_IMAGES`` of n, ``BATCH`` at a time."""

    labels = None if model.classes is None else model.classes.proportional(max(0, n - MAX_IMAGES), seed + 1)

    def draw(evaluations: int) -> Iterator[Tensor]:
        sigmas, name = model.sigmas(evaluations), SAMPLES[evaluations - 1]
        for first in tqdm(range(MAX_IMAGES, n, BATCH), desc=name, unit="batch", leave=False, delay=2):
            own = None if labels is None else labels[first - MAX_IMAGES :][:BATCH]
            yield model.latents(min(BATCH, n - first), sigmas, seed, labels=own, first=first)

    return {name: partial(draw, i + 1) for i, name in enumerate(SAMPLES)}


def without_training(model: TrainedModel, reference: Reference, seed: int) -> Makers:
    """What draws latents of the data's mean and covariance, and white noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(min(reference.count, MAX_IMAGES), *model.shape, generator=generator)
    gaussian = attempt(lambda: known(reference.components).draw(tuple(noise.shape), generator))
    return {GAUSSIAN: lambda: iter([known(gaussian)]), CEILING: lambda: iter([noise])}


def image_rows(
    vectors: Mapping[str, Statistics | Missing],
    reference: Reference,
    held_out: Statistics | Missing | None = None,
) -> Rows:
    """Of sets of decoded latents, against the training images and, but for the ceiling, their reconstructions."""
    to_images = {
        name: partial(measure, those, reference.images, reference.features, held_out) for name, those in vectors.items()
    }
    rows = at_once(to_images, "distances")
    compared = {
        name: partial(_to_reconstructions, reference, those)
        for name, those in vectors.items()
        if name != CEILING and those is not reference.reconstructions and not isinstance(rows[name], Missing)
    }
    found, out = at_once(compared, "distances to the reconstructions"), Rows()
    for name, row in rows.items():
        more = found.get(name, {})
        if isinstance(row, Missing) or isinstance(more, Missing):
            out |= {name: row} | ({f"{name}, to the reconstructions": more} if isinstance(more, Missing) else {})
        else:
            out[name] = row | more
    return out


def floor_rows(reference: Reference, held_out: Statistics | Missing) -> Rows:
    """Of real images: the held-out ones, and half of the training images against the other half.

    The halves also as reconstructions: what distance to these two sets have by chance.
    """
    real = reference.images
    first, second = (real, real) if isinstance(real, Missing) else map(Statistics.of, _halved(real.some))
    against = {
        HELD_OUT: partial(measure, held_out, real, reference.features),
        HALVES: partial(measure, first, second, reference.features, held_out),
    }
    rows = at_once(against, "floors")
    halves, both = rows[HALVES], reference.reconstructions
    if not isinstance(halves, Missing) and not isinstance(both, Missing):
        one, other = map(Statistics.of, _halved(both.some))
        more = attempt(lambda: to_reconstructions(one, other, scales_kernel(reference.features)))
        rows |= {f"{HALVES}, to the reconstructions": more} if isinstance(more, Missing) else {HALVES: halves | more}
    return rows


def latent_rows(latents: Mapping[str, Tensor | Missing], reference: Reference, bounds: bool) -> Rows:
    """Of each set that was drawn, but for the ceiling, against the latents of the training images.

    Args:
        bounds: with a row of half of these against the other half.
    """
    data, components = reference.latents, reference.components
    if isinstance(data, Missing) or isinstance(components, Missing):
        return {}
    against: dict[str, Callable[[], Row]] = {
        name: partial(compare_latents, data, components, those)
        for name, those in latents.items()
        if name != CEILING and not isinstance(those, Missing)
    }
    if bounds:
        against[HALVES] = partial(_halves, data)
    return at_once(against, "distances of latents")


def figures(rows: Rows, of_latents: Rows, reference: Reference) -> dict[str, Any]:
    """``rows``, ``latents`` and ``left_out`` of an evaluation."""
    out = split_rows({name: rows[name] for name in sorted(rows, key=_place)})
    latents = split_rows({name: of_latents[name] for name in sorted(of_latents, key=_place)})
    out["left_out"] |= {f"{name}, in latents": why for name, why in latents["left_out"].items()}
    components = reference.components
    if isinstance(components, Missing):
        out["left_out"][LATENTS] = components
        return out
    about = {"dimensions": components.dimensions, "components": len(components.variances)}
    return out | {LATENTS: about | {"rows": latents["rows"]}}


def _to_reconstructions(reference: Reference, vectors: Statistics | Missing) -> Row:
    return to_reconstructions(known(reference.reconstructions), known(vectors), scales_kernel(reference.features))


def _halves(latents: Tensor) -> Row:
    first, second = _halved(latents)
    return compare_latents(first, Components.of(first), second)


def _halved(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole[: len(whole) // 2], whole[len(whole) // 2 :]


def _place(name: str) -> int:
    return ORDER.index(name.partition(",")[0])
