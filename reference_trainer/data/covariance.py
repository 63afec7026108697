"""Mean and covariance of normalised latents: what their store keeps of them, else a pass over all."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.data.latents import Changed, Latents, LatentSpace
from reference_trainer.data.statistics import MOST_ELEMENTS, Statistics
from reference_trainer.data.store import StoredLatents, in_pieces
from reference_trainer.errors import UserError


def mean_and_covariance(latents: Latents, space: LatentSpace | None = None) -> tuple[Tensor, Tensor]:
    """``[d]`` and ``[d, d]``, float64, of normalised ``latents``.

    Args:
        space: that of ``latents``; with it the covariance that a store keeps is taken.
    Raises:
        ValueError: more than ``MOST_ELEMENTS`` elements a latent.
    """
    if (d := math.prod(latents.shape)) > MOST_ELEMENTS:
        raise ValueError(f"latents of {d} elements, and covariances are of {MOST_ELEMENTS} at most")
    return _kept(latents, space) or _passed(latents)


def _kept(latents: Latents, space: LatentSpace | None) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance that the store of ``latents`` keeps of the same ones, normalised."""
    if space is None or not isinstance(latents, Changed) or not isinstance(latents.latents, StoredLatents):
        return None
    try:
        found = latents.latents.second_moments()
    except UserError as error:  # it can be had from the latents
        tqdm.write(f"measuring the covariance anew: {error}")
        return None
    if found is None:
        return None
    mean, covariance = found
    scale = space.normalise(torch.ones(1, *latents.shape)) - space.normalise(torch.zeros(1, *latents.shape))
    by = scale.flatten().double()
    return space.normalise(mean.reshape(1, *latents.shape)).flatten(), by[:, None] * covariance * by


def _passed(latents: Latents) -> tuple[Tensor, Tensor]:
    """Mean and covariance by a pass over all."""
    bar = tqdm(list(in_pieces(len(latents))), desc="covariance of the latents", unit="batch", leave=False, delay=2)
    begun = Statistics.begun(latents.take(torch.arange(1)).nan_to_num())
    found = reduce(lambda so_far, indices: so_far.with_latents(latents.take(indices)), bar, begun)
    covariance = found.covariance()
    assert covariance is not None
    return found.mean, covariance
