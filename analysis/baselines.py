"""The run a script looks at when it is given none: the cached digits baseline in latents."""

from __future__ import annotations

import argparse

from analysis.values import (
    BASELINE,
    Residuals,
    baseline_config,
    baseline_run,
    data_in,
    last_stage,
    load_images,
    trained_run,
)
from reference_trainer.data.autoencoders import KLAutoencoder
from reference_trainer.data.images import Digits
from reference_trainer.errors import UserError
from reference_trainer.machine import cache_folder, device_of
from reference_trainer.run import RunFolder


def baseline_of_digits(options: argparse.Namespace) -> RunFolder:
    """The baseline `td_outliers.py` trains on the latents of the digits, trained here where it is missing.

    Reads ``levels``, ``steps``, ``images`` and ``device`` of the options.
    """
    if options.levels is not None and options.levels < 2:
        raise UserError(f"--levels must be at least 2, got {options.levels}")
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}: residuals need a trained network")
    part, device, cache = KLAutoencoder(), device_of(options.device), cache_folder()
    images = load_images(Digits(), options.images)
    shape = data_in(part, images, cache, device).shape[1:]
    config = baseline_config(Digits(), part, shape, options.levels or 21, options.steps)
    return baseline_run(config, images, cache, device)


def residuals_for(options: argparse.Namespace) -> Residuals:
    """Residuals of ``options.run``, or of the digits baseline.

    Raises:
        UserError: no run or checkpoint.
    """
    device = device_of(options.device)
    run = baseline_of_digits(options) if options.run is None else RunFolder(options.run)
    images = load_images(run.config().data, options.images)
    trained = trained_run(run, images, device, BASELINE if options.run is None else None)
    return trained.residuals(options.levels or last_stage(trained.config), options.samples)
