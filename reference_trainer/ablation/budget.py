"""A budget of training time as steps: how long a step of each arm takes, measured side by side."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.gaussian_skip import Scalar, skip_for
from reference_trainer.data.latents import Latents
from reference_trainer.files import as_json, write_atomically
from reference_trainer.options import to_json
from reference_trainer.training.batches import Batches
from reference_trainer.training.state import TrainState


def steps_within(
    seconds: float,
    arms: Sequence[tuple[str, TrainConfig]],
    latents: Tensor | Latents,
    labels: Tensor | None,
    file: Path,
    device: torch.device,
) -> dict[str, int]:
    """How many steps each arm makes in ``seconds``, timed on ``latents [n, ch, h, w]`` and their ``labels [n]``.

    The times go to ``file`` and are read from there the next time, so that a continued ablation is the same.
    """
    timed: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    keys = {name: f"{name}, {_digest(config, latents.shape, device)}" for name, config in arms}
    if missing := [(name, config) for name, config in arms if keys[name] not in timed]:
        found = seconds_per_step(missing, latents, labels, device)
        timed |= {keys[name]: spent for name, spent in found.items()}
        write_atomically(file, (as_json(timed, indent=1) + "\n").encode())
    return {name: max(1, round(seconds / timed[keys[name]])) for name, _ in arms}


def _digest(config: TrainConfig, shape: Sequence[int], device: torch.device) -> str:
    """Of what a time is of: the same arm of another network, size or device is timed anew."""
    said = as_json([to_json(replace(config, seed=0)), list(shape), device.type])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def seconds_per_step(
    arms: Sequence[tuple[str, TrainConfig]],
    latents: Tensor | Latents,
    labels: Tensor | None,
    device: torch.device,
    turns: int = 32,
) -> dict[str, float]:
    """The mean time of a training step of each arm, data as in ``steps_within``: one step an arm in turn.

    The first turns are not counted; 32 are enough for pools of up to 32 batches to be paired once.

    On a CPU processor time: a run couples the next batch in the background, where beside other runs no core is idle.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steppers = {name: _steps(config, latents, labels, device) for name, config in arms}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in tqdm(range(turns + 4), desc="timing the arms", unit="turn"):
        for name, stepper in steppers.items():
            started = clock()
            next(stepper)
            if turn >= 4:
                times[name].append(clock() - started)
    return {name: statistics.fmean(seconds) for name, seconds in times.items()}


def _steps(
    config: TrainConfig, latents: Tensor | Latents, labels: Tensor | None, device: torch.device
) -> Iterator[None]:
    """Training steps from the middle of the schedule on: later ones have more noise levels and take longer."""
    classes = 0 if config.classes is None or labels is None else int(labels.max()) + 1
    batches = Batches(config, latents, labels, classes)
    state = TrainState.create(config, batches.latents.shape, device, classes)
    passes = config.computing.on(device, state.network)
    asked = config.preconditioning
    skip = None if isinstance(asked, Scalar) else skip_for(asked, latents, config.objective.noise).to(device)
    f = config.preconditioned(passes.of(state.network.train()), skip)
    for step in count(config.steps // 2):
        for part in batches.parts:
            terms = config.objective(f, batches(step, part).to(device), state.c)
            passes.backward(terms.loss / config.micro_batches)
        state.optimizer_step(config.optimizer, 1e-4)
        state.update_ema(config.ema_decay)
        state.c = terms.state
        if device.type == "cuda":
            torch.cuda.synchronize()
        else:
            batches.wait()  # or it would be counted to the next arm
        yield
