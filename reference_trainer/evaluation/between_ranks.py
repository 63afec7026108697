"""Samples that several processes draw, decode and look at between them, block by block; figures are those of one.

A block of ``BATCH`` images is drawn of its own random numbers, decoded and given to the features as one process does
it, and the leading rank puts them together in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.evaluation.features import Features, vectors_of
from reference_trainer.evaluation.reference import decoded
from reference_trainer.evaluation.rows import Missing, attempt, known
from reference_trainer.evaluation.sets import SAMPLES, Drawn
from reference_trainer.evaluation.statistics import Statistics
from reference_trainer.evaluation.training_set import BATCH, MAX_IMAGES
from reference_trainer.model import TrainedModel
from reference_trainer.ranks import Ranks


@dataclass(frozen=True)
class Block:
    """``BATCH`` samples, or what is left at the end."""

    latents: Tensor | Missing
    """Normalised, CPU; those behind ``MAX_IMAGES`` are not kept."""
    vectors: Tensor | Missing
    """Features of what they decode to."""


def samples_between(
    model: TrainedModel,
    features: Features,
    n: int,
    seed: int,
    ranks: Ranks,
    stopped: Callable[[], bool] = lambda: False,
) -> Drawn | None:
    """As ``Drawn.of`` has them of ``samplers`` and ``further_samples``: n at 1 and at 2 network evaluations.

    All ranks call it; what is drawn the leading one gets, the others nothing. None: they were ``stopped`` on the way.
    """
    found = {
        name: _joined(ranks.in_turns(_blocks(model, features, evaluations, n, seed), stopped), name, n)
        for evaluations, name in enumerate(SAMPLES, 1)
    }
    if not ranks.leads:
        return Drawn({}, {})
    whole = {name: set_ for name, set_ in found.items() if set_ is not None}
    if len(whole) < len(found):
        return None
    return Drawn({name: pair[0] for name, pair in whole.items()}, {name: pair[1] for name, pair in whole.items()})


def _joined(blocks: Iterator[Block], name: str, n: int) -> tuple[Tensor | Missing, Statistics | Missing] | None:
    """Latents and features of a set; None: some of its blocks were not drawn, or not for this rank."""
    bar = tqdm(blocks, desc=f"samples, {name}", unit="block", total=-(-n // BATCH), leave=False, delay=2)
    latents, failed = list[Tensor | Missing](), list[Missing]()

    def vectors() -> Iterator[Tensor]:
        for block in bar:  # to the end, whatever fails: so do the other ranks
            latents.append(block.latents)
            if isinstance(block.vectors, Missing):
                failed.append(block.vectors)
            elif not failed:
                yield block.vectors

    parts = vectors()
    first = next(parts, None)
    statistics = None if first is None else Statistics.gathered(chain([first], parts))
    vectors_of_all = failed[0] if failed else statistics
    if vectors_of_all is None or len(latents) < -(-n // BATCH):
        return None
    return attempt(lambda: torch.cat([known(part) for part in latents])), vectors_of_all


def _blocks(model: TrainedModel, features: Features, evaluations: int, n: int, seed: int) -> list[Callable[[], Block]]:
    """What makes each block of n samples; labels as ``samplers`` and ``further_samples`` ask for them."""
    labels = None
    if model.classes is not None:
        asked = [model.classes.proportional(min(n, MAX_IMAGES), seed)]
        if n > MAX_IMAGES:
            asked.append(model.classes.proportional(n - MAX_IMAGES, seed + 1))
        labels = torch.cat(asked)

    def draw(first: int) -> Tensor:
        own = None if labels is None else labels[first : first + BATCH]
        return model.latents(min(BATCH, n - first), model.sigmas(evaluations), seed, labels=own, first=first)

    def block(first: int) -> Block:
        latents = attempt(partial(draw, first))
        vectors = attempt(lambda: vectors_of(decoded(model, latents), features))
        return Block(latents if first < MAX_IMAGES else torch.empty(0, *model.shape), vectors)

    return [partial(block, first) for first in range(0, n, BATCH)]
