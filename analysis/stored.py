"""A store of latents looked at: some of what it holds, with a brief baseline trained on all, or a run that was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.baselines import BASELINE, baseline_config, baseline_run
from analysis.values import Space, Trained, network_of, noise_levels, normalised, space_of_run
from reference_trainer.config import TrainConfig
from reference_trainer.data.latents import Latents
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import UserError
from reference_trainer.model import TrainedModel, load_model
from reference_trainer.run import RunFolder
from reference_trainer.training.start import latents_of_run


@dataclass(frozen=True)
class Some:
    """Some of the latents that are trained on: a fixed random choice, in order."""

    values: Tensor
    """``[n, ch, h, w]``."""
    labels: Tensor | None
    """``[n]``."""
    note: str

    @staticmethod
    def of(latents: Latents, images: StoredImages, limit: int) -> Some:
        """At most ``limit`` of ``latents``, which are those of ``images``, changed perhaps."""
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        labels = images.train_labels
        own = None if labels is None else labels[chosen]
        return Some(latents.take(chosen), own, f"latents looked at: {len(chosen)} of the {len(latents)} of the store")


def stored_space(
    config: TrainConfig,
    images: StoredImages,
    limit: int,
    *,
    num_levels: int,
    steps: int,
    count: int,
    cache: Path,
    device: torch.device,
) -> Space:
    """The latents of a store, with the residuals of a baseline trained on all of them; as ``baseline_spaces``.

    Raises:
        UserError: no channel varies.
    """
    some = Some.of(images.latents, images, limit)
    x, channels = normalised(some.values)
    notes, found = [some.note], None
    if steps:
        shape = some.values.shape[1:]
        brief = baseline_config(config.data, config.autoencoder, shape, num_levels, steps)
        try:
            run = baseline_run(brief, images, some.values, cache, device)
            network = network_of(run.config(), run, shape, device)
            origin = f"{BASELINE} ({steps} steps)"
            found = Trained(brief, network, x, origin, device, some.labels).residuals(num_levels, count)
        except UserError as error:
            notes.append(f"no baseline and no temporal differences: {error}")
    return Space("latents", x, found, tuple(notes), noise_levels(config, images.codec, some.values), channels)


def run_on_store(
    run: RunFolder,
    config: TrainConfig,
    limit: int,
    num_levels: int | None,
    count: int,
    cache: Path,
    device: torch.device,
) -> Space:
    """A trained run on the store that it was trained on; as ``run_space``.

    Raises:
        UserError: no run, no checkpoint, or another store than the run was made from.
    """
    model = load_model(run, device)
    trained, note = trained_on_store(model, run, config, limit, cache)
    return space_of_run(model, trained, own=True, num_levels=num_levels, count=count, notes=[note])


def trained_on_store(
    model: TrainedModel, run: RunFolder, config: TrainConfig, limit: int, cache: Path
) -> tuple[Trained, str]:
    """``model``, which ``run`` loads as, on at most ``limit`` latents of its store; and how many those are, in words.

    Raises:
        UserError: no checkpoint, or another store than the run was made from.
    """
    device, images = model.device, config.load_images(model.device)
    assert isinstance(images, StoredImages)
    some = Some.of(latents_of_run(config, run, images, cache, device)[0], images, limit)
    network = network_of(config, run, model.shape, device)
    origin = f"run {run.root.resolve().name} ({model.step} steps)"
    return Trained(config, network, some.values, origin, device, some.labels, model.skip), some.note
