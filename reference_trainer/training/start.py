"""What comes before the first step: the space a run is trained in, its own where it has one, else made and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.computing import Passes
from reference_trainer.config import TrainConfig
from reference_trainer.data.classes import Classes
from reference_trainer.data.codecs import Codec
from reference_trainer.data.gaussian_skip import AnySkip, Scalar, save_skip, skip_for
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import (
    Changed,
    InMemory,
    Latents,
    LatentSpace,
    WithOutliers,
    encode_once,
    recognised_below,
    require_finite,
    some_indices,
    some_of,
)
from reference_trainer.data.moments import Moments
from reference_trainer.data.origin import KeptSpace, Origin, Probe, reopen
from reference_trainer.data.store import StoredLatents, in_pieces
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import UserError
from reference_trainer.model import kept_skip
from reference_trainer.run import COMPUTING, RunFolder
from robustcm.fences import ConditionalClip, TukeyClip

FITTED_ON = 20_000
"""Latents of a store that a ``ConditionalClip`` is fitted on, at most, if they are enough for it."""


def latents_of_run(
    config: TrainConfig, run: RunFolder, images: ImageSet, cache: Path, device: torch.device, new_data: bool = False
) -> tuple[Latents, LatentSpace]:
    """Normalised latents of the training images in the space of ``run``: in memory, or of a store where it has them.

    A run that has a space keeps it, codec and statistics: its weights have a meaning there only. What it was made from
    is compared with what is there now.

    Args:
        new_data: go on although images or autoencoder have changed.
    Raises:
        UserError: they have changed; or see ``training_latents``.
    """
    file = run.space_file
    if not file.exists():
        if run.checkpoints():
            raise UserError(f"{run.root} has checkpoints, but no {file.name}: put it back, or give another --out")
        if isinstance(images, StoredImages):
            raw = _from_store(config, images)
            space, probe = _space_of(config, raw, images), Probe.of(images.codec, images.train, device)
        else:
            values, space, probe = _measured(config, images, cache, device)
            raw = InMemory(values)
        KeptSpace(space, raw.shape, images.pixels.shape[1], Origin.of(images, probe, space.codec)).save(file)
        return _normalised(raw, space), space
    kept, changes = reopen(file, config.autoencoder, images, device, new_data)
    if isinstance(images, StoredImages):
        raw = _from_store(config, images)
    else:
        raw = InMemory(_prepared(config, kept.space.codec, images, cache, device))
    if (shape := raw.shape) != kept.shape:
        raise UserError(
            f"{run.root} is trained on latents {list(kept.shape)}, these are {list(shape)}: give another --out"
        )
    space = kept.space
    if math.isnan(space.recognised_at):
        space = replace(space, recognised_at=recognised_below(raw, space.mean, space.std))
    if changes:
        kept = kept.made_from(images, device)
    if changes or space is not kept.space:
        replace(kept, space=space).save(file)
    return _normalised(raw, space), space


def skip_of_run(
    config: TrainConfig, run: RunFolder, latents: Latents, space: LatentSpace, device: torch.device
) -> AnySkip | None:
    """The skip that ``run`` is trained with, measured on its ``latents`` at its first start, and kept with it.

    Raises:
        UserError: it has checkpoints, but its skip is missing or damaged.
    """
    if isinstance(config.preconditioning, Scalar):
        return None
    if not run.skip_file.exists() and not run.checkpoints():
        save_skip(run.skip_file, skip_for(config.preconditioning, latents, config.objective.noise, space))
    return kept_skip(config, run, latents.shape, device)


def classes_of_run(config: TrainConfig, run: RunFolder, images: ImageSet, new_data: bool = False) -> Classes | None:
    """The classes that ``run`` is trained on; None where it is trained without.

    Kept with it: the first ones here, others by the caller once the new latents are known to fit.

    Raises:
        UserError: no labels, labels that are no class, or others than those the run was begun with.
    """
    if config.classes is None:
        return None
    now, file = Classes.of(images), run.classes_file
    if said := now.about_empty():
        tqdm.write(said)
    if run.space_file.exists():  # before that nothing was trained, and whatever lies there was not used
        kept = Classes.load(file)
        if kept == now:
            return now
        if len(kept.names) != len(now.names):
            raise UserError(
                f"{run.root} is trained on {len(kept.names)} classes, these are {len(now.names)}: give another --out"
            )
        if not new_data:
            raise UserError(
                f"{run.root} was begun with other labels or names of classes: bring those back, give a new run another "
                "--out, or add --new-data to go on with what is there now"
            )
    else:
        now.save(file)  # before the space, which says that they are there
    return now


def say_how_it_computes(passes: Passes, run: RunFolder, step: int, steps: int) -> None:
    """Print how ``run`` computes from ``step`` on and why, and keep it; say so where it is another way than before."""
    if step >= steps:
        return
    run.keep_rows_until(step - 1, (COMPUTING,))  # of a start from which nothing was saved nothing is left
    rows, now = run.rows(COMPUTING), passes.as_row()
    tqdm.write(str(passes))
    changed = [f"{name} {rows[-1].get(name)}" for name in now if rows[-1].get(name) != now[name]] if rows else []
    if not rows or changed:
        run.append_row(COMPUTING, {"step": step, **now})
    if changed:
        tqdm.write(
            f"up to step {step} it was {', '.join(changed)}: from here on the run is what it would have been to "
            "rounding, no longer bit for bit"
        )


def _normalised(raw: Latents, space: LatentSpace) -> Latents:
    """``raw`` in the model's units: at once where it is in memory, else what is taken of it."""
    return InMemory(space.normalise(raw.values)) if isinstance(raw, InMemory) else Changed(raw, space.normalise)


def new_latents(
    config: TrainConfig, images: ImageSet, cache: Path, device: torch.device
) -> tuple[Latents, LatentSpace]:
    """As ``latents_of_run`` of a run that has no space yet, and keeps none.

    Raises:
        UserError: see ``training_latents``.
    """
    if isinstance(images, StoredImages):
        raw = _from_store(config, images)
        space = _space_of(config, raw, images)
        return _normalised(raw, space), space
    values, space = training_latents(config, images, cache, device)
    return InMemory(values), space


def training_latents(
    config: TrainConfig, images: ImageSet, cache: Path, device: torch.device
) -> tuple[Tensor, LatentSpace]:
    """Normalised latents of the training images ``[n, ch, h, w]`` (CPU), and their space, made for them.

    Raises:
        UserError: latents that are not finite, constant, or not what the clip is made for; or see ``Probe.of``.
    """
    raw, space, _ = _measured(config, images, cache, device)
    return space.normalise(raw), space


def _measured(
    config: TrainConfig, images: ImageSet, cache: Path, device: torch.device
) -> tuple[Tensor, LatentSpace, Probe]:
    """Raw latents of the training images, as they are trained on; their space; a probe of the codec."""
    codec = config.autoencoder.fit(images, device, cache)
    probe = Probe.of(codec, images.train, device)  # before all images are encoded, which may take an hour
    if config.statistics is not None:
        config.statistics.of(probe.latents.shape[1])
    raw = _prepared(config, codec, images, cache, device)
    return raw, LatentSpace.of(codec, raw, config.statistics), probe


def _prepared(config: TrainConfig, codec: Codec, images: ImageSet, cache: Path, device: torch.device) -> Tensor:
    raw = encode_once(codec, images, device, cache)
    require_finite(raw, images)
    return config.prepare_latents(raw)


def _from_store(config: TrainConfig, images: StoredImages) -> Latents:
    """Raw latents of a store, with outliers put in and clipped as they are taken, by a clip fitted on some of them.

    Raises:
        UserError: latents that the clip is not made for.
    """
    raw: Latents = images.latents
    if config.outliers is not None:
        raw = WithOutliers(raw, config.outliers, images.moments.mean)
    if config.clip is None:
        return raw
    try:
        if isinstance(config.clip, TukeyClip):
            low, high = config.clip.bounds(some_of(raw))
            return Changed(raw, lambda values: values.clamp(low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)))
        some = raw.take(_sample_of(raw).sort().values)
        if len(some) < len(raw):
            tqdm.write(f"clip=ConditionalClip is fitted on {len(some)} of {len(raw)} latents")
        return Changed(raw, config.clip.fit(some))
    except ValueError as error:
        raise UserError(str(error)) from error


def _sample_of(raw: Latents) -> Tensor:
    """Which latents ``ConditionalClip`` is fitted on: ``FITTED_ON``, no more than 200 MB, but enough for it."""
    d = math.prod(raw.shape)
    least = ConditionalClip.SAMPLES_AN_ELEMENT * min(d, ConditionalClip.MOST_ELEMENTS)
    return some_indices(len(raw), raw.shape, most=max(FITTED_ON, least), most_elements=max(50_000_000, least * d))


def _space_of(config: TrainConfig, raw: Latents, images: StoredImages) -> LatentSpace:
    """The space of a store's latents ``raw``: statistics as given, from its index or, of changed ones, by a pass."""
    if config.statistics is not None:
        return LatentSpace.measured(images.codec, *config.statistics.of(raw.shape[0]), raw)
    moments = images.moments
    if not isinstance(raw, StoredLatents):
        bar = tqdm(list(in_pieces(len(raw))), desc="statistics of changed latents", unit="batch", leave=False, delay=2)
        moments = reduce(Moments.merged, (Moments.of(raw.take(indices)) for indices in bar))
    return LatentSpace.measured(images.codec, moments.mean, moments.std, raw)
