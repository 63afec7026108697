"""Collects what the figures show: pixels, latents, and the temporal differences of a run or of a brief baseline.

Axes: n = samples, ch, h, w; data are normalised per channel to mean 0, std 0.5 over the images looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.autoencoders import Autoencoder, Codec, PixelSpace, PretrainedAutoencoder
from reference_trainer.data.images import Digits, ImageFolder, ImageSet
from reference_trainer.data.latents import SIGMA_DATA, encode_once
from reference_trainer.errors import UserError
from reference_trainer.model import build_network, load_model
from reference_trainer.networks import DiT
from reference_trainer.options import override, to_json
from reference_trainer.presets import ilct
from reference_trainer.run import RunFolder
from reference_trainer.training.batches import batch_indices, with_measured_gate
from reference_trainer.training.loop import train
from robustcm.consistency import temporal_difference
from robustcm.losses import sample_r2
from robustcm.objective import Objective, draw
from robustcm.schedules import FixedCurriculum, LevelGrid

MAX_ELEMENTS = 2**26  # of temporal differences held at once: 256 MB
BASELINE = "brief iLCT baseline"
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
class Space:
    """One column of the figure: the data in one space, and the temporal differences there."""

    name: str
    data: Tensor
    """``[n, ch, h, w]`` normalised; NaN where the autoencoder gave NaN."""
    residuals: Residuals | None
    note: str = ""


class GivenAutoencoder:
    """An autoencoder that exists already, in the place of a configuration that would be fitted."""

    def __init__(self, name: str, codec: Codec) -> None:
        self.name, self.codec = name, codec

    def __repr__(self) -> str:  # goes into config.json
        return f"GivenAutoencoder({self.name!r})"

    def fit(self, images: ImageSet, device: torch.device, cache: Path) -> Codec:
        return self.codec


def load_images(data: Digits | ImageFolder, limit: int) -> ImageSet:
    """The training images of ``data``, at most ``limit`` of them (a fixed random choice, in order).

    Raises:
        UserError: no image set there, or images that are all one colour.
    """
    images = data.load()
    chosen = torch.nonzero(~images.is_held_out).squeeze(1)
    if len(chosen) > limit:
        keep = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        chosen = chosen[keep]
        labels = None if images.labels is None else images.labels[chosen]
        images = ImageSet(images.name, images.pixels[chosen], labels, torch.zeros(limit, dtype=torch.bool))
    if len(images.train.unique()) == 1:
        raise UserError(f"all pixels of {images.name} have one value: constant data have no tails to look at")
    return images


def autoencoder_of(text: str, device: torch.device) -> Autoencoder:
    """What ``--autoencoder`` names: a part such as ``KLAutoencoder``, a run folder, or ``module:function``.

    Raises:
        UserError: none of the three.
    """
    codec: Codec | None = None
    if Path(text).is_dir():
        codec = load_model(RunFolder(Path(text)), device).space.codec
    elif ":" in text and "(" not in text:
        codec = PretrainedAutoencoder(load=text).build(3, {}).to(device)
    if codec is not None:
        return cast(Any, GivenAutoencoder(text, codec))  # in all that is used here it is as good as a part
    try:
        return override(TrainConfig(), f"autoencoder={text}").autoencoder
    except UserError as error:
        raise UserError(f"--autoencoder {text}: no run folder of this name, no module:function; {error}") from error


def normalised(raw: Tensor) -> tuple[Tensor, int]:
    """``raw [n, ch, h, w]`` at mean 0, std 0.5 per channel over its finite values, and how many were not finite.

    Raises:
        UserError: a channel that is constant or has no finite value.
    """
    finite = raw.isfinite()
    values = torch.where(finite, raw, torch.nan).double()
    mean = values.nanmean((0, 2, 3), keepdim=True)
    std = ((values - mean) ** 2).nanmean((0, 2, 3), keepdim=True).sqrt()
    if not (std > 0).all():
        channel = int(torch.nonzero(~(std.flatten() > 0))[0])
        raise UserError(f"channel {channel} of the data is constant or has no finite value: nothing to measure")
    return ((values - mean) * (SIGMA_DATA / std)).float(), int((~finite).sum())


def data_in(part: Autoencoder, images: ImageSet, cache: Path, device: torch.device) -> Tensor:
    """Raw values ``[n, ch, h, w]`` of the training images in the space of ``part`` (fitted or from the cache)."""
    return encode_once(part.fit(images, device, cache), images, device, cache)


def baseline_config(
    data: Digits | ImageFolder, part: Autoencoder, shape: Sequence[int], num_levels: int, steps: int
) -> TrainConfig:
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


def baseline_run(config: TrainConfig, images: ImageSet, cache: Path, device: torch.device) -> RunFolder:
    """The run folder of ``config`` on ``images`` below ``cache``, trained to the end; resumed or reused if it is there.

    Raises:
        UserError: fewer than 20 images, or what training raises.
        KeyboardInterrupt: after saving.
    """
    if len(images.train) < 20:
        raise UserError(f"{len(images.train)} images are too few to train a baseline on: need 20, or use --steps 0")
    config = replace(config, batch_size=min(config.batch_size, len(images.train)))
    key = json.dumps(to_json(config), sort_keys=True) + images.fingerprint()
    run = RunFolder(cache / "analysis" / f"ilct-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
    with run.locked():
        run.claim(config)
        files = run.checkpoints()
        if (not files or int(files[0].stem.removeprefix("step_")) < config.steps) and not train(
            config, run, images, cache, device
        ):
            raise KeyboardInterrupt
    return run


def network_of(config: TrainConfig, run: RunFolder, shape: Sequence[int], device: torch.device) -> nn.Module:
    """The network of the newest checkpoint, with the weights being trained: those the loss sees, not their average.

    Raises:
        UserError: no checkpoint, or one that does not fit.
    """
    found = run.latest_checkpoint()
    if found is None:
        raise UserError(f"no checkpoint in {run.root}: train it first")
    network = build_network(config, cast(tuple[int, int, int], tuple(shape)))
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

    def residuals(self, num_levels: int, count: int) -> Residuals:
        """About ``count`` temporal differences at N = ``num_levels``.

        Levels, noise and coupling come from the objective, its curriculum held at ``num_levels``; objectives without
        a level grid (``RatioLevels``) are looked at on the default one.
        """
        objective = with_measured_gate(self.config.objective, self.data)
        f = self.config.preconditioned(self.network)
        grid = objective.levels if isinstance(objective.levels, LevelGrid) else LevelGrid()
        grid = replace(grid, curriculum=FixedCurriculum(num_levels=num_levels))
        objective, data = replace(objective, levels=grid), self.data
        batch_size = min(128, len(data))
        count = max(20, min(count, MAX_ELEMENTS // data[0].numel()))
        steps = tqdm(range(-(-count // batch_size)), desc="temporal differences", unit="batch", leave=False, delay=2)
        tds, levels, weights = [], [], []
        for step in steps:
            x = data[batch_indices(SEED, step, len(data), batch_size)]
            batch = objective.prepare(x, draw(SEED, step, x.shape), 0, 1).to(self.device)
            with torch.no_grad():
                student, teacher = temporal_difference(f, batch.x, batch.z, batch.pairs.t_hi, batch.pairs.t_lo)
            tds.append((student - teacher).cpu())
            levels.append((batch.pairs.depth * num_levels).round().long().cpu())
            weights.append(objective.weight(batch.pairs.t_hi, batch.pairs.t_lo).cpu())
        td, level, weight = (torch.cat(parts)[:count] for parts in (tds, levels, weights))
        sigmas = grid.noise.levels(num_levels)
        return Residuals(td, level, weight, num_levels, sigmas, f"{self.origin}, at N = {num_levels}")


def trained_run(run: RunFolder, images: ImageSet, device: torch.device, name: str | None = None) -> Trained:
    """A trained run on the training images of ``images``.

    Raises:
        UserError: no run, or no checkpoint.
    """
    model = load_model(run, device)
    if not isinstance(model.config.objective, Objective):
        method = type(model.config.objective).__name__
        raise UserError(f"{run.root} is a run of a {method}: temporal differences are of consistency functions")
    data = model.latents_of(images.train)
    origin = f"{name or 'run ' + run.root.resolve().name} ({model.step} steps)"
    return Trained(model.config, network_of(model.config, run, model.shape, device), data, origin, device)


def baseline_space(
    name: str,
    part: Autoencoder,
    data: Digits | ImageFolder,
    images: ImageSet,
    *,
    num_levels: int,
    steps: int,
    count: int,
    cache: Path,
    device: torch.device,
) -> Space:
    """The images in the space of ``part``, and the temporal differences of a baseline trained there for ``steps``.

    No baseline with ``steps = 0``, nor where the autoencoder gives NaN: the note says so.
    """
    x, not_finite = normalised(data_in(part, images, cache, device))
    if not_finite:
        return Space(name, x, None, f"{not_finite} of {x.numel()} values are not finite, so no baseline was trained")
    if steps == 0:
        return Space(name, x, None)
    config = baseline_config(data, part, x.shape[1:], num_levels, steps)
    network = network_of(config, baseline_run(config, images, cache, device), x.shape[1:], device)
    trained = Trained(config, network, x, f"{BASELINE} ({steps} steps)", device)
    return Space(name, x, trained.residuals(num_levels, count))


def run_space(run: RunFolder, images: ImageSet, *, num_levels: int | None, count: int, device: torch.device) -> Space:
    """The images in the space of a trained run, and its temporal differences, by default at the N it has reached.

    Raises:
        UserError: no run, or no checkpoint.
    """
    trained = trained_run(run, images, device)
    name = "pixels" if isinstance(trained.config.autoencoder, PixelSpace) else "latents"
    clip = trained.config.clip
    note = "" if clip is None else f"as the run sees them, behind {clip}"
    return Space(name, trained.data, trained.residuals(num_levels or last_stage(trained.config), count), note)


def last_stage(config: TrainConfig) -> int:
    """N at the end of training."""
    return config.objective.levels(config.steps - 1, config.steps, torch.zeros(1)).num_levels
