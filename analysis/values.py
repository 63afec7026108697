"""What the figures show: images as training would take them, their values, and the temporal differences of a network.

Axes: n = samples, ch, h, w; data are normalised per channel to mean 0, std 0.5 over the images looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import PixelSpace
from reference_trainer.data.codecs import Codec
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import SIGMA_DATA, GivenStatistics, LatentSpace
from reference_trainer.errors import UserError
from reference_trainer.model import TrainedModel, build_network, kept_classes, load_model, number_of
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import batch_indices, with_measured_gate, with_measured_parts
from robustcm.consistency import temporal_difference
from robustcm.couplers import exact
from robustcm.gates import Above, AboveExplained
from robustcm.losses import sample_r2
from robustcm.objective import Objective, draw
from robustcm.preconditioning import Skip
from robustcm.schedules import FixedCurriculum, LevelGrid
from robustcm.tails.boxes import FEW

MAX_ELEMENTS = 2**26  # of temporal differences held at once: 256 MB
SEED = 1  # of the noise the temporal differences are measured with; training drew from seed 0


@dataclass(frozen=True)
class Residuals:
    """Temporal differences as the loss sees them: levels, noise and coupling drawn as in training."""

    td: Tensor
    """``[n, ch, h, w]`` student minus teacher."""
    level: Tensor
    """``[n]`` int64, index of the student's noise level; 0 is sigma_max."""
    weight: Tensor
    """``[n]`` the loss weight of the pair of levels."""
    num_levels: int
    sigmas: Tensor
    """``[num_levels]`` falling."""
    origin: str
    """Whose they are, in words."""

    @property
    def r(self) -> Tensor:
        """``[n]`` norms of whole samples."""
        return sample_r2(self.td, torch.zeros_like(self.td)).sqrt()

    @property
    def d(self) -> int:
        return self.td[0].numel()


@dataclass(frozen=True)
class NoiseLevels:
    """Where training on some data puts the second evaluation and the gate of the coupling, in units of sigma."""

    recognised: float
    """Up to which a noisy sample shows which it is."""
    explained: float
    """Up to which a noisy sample explains ``share`` of the variance."""
    share: float
    clip: str
    """What the data went through before, as one would type it."""
    moved: float
    """Share of the values that it moved."""
    too_few: bool
    """No more samples than elements: of data that vary in all directions the levels come out too high."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Space:
    """One column of the figure: the data in one space, and the temporal differences there."""

    name: str
    data: Tensor
    """``[n, ch, h, w]`` normalised, channels that never change left out; NaN where the autoencoder gave NaN."""
    residuals: Residuals | None
    notes: tuple[str, ...] = ()
    """What could not be had, and why."""
    levels: NoiseLevels | str | None = None
    """Or why there are none."""
    channels: tuple[int, ...] | None = None
    """Which channels ``data`` has; None: all."""


def normalised(raw: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``raw [n, ch, h, w]`` at mean 0, std 0.5 per channel over its finite values, and the channels that this is of.

    Channels that are constant or have no finite value are left out.

    Raises:
        UserError: no channel is left.
    """
    values = torch.where(raw.isfinite(), raw, torch.nan).double()
    mean = values.nanmean((0, 2, 3), keepdim=True)
    std = ((values - mean) ** 2).nanmean((0, 2, 3), keepdim=True).sqrt()
    varying = std.flatten() > 0
    if not varying.any():
        raise UserError("every channel of the data is constant or has no finite value: nothing to measure")
    x = ((values - mean) * (SIGMA_DATA / std)).float()
    return x[:, varying], tuple(torch.nonzero(varying).flatten().tolist())


def noise_levels(config: TrainConfig, codec: Codec, raw: Tensor) -> NoiseLevels | str:
    """What training with ``config`` measures on the latents ``raw [n, ch, h, w]``; or why it would refuse them."""
    try:
        prepared = config.prepare_latents(raw)
        space = LatentSpace.of(codec, prepared, config.statistics)
        x = space.normalise(prepared)
        return NoiseLevels(
            recognised=space.recognised_at,
            **gate_on(x, config),
            clip=str(config.clip),
            moved=float((prepared != raw).float().mean()),
            too_few=len(raw) <= raw[0].numel(),
        )
    except UserError as error:
        return str(error)


def gate_on(x: Tensor, config: TrainConfig) -> dict[str, float]:
    """``explained`` and ``share`` of ``NoiseLevels`` for normalised ``x [n, ...]``: the gate of training, or would be.

    Raises:
        UserError: a single sample, or all the same.
    """
    asked = config.objective.gate if isinstance(config.objective.gate, AboveExplained) else AboveExplained()
    gate = with_measured_gate(replace(config.objective, coupler=exact, gate=asked), x).gate
    assert isinstance(gate, Above)
    return {"explained": gate.sigma, "share": asked.share}


def network_of(config: TrainConfig, run: RunFolder, shape: Sequence[int], device: torch.device) -> nn.Module:
    """The network of the newest checkpoint, with the weights being trained: those the loss sees, not their average.

    Raises:
        UserError: no checkpoint, or one that does not fit.
    """
    found = run.latest_checkpoint()
    if found is None:
        raise UserError(f"no checkpoint in {run.root}: train it first")
    classes = number_of(kept_classes(config, run))
    network = build_network(config, cast(tuple[int, int, int], tuple(shape)), classes)
    try:
        network.load_state_dict(
            {name.removeprefix("network/"): t for name, t in found[1].items() if name.startswith("network/")}
        )
    except RuntimeError as error:
        raise UserError(f"the checkpoint in {run.root} does not fit its config.json: {error}") from error
    return network.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Trained:
    """A network and the data it was trained on."""

    config: TrainConfig
    network: nn.Module
    data: Tensor
    """``[n, ch, h, w]`` normalised."""
    origin: str
    device: torch.device
    labels: Tensor | None = None
    """``[n]``, for couplers that need them and networks that are told."""
    skip: Skip | None = None
    """See ``TrainConfig.preconditioned``."""

    def residuals(self, num_levels: int, count: int) -> Residuals:
        """About ``count`` temporal differences at N = ``num_levels``.

        Levels, noise and coupling come from the objective, its curriculum held at ``num_levels``; objectives without
        a level grid (``RatioLevels``) are looked at on the default one.

        Raises:
            UserError: a single sample, or all the same, and a gate that asks the data; none is finite; or it is no
                consistency function.
        """
        if not isinstance(self.config.objective, Objective):
            raise UserError(
                f"those of a {type(self.config.objective).__name__} are not: they are of consistency functions"
            )
        objective = replace(self.config.objective, coupler=self.config.coupler)
        objective = with_measured_parts(objective, self.data, self.labels)
        f = self.config.preconditioned(self.network, self.skip)
        grid = objective.levels if isinstance(objective.levels, LevelGrid) else LevelGrid()
        grid = replace(grid, curriculum=FixedCurriculum(num_levels=num_levels))
        objective, data = replace(objective, levels=grid), self.data
        batch_size = min(128, len(data))
        count = max(20, min(count, MAX_ELEMENTS // data[0].numel()))
        steps = tqdm(range(-(-count // batch_size)), desc="temporal differences", unit="batch", leave=False, delay=2)
        tds, levels, weights = [], [], []
        for step in steps:
            chosen = batch_indices(SEED, step, len(data), batch_size)
            labels = None if self.labels is None else self.labels[chosen]
            draws = draw(SEED, step, (batch_size, *data.shape[1:]))
            told = {} if self.config.classes is None else {"labels": labels}
            batch = objective.prepare(data[chosen], draws, 0, 1, labels=labels, conditions=told).to(self.device)
            x, z, pairs, conditions = batch[:4]
            with torch.no_grad():
                student, teacher = temporal_difference(
                    f, x, z, pairs.t_hi, pairs.t_lo, x_lo=batch.x_lo, conditions=conditions
                )
            tds.append((student - teacher).cpu())
            levels.append((batch.pairs.depth * num_levels).round().long().cpu())
            weights.append(objective.weight(batch.pairs.t_hi, batch.pairs.t_lo).cpu())
        td, level, weight = (torch.cat(parts)[:count] for parts in (tds, levels, weights))
        if not td.flatten(1).isfinite().all(1).any():
            raise UserError(f"at N = {num_levels} none is finite: the network of {self.origin} has diverged")
        sigmas = grid.noise.levels(num_levels)
        return Residuals(td, level, weight, num_levels, sigmas, f"{self.origin}, at N = {num_levels}")


def trained_of(model: TrainedModel, run: RunFolder, images: ImageSet) -> Trained:
    """``model``, which ``run`` loads as, on the training images of ``images``.

    Raises:
        UserError: no checkpoint, or images it was not made for.
    """
    shape = " x ".join(map(str, images.pixels.shape[1:]))
    refusal = f"{images.name} has images of {shape}, for which the run in {run.root} was not made: give other --data"
    try:
        data = model.latents_of(images.train)
    except RuntimeError as error:
        raise UserError(refusal) from error
    if data.shape[1:] != model.shape:
        raise UserError(refusal)
    origin = f"run {run.root.resolve().name} ({model.step} steps)"
    network = network_of(model.config, run, model.shape, model.device)
    return Trained(model.config, network, data, origin, model.device, images.train_labels, model.skip)


def run_space(
    run: RunFolder,
    images: ImageSet,
    *,
    whole: ImageSet | None,
    num_levels: int | None,
    count: int,
    device: torch.device,
) -> Space:
    """The images in the space of a trained run, and its temporal differences, by default at the N it has reached.

    Args:
        whole: all of the run's own images as they are now, which ``images`` are or come from; None: they are others. If
            they are all, the run's own noise level of the second evaluation is right.
    Raises:
        UserError: no run, no checkpoint, images it was not made for, or its own, which have changed since.
    """
    model = load_model(run, device, whole)
    own = whole is images
    return space_of_run(model, trained_of(model, run, images), own=own, num_levels=num_levels, count=count)


def space_of_run(
    model: TrainedModel,
    trained: Trained,
    *,
    own: bool,
    num_levels: int | None,
    count: int,
    notes: Sequence[str] = (),
) -> Space:
    """The data of ``trained`` in the space of ``model``, which it is; see ``run_space``."""
    config = model.config
    name = "pixels" if isinstance(config.autoencoder, PixelSpace) else "latents"
    notes = [*notes, *([] if config.clip is None else [f"data values are as the run sees them, behind {config.clip}"])]
    found: Residuals | None = None
    try:
        found = trained.residuals(num_levels or last_stage(config), count)
        if len(trained.data) < FEW:
            notes.append(f"images behind the temporal differences: only {len(trained.data)}")
    except UserError as error:
        notes.append(f"no temporal differences: {error}")
    # The data are normalised already, whatever the run's statistics: as they are, std 0.5 or not.
    measured = replace(config, outliers=None, clip=None, statistics=GivenStatistics())
    levels = noise_levels(measured, model.space.codec, trained.data)
    if own and isinstance(levels, NoiseLevels):
        levels = replace(levels, recognised=model.space.recognised_at)
    return Space(name, trained.data, found, tuple(notes), levels)


def last_stage(config: TrainConfig) -> int:
    """N at the end of training."""
    return config.objective.levels(config.steps - 1, config.steps, torch.zeros(1)).num_levels
