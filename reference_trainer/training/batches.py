"""What a step trains on: which samples, their noise, and the pool in which both are paired; functions of the step."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.latents import InMemory, Latents, some_of
from reference_trainer.errors import UserError
from robustcm.couplers import WithinClasses, independent
from robustcm.gates import AboveExplained
from robustcm.objective import Batch, FewStepObjective, draw
from robustcm.randomness import Stream, counter_generator, normal, step_generator
from robustcm.semidiscrete import Pairing, Semidiscrete

AnyObjective = TypeVar("AnyObjective", bound=FewStepObjective)


class Batches:
    """``batches(step)`` is the batch of that step: a function of (config, latents, labels, step), whatever was asked
    before.
    """

    def __init__(self, config: TrainConfig, latents: Tensor | Latents, labels: Tensor | None = None) -> None:
        """``latents [n, ch, h, w]``, normalised, and their classes ``[n]`` int64, if there are any (CPU).

        Raises:
            UserError: fewer latents than a batch needs, or a coupler that needs labels where there are none.
        """
        check_labels(config, labels)
        check_batch_size(config, len(latents))
        latents = InMemory(latents) if isinstance(latents, Tensor) else latents
        self.config, self.latents, self.labels = config, latents, labels
        self.objective = with_measured_gate(config.objective, latents)
        self.pairing = pairing_of(config.objective, latents)
        self._solver = ThreadPoolExecutor(1)
        self._pools: dict[int, Future[tuple[Tensor, ...]]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, on the CPU."""
        if self.pairing is None:
            x, coupled = self._x(step), self._coupled(step)
        else:  # the noise is drawn, the data follow it
            numbers = counter_generator(self.config.seed, step, Stream.COUPLING)
            coupled = normal(numbers, (self.config.batch_size, *self.latents.shape))
            x = self.latents.take(self.pairing(coupled))
        draws = draw(self.config.seed, step, x.shape)
        return self.objective.prepare(x, draws, step, self.config.steps, coupled=coupled)

    def wait(self) -> None:
        """Until the next pool is paired, which otherwise happens in the background."""
        for pool in self._pools.values():
            pool.result()

    def dropout_seed(self, step: int) -> int:
        """For torch's own generators, which dropout draws from."""
        return int(counter_generator(self.config.seed, step, Stream.DROPOUT).integers(2**62))

    def _indices(self, step: int) -> Tensor:
        return batch_indices(self.config.seed, step, len(self.latents), self.config.batch_size)

    def _x(self, step: int) -> Tensor:
        return self.latents.take(self._indices(step))

    def _coupled(self, step: int) -> Tensor | None:
        """This step's part of the noise paired in the pool of ``coupling_pool`` steps it belongs to."""
        if self.config.objective.coupler is independent:
            return None
        pool, part = divmod(step, self.config.coupling_pool)
        # The next pool is paired while this one is trained on: the solvers work outside Python's lock.
        self._pools = {n: self._pools.get(n) or self._solver.submit(self._paired, n) for n in (pool, pool + 1)}
        return self._pools[pool].result()[part]

    def _paired(self, pool: int) -> tuple[Tensor, ...]:
        """The noise of each step of the pool, paired with the samples of its steps."""
        config, size = self.config, self.config.coupling_pool
        steps = range(pool * size, (pool + 1) * size)
        x = torch.cat([self._x(s) for s in steps])
        z = torch.cat([draw(config.seed, s, (config.batch_size, *x.shape[1:])).z for s in steps])
        labels = None if self.labels is None else self.labels[torch.cat([self._indices(s) for s in steps])]
        seed = counter_generator(config.seed, pool, Stream.COUPLING).integers(2**63)
        generator = torch.Generator().manual_seed(int(seed))
        perm = config.objective.coupler(x, z, labels=labels, generator=generator)
        return z[perm].split(config.batch_size)


def check_labels(config: TrainConfig, labels: Tensor | None) -> None:
    """Refuse a coupler that asks for classes where the data have none.

    Raises:
        UserError: just that.
    """
    if labels is None and isinstance(config.objective.coupler, WithinClasses):
        raise UserError(
            "objective.coupler=WithinClasses pairs noise within classes, and the images of "
            f"{type(config.data).__name__} have no labels: take exact, Entropic or independent"
        )


def check_batch_size(config: TrainConfig, num_samples: int) -> None:
    """Refuse batches larger than the data.

    Raises:
        UserError: just that.
    """
    if config.batch_size > num_samples:
        raise UserError(f"batch_size={config.batch_size} is larger than the {num_samples} training images")


def pairing_of(objective: FewStepObjective, latents: Latents) -> Pairing | None:
    """The pairing of noise with ``latents [n, ch, h, w]``, fitted with a progress bar, if the coupler is one that has.

    Raises:
        UserError: a single image, or more than are kept in memory.
    """
    if not isinstance(objective.coupler, Semidiscrete):
        return None
    if not isinstance(latents, InMemory):
        raise UserError(
            "objective.coupler=Semidiscrete holds all latents in memory, and those of LatentStore are read as they are "
            "needed: take exact, Entropic or independent"
        )
    started = time.monotonic()
    with tqdm(total=objective.coupler.steps, desc="pairing noise with all images", unit="step", delay=1) as bar:
        try:
            pairing = objective.coupler.fit(
                latents.values, step_generator(0, 0, Stream.COUPLING), lambda _: bar.update()
            )
        except ValueError as error:
            raise UserError(f"objective.coupler={objective.coupler}: {error}") from error
    tqdm.write(
        f"noise paired with {len(latents)} images in {time.monotonic() - started:.0f} s; chi^2 of the shares that the "
        f"images get: {pairing.marginal_error:.3f} (0: each the same)"
    )
    return pairing


def with_measured_gate(objective: AnyObjective, latents: Tensor | Latents) -> AnyObjective:
    """``objective`` with its gate put where ``latents [n, ch, h, w]`` say, if it is one that asks them.

    Raises:
        UserError: a single image, or all the same.
    """
    if objective.coupler is independent or not isinstance(objective.gate, AboveExplained):
        return objective
    try:
        return replace(objective, gate=objective.gate.on(some_of(latents)))
    except ValueError as error:
        raise UserError(f"objective.gate={objective.gate}: {error}") from error


def batch_indices(seed: int, step: int, num_samples: int, batch_size: int) -> Tensor:
    """Which samples make the batch of ``step``: ``[batch_size]`` int64, every sample once an epoch.

    A function of its arguments alone, so a resumed run continues the epoch where it was.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // num_samples
    orders = torch.stack(
        [_epoch_order(seed, epoch, num_samples) for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)]
    )
    return orders[epochs - epochs[0], position % num_samples]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    return torch.randperm(num_samples, generator=step_generator(seed, epoch, Stream.ORDER))
