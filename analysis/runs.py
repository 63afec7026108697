"""A trained run with the data that it was trained on: images, or latents of a store."""

from __future__ import annotations

import torch

from analysis.inputs import load_images, some_of_images
from analysis.stored import trained_on_store
from analysis.values import Trained, trained_of
from reference_trainer.data.stored import LatentStore
from reference_trainer.errors import UserError
from reference_trainer.machine import cache_folder
from reference_trainer.model import load_model
from reference_trainer.run import RunFolder
from robustcm.objective import Objective


def trained_run(run: RunFolder, limit: int, device: torch.device) -> Trained:
    """``run`` on at most ``limit`` of the samples it was trained on.

    Raises:
        UserError: no run, no checkpoint, data that are gone or others by now, or no consistency function.
    """
    config = run.config()
    if not isinstance(config.objective, Objective):
        method = type(config.objective).__name__
        raise UserError(f"{run.root} is a run of a {method}: temporal differences are of consistency functions")
    run.require_checkpoint()
    if isinstance(config.data, LatentStore):
        return trained_on_store(load_model(run, device), run, config, limit, cache_folder())[0]
    images = load_images(config.data)
    return trained_of(load_model(run, device, images), run, some_of_images(images, limit))
