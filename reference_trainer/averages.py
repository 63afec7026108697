"""The averages of the weights that a run has: those it keeps, and power functions made of its snapshots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.errors import UserError
from reference_trainer.files import check_layout, load_tensors
from reference_trainer.options import literal, override
from reference_trainer.run import RunFolder
from robustcm.averages import Average, Exponential, PowerFunction, Profile, reconstruct

Tensors = Mapping[str, Tensor]
MOST_SNAPSHOTS = 1000


class Averaged(NamedTuple):
    """Averaged weights, and what they are in words."""

    weights: dict[str, Tensor]
    """As the network's state_dict."""
    about: str


def prefix(average: Average) -> str:
    """What the names of its tensors begin with, in a checkpoint and in a snapshot."""
    return f"averages/{literal(average)}/"


def read_average(text: str) -> Average:
    """One average as typed, ``PowerFunction(sigma_rel=0.1)``.

    Raises:
        UserError: none, more than one, or one that is refused.
    """
    found = override(TrainConfig(), f"averages={text}").averages
    if len(found) != 1:
        raise UserError(f"--average takes one average, as in PowerFunction(sigma_rel=0.1); got {text!r}")
    return found[0]


def in_file_name(average: Average) -> str:
    """``PowerFunction-sigma_rel-0.1``."""
    return re.sub(r"[^\w.-]+", "-", literal(average)).strip("-")


def check_snapshots(config: TrainConfig) -> None:
    """See that a run writes no more snapshots than anybody wants on the disk.

    Raises:
        UserError: says how far apart they must be.
    """
    number = config.steps // config.snapshot_every
    if config.power_functions and number > MOST_SNAPSHOTS:
        raise UserError(
            f"{config.steps} steps with snapshot_every={config.snapshot_every} make {number} snapshots, more than "
            f"{MOST_SNAPSHOTS}: give snapshot_every={-(-config.steps // MOST_SNAPSHOTS)} or more"
        )


def check_average(config: TrainConfig, average: Average | None) -> None:
    """See that a run of ``config`` has ``average``, or what it is reconstructed of.

    Raises:
        UserError: it has not; says which there are.
    """
    if average is None or average in averages_of(config):
        return
    if isinstance(average, PowerFunction) and config.power_functions:
        return
    there = ", ".join(map(literal, averages_of(config)))
    more = (
        "any PowerFunction(...)" if config.power_functions else "any other must be in averages=... when it is trained"
    )
    raise UserError(f"this run has no {literal(average)}; it has {there}; {more}")


def averages_of(config: TrainConfig) -> tuple[Average, ...]:
    """What a run keeps: the weights themselves, the average that samples, and its further ones."""
    own = (Exponential(decay=0.0), Exponential(decay=config.ema_decay), *config.averages)
    return tuple(dict.fromkeys(own))


def averaged_weights(
    run: RunFolder, config: TrainConfig, step: int, checkpoint: Tensors, average: Average | None
) -> Averaged:
    """``average`` of the weights as it stood behind ``step`` steps, None: the one that samples.

    Exponential(decay=0) are the weights themselves. A power function that was not kept is reconstructed of those that
    were: of every snapshot before ``step`` and of the ``checkpoint``, added up in float64. That takes twice the memory
    of the weights and of one snapshot, and reads all of them.

    Raises:
        UserError: see ``check_average``; or a snapshot is of another network.
    """
    check_average(config, average)
    ema = _below("ema/", checkpoint)
    if average in (None, Exponential(decay=config.ema_decay)):
        return Averaged(ema, literal(Exponential(decay=config.ema_decay)))
    if average == Exponential(decay=0.0):
        return Averaged(_below("network/", checkpoint), "no average")
    assert average is not None
    if average in config.averages:
        return Averaged(ema | _below(prefix(average), checkpoint), literal(average))
    assert isinstance(average, PowerFunction)
    return _reconstructed(run, config, step, checkpoint, average)


def _reconstructed(
    run: RunFolder, config: TrainConfig, step: int, checkpoint: Tensors, average: PowerFunction
) -> Averaged:
    kinds = {prefix(kept): kept for kept in config.power_functions}
    like = {name: tensor for name, tensor in checkpoint.items() if name.startswith(tuple(kinds))}
    files = {at: file for at, file in run.snapshots().items() if at < step}
    stored = [(at, name, Profile(at, kind.gamma)) for at in (*files, step) for name, kind in kinds.items()]
    shares, error = reconstruct([profile for *_, profile in stored], Profile(step, average.gamma))
    ema = _below("ema/", checkpoint)
    sums = {name: torch.zeros_like(ema[name], dtype=torch.float64) for name in _below(min(kinds), checkpoint)}
    tensors, read = like, step
    bar = tqdm(stored, desc=f"reconstructing {literal(average)}", unit="average", leave=False, delay=2)
    for (at, kind, _), share in zip(bar, shares.tolist(), strict=True):
        if at != read:
            tensors, read = (_snapshot(files[at], like) if at in files else like), at
        for name, total in sums.items():
            total.add_(tensors[kind + name], alpha=share)
    about = f"{literal(average)}, of {len(stored)} stored averages, its profile to {error:.2%}"
    return Averaged(ema | {name: total.to(ema[name].dtype) for name, total in sums.items()}, about)


def _snapshot(file: Path, like: Tensors) -> dict[str, Tensor]:
    try:
        tensors, _ = load_tensors(file)
        check_layout(tensors, like)
    except UserError as error:
        raise UserError(f"the snapshot {file} is no use ({error}): move it away to reconstruct without it") from error
    return tensors


def _below(start: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
