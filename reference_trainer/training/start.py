"""What comes before the first step: the space a run is trained in, its own where it has one, else made and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from reference_trainer.config import TrainConfig
from reference_trainer.data.codecs import Codec
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import LatentSpace, encode_once, recognised_below, require_finite
from reference_trainer.data.origin import KeptSpace, Origin, Probe, reopen
from reference_trainer.errors import UserError
from reference_trainer.run import RunFolder


def latents_of_run(
    config: TrainConfig, run: RunFolder, images: ImageSet, cache: Path, device: torch.device, new_data: bool = False
) -> tuple[Tensor, LatentSpace]:
    """Normalised latents of the training images ``[n, ch, h, w]`` (CPU) in the space of ``run``.

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
        latents, space, probe = _fresh(config, images, cache, device)
        ch, h, w = latents.shape[1:]
        KeptSpace(space, (ch, h, w), images.pixels.shape[1], Origin.of(images, probe, space.codec)).save(file)
        return latents, space
    kept, changes = reopen(file, config.autoencoder, images, device, new_data)
    raw = _prepared(config, kept.space.codec, images, cache, device)
    if (shape := tuple(raw.shape[1:])) != kept.shape:
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
    return space.normalise(raw), space


def training_latents(
    config: TrainConfig, images: ImageSet, cache: Path, device: torch.device
) -> tuple[Tensor, LatentSpace]:
    """Normalised latents of the training images ``[n, ch, h, w]`` (CPU), and their space, made for them.

    Raises:
        UserError: latents that are not finite, constant, or not what the clip is made for; or see ``Probe.of``.
    """
    latents, space, _ = _fresh(config, images, cache, device)
    return latents, space


def _fresh(
    config: TrainConfig, images: ImageSet, cache: Path, device: torch.device
) -> tuple[Tensor, LatentSpace, Probe]:
    codec = config.autoencoder.fit(images, device, cache)
    probe = Probe.of(codec, images.train, device)  # before all images are encoded, which may take an hour
    raw = _prepared(config, codec, images, cache, device)
    space = LatentSpace.of(codec, raw)
    return space.normalise(raw), space, probe


def _prepared(config: TrainConfig, codec: Codec, images: ImageSet, cache: Path, device: torch.device) -> Tensor:
    raw = encode_once(codec, images, device, cache)
    require_finite(raw, images)
    return config.prepare_latents(raw)
