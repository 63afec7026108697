"""Brief iLCT baselines, trained once and cached: the networks looked at where no run is given."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from analysis.inputs import GivenAutoencoder, configuration, load_images, some_of_images
from analysis.values import Residuals, Space, Trained, network_of, noise_levels, normalised
from reference_trainer.config import Data, TrainConfig
from reference_trainer.data.autoencoders import Autoencoder, PixelSpace
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import encode_once
from reference_trainer.errors import UserError
from reference_trainer.machine import cache_folder, device_of
from reference_trainer.networks import DiT
from reference_trainer.options import to_json
from reference_trainer.presets import ilct
from reference_trainer.run import RunFolder
from reference_trainer.training.loop import train
from robustcm.schedules import FixedCurriculum, LevelGrid

BASELINE = "brief iLCT baseline"
FEWEST_IMAGES = 20


def baseline_config(data: Data, part: Autoencoder, shape: Sequence[int], num_levels: int, steps: int) -> TrainConfig:
    """iLCT at a fixed N, briefly: the preset ``ilct`` with a network of at most 4 x 4 tokens for ``shape`` (ch, h, w).

    Both spaces get the same network, so that a difference between them is theirs.
    """
    base, side = ilct(), shape[-1]
    patch = next(p for p in range(max(min(4, side), side // 4), side + 1) if side % p == 0)
    return replace(
        base,
        data=data,
        autoencoder=part,
        network=DiT(patch=patch, layers=2),
        objective=replace(base.objective, levels=LevelGrid(curriculum=FixedCurriculum(num_levels=num_levels))),
        learning_rate=replace(base.learning_rate, warmup_steps=min(100, steps // 4)),
        steps=steps,
        batch_size=64,
        save_every=100,
        keep_checkpoints=1,
    )


def baseline_run(config: TrainConfig, images: ImageSet, raw: Tensor, cache: Path, device: torch.device) -> RunFolder:
    """The run folder of ``config`` on ``images`` below ``cache``, trained to the end; resumed or reused if it is there.

    Args:
        raw: what the autoencoder makes of the training images; another autoencoder of the same name, another folder.
    Raises:
        UserError: what training raises.
        KeyboardInterrupt: after saving.
    """
    config = replace(config, batch_size=min(config.batch_size, len(images.train)))
    key = hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode() + images.fingerprint().encode())
    key.update(raw.numpy().tobytes())
    run = RunFolder(cache / "analysis" / f"ilct-{key.hexdigest()[:16]}")
    with run.locked():
        run.claim(config)
        files = run.checkpoints()
        if (not files or int(files[0].stem.removeprefix("step_")) < config.steps) and not train(
            config, run, images, cache, device
        ):
            raise KeyboardInterrupt
    return run


def trained_baseline(
    config: TrainConfig, given: GivenAutoencoder, raw: Tensor, images: ImageSet, cache: Path, device: torch.device
) -> tuple[RunFolder, Trained]:
    """A baseline on ``images``, which ``given`` encodes as ``raw [n, ch, h, w]``; see ``baseline_config``.

    Raises:
        UserError: latents or images no baseline can be trained on.
    """
    if not raw.isfinite().all():
        bad = int((~raw.isfinite()).sum())
        raise UserError(f"{bad} of {raw.numel()} values are not finite")
    x, channels = normalised(raw)
    if len(channels) < raw.shape[1]:
        raise UserError(f"training refuses data of which only {len(channels)} of {raw.shape[1]} channels vary")
    if len(x) < FEWEST_IMAGES:
        raise UserError(f"images: {len(x)}, too few to train one on, which takes {FEWEST_IMAGES}")
    run = baseline_run(config, images, raw, cache, device)
    network = network_of(config, run, x.shape[1:], device)
    origin = f"{BASELINE} ({config.steps} steps)"
    return run, Trained(config, network, x, origin, device, images.train_labels)


def baseline_spaces(
    config: TrainConfig,
    images: ImageSet,
    limit: int,
    *,
    num_levels: int,
    steps: int,
    count: int,
    cache: Path,
    device: torch.device,
) -> tuple[list[Space], list[str]]:
    """The pixels, and the latents of ``config`` if it has any, each with the residuals of a baseline trained there.

    The autoencoder is that of training, fitted on all ``images``; ``limit`` of them are looked at and trained on.
    Without residuals: with ``steps = 0``, or where a baseline cannot be trained; then a note says why. A space in which
    no number varies is left out; lines say so.

    Raises:
        UserError: none is left, or an autoencoder that does not work.
    """
    some, spaces, left_out = some_of_images(images, limit), [], []
    settings = {"pixels": replace(config, autoencoder=PixelSpace(), clip=None)}
    if not isinstance(config.autoencoder, PixelSpace):
        settings["latents"] = config
    # All that can go wrong with an autoencoder before anything is trained.
    codecs = {name: setting.autoencoder.fit(images, device, cache) for name, setting in settings.items()}
    raws = {name: encode_once(codec, some, device, cache) for name, codec in codecs.items()}
    for name, setting in settings.items():
        raw, codec, notes = raws[name], codecs[name], []
        found: Residuals | None = None
        try:
            x, channels = normalised(raw)
        except UserError as error:
            left_out.append(f"{name}: left out: {error}")
            continue
        if len(channels) < raw.shape[1]:
            gone = ", ".join(str(i) for i in range(raw.shape[1]) if i not in channels)
            notes.append(f"channel {gone} is constant, or never finite, and left out")
        if steps:
            given = GivenAutoencoder(repr(setting.autoencoder), codec)
            brief = baseline_config(config.data, cast(Any, given), raw.shape[1:], num_levels, steps)
            try:
                found = trained_baseline(brief, given, raw, some, cache, device)[1].residuals(num_levels, count)
            except UserError as error:
                notes.append(f"no baseline and no temporal differences: {error}")
        spaces.append(Space(name, x, found, tuple(notes), noise_levels(setting, codec, raw), channels))
    if not spaces:
        raise UserError("; ".join(left_out))
    return spaces, left_out


def baseline_of_digits(options: argparse.Namespace) -> tuple[RunFolder, Trained]:
    """The baseline `td_outliers.py` trains on the latents of the digits, trained here where it is missing.

    Reads ``levels``, ``steps``, ``images`` and ``device`` of the options.
    """
    if options.levels is not None and options.levels < 2:
        raise UserError(f"--levels must be at least 2, got {options.levels}")
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}: residuals need a trained network")
    device, cache = device_of(options.device), cache_folder()
    config = configuration(None, None, None, device)
    images = load_images(config.data)
    some = some_of_images(images, options.images)
    codec = config.autoencoder.fit(images, device, cache)
    given, raw = GivenAutoencoder(repr(config.autoencoder), codec), encode_once(codec, some, device, cache)
    brief = baseline_config(config.data, cast(Any, given), raw.shape[1:], options.levels or 21, options.steps)
    return trained_baseline(brief, given, raw, some, cache, device)
