"""What a step trains on: which samples, their noise, and the pool in which both are paired; functions of the step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from reference_trainer.config import TrainConfig
from reference_trainer.data.latents import InMemory, Latents, some_of
from reference_trainer.data.statistics import SLOW
from reference_trainer.errors import UserError
from robustcm.couplers import WithinClasses, independent
from robustcm.gates import AboveExplained
from robustcm.guidance import hidden
from robustcm.objective import Batch, FewStepObjective, Objective, draw
from robustcm.randomness import Stream, counter_generator, normal, step_generator
from robustcm.semidiscrete import Pairing, Semidiscrete
from robustcm.teacher_input import KeepCovariance
from robustcm.trajectories import TrajectoryObjective

AnyObjective = TypeVar("AnyObjective", bound=FewStepObjective)


HAVE_A_TEACHER = (Objective, TrajectoryObjective)
"""Objectives that can show it something else than the data at the lower level; flow maps have none."""
PAIRS_MEASURED = 4096
"""Samples with their noise, from which ``KeepCovariance`` learns how the two go together: to 1.6 % of a deviation."""
MOST_MEASURED = 50_000_000
"""Numbers in these samples, 200 MB, and as many in their noise: of more than 12207 elements fewer samples are taken."""
MOST_PAIRED = 2**26
"""Numbers of a store that a ``Semidiscrete`` pairing takes into memory: 268 MB. Its fit takes time of order n^2 d."""


class Batches:
    """``batches(step, part)`` is a micro-batch of that step: a function of (config, latents, labels, step, part),
    whatever was asked before.

    A step is ``config.micro_batches`` parts of its rows, each with random numbers and a pool of its own, so that a rank
    which trains on some parts reads, draws and pairs those alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        latents: Tensor | Latents,
        labels: Tensor | None = None,
        classes: int = 0,
        parts: Sequence[int] | None = None,
    ) -> None:
        """``latents [n, ch, h, w]``, normalised, and their classes ``[n]`` int64, if there are any (CPU).

        Args:
            classes: how many there are, where the network is told of them.
            parts: the micro-batches that will be asked for, prepared ahead in the background; None: all of a step.

        Raises:
            UserError: fewer latents than a batch needs, or a coupler that needs labels where there are none.
        """
        check_labels(config, labels)
        check_batch_size(config, len(latents))
        latents = InMemory(latents) if isinstance(latents, Tensor) else latents
        self.config, self.latents, self.labels, self.classes = config, latents, labels, classes
        self.parts = range(config.micro_batches) if parts is None else parts
        self.rows = config.batch_size // config.micro_batches
        self.objective = with_measured_gate(config.objective, latents)
        self.pairing = pairing_of(config.objective, latents)
        self._solver, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pools: dict[tuple[int, int], Future[tuple[Tensor, ...]]] = {}
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self.objective = self._with_measured_teacher(self.objective)

    def __call__(self, step: int, part: int = 0) -> Batch:
        """Micro-batch ``part`` of ``step``, on the CPU; the next is made meanwhile."""
        asked, after = (step, part), self._after(step, part)
        ahead = {which: self._ahead.get(which) or self._reader.submit(self._made, *which) for which in (asked, after)}
        self._ahead = ahead
        return ahead[asked].result()

    def again(self, step: int, part: int) -> tuple[Tensor, Batch]:
        """A micro-batch of any rank, to be looked at: which latents make it, ``[b]`` int64, and itself."""
        return self._reader.submit(lambda: (self._indices(step, part), self._made(step, part))).result()

    def wait(self) -> None:
        """Until what is made in the background is there."""
        for pool in self._pools.values():
            pool.result()
        for batch in self._ahead.values():
            batch.result()

    def close(self) -> None:
        """What was to be made in the background is not made any more."""
        for background in (self._reader, self._solver):
            background.shutdown(wait=False, cancel_futures=True)

    def dropout_seed(self, step: int, part: int = 0) -> int:
        """For torch's own generators, which dropout draws from."""
        return self._seed(step, Stream.DROPOUT, part)

    def _after(self, step: int, part: int) -> tuple[int, int]:
        """What will be asked for next."""
        place = self.parts.index(part) + 1
        return (step, self.parts[place]) if place < len(self.parts) else (step + 1, self.parts[0])

    def _made(self, step: int, part: int) -> Batch:
        indices, coupled = self._indices(step, part), self._coupled(step, part)
        x = self.latents.take(indices)
        draws = draw(self.config.seed, step, x.shape, part)
        told = self._told(step, part, indices)
        return self.objective.prepare(x, draws, step, self.config.steps, coupled=coupled, conditions=told)

    def _told(self, step: int, part: int, indices: Tensor) -> dict[str, Tensor]:
        """What the network is told of the samples ``indices [b]``: with classes their labels, some of them hidden.

        Behind the coupling, which knows all labels: so noise is standard within each class and without one.
        """
        if self.config.classes is None:
            return {}
        assert self.labels is not None
        generator, share = self._generator(step, Stream.LABELS, part), self.config.classes.dropout
        return {"labels": hidden(self.labels[indices], share, self.classes, generator)}

    def _generator(self, step: int, stream: Stream, part: int) -> torch.Generator:
        """torch's, for what draws from one."""
        return torch.Generator().manual_seed(self._seed(step, stream, part))

    def _seed(self, step: int, stream: Stream, part: int) -> int:
        return int(counter_generator(self.config.seed, step, stream, part).integers(2**62))

    def _noise_to_pair(self, step: int, part: int) -> Tensor:
        """Which the data follow, where there is a pairing."""
        numbers = counter_generator(self.config.seed, step, Stream.COUPLING, part)
        return normal(numbers, (self.rows, *self.latents.shape))

    def _indices(self, step: int, part: int) -> Tensor:
        if self.pairing is not None:
            return self.pairing(self._noise_to_pair(step, part))
        indices = batch_indices(self.config.seed, step, len(self.latents), self.config.batch_size)
        return indices[part * self.rows : (part + 1) * self.rows]

    def _coupled(self, step: int, part: int) -> Tensor | None:
        """This part of the noise paired in the pool of ``coupling_pool`` steps it belongs to."""
        if self.pairing is not None:
            return self._noise_to_pair(step, part)
        if self.config.coupler is independent:
            return None
        pool, place = divmod(step, self.config.coupling_pool)
        wanted = [(pool, part), (pool + 1, part)]
        kept = [key for key in self._pools if key[0] in (pool, pool + 1) and key not in wanted]
        # The next pool is paired while this one is trained on: the solvers work outside Python's lock.
        self._pools = {key: self._pools.get(key) or self._solver.submit(self._paired, *key) for key in (*kept, *wanted)}
        return self._pools[pool, part].result()[place]

    def _with_measured_teacher(self, objective: AnyObjective) -> AnyObjective:
        """``objective``, with what its teacher is shown measured on the latents and on the first noise they get.

        The same on every rank: measured on parts 0, whichever it trains on.
        """
        if not asks_what_the_teacher_sees(objective) or objective.coupler is independent:
            return with_measured_teacher(objective, self.latents, None)
        pools = math.ceil(pairs_measured(self.latents.shape) / (self.rows * self.config.coupling_pool))
        bar = tqdm(range(pools), desc="how noise goes with the data", unit="pool", leave=False, delay=2)
        data, noise = zip(*(self._pairs_of(pool) for pool in bar), strict=True)
        return with_measured_teacher(objective, self.latents, (torch.cat(data), torch.cat(noise)))

    def _pairs_of(self, pool: int) -> tuple[Tensor, Tensor]:
        """Samples of a pool, part 0, and their noise."""
        steps = range(pool * self.config.coupling_pool, (pool + 1) * self.config.coupling_pool)
        x = self.latents.take(torch.cat([self._indices(step, 0) for step in steps]))
        if self.pairing is not None:
            return x, torch.cat([self._noise_to_pair(step, 0) for step in steps])
        return x, torch.cat(self._paired(pool, 0))

    def _paired(self, pool: int, part: int) -> tuple[Tensor, ...]:
        """The noise of this part of each step of the pool, paired with the samples there."""
        config, size = self.config, self.config.coupling_pool
        steps = range(pool * size, (pool + 1) * size)
        indices = torch.cat([self._indices(s, part) for s in steps])
        x = self.latents.take(indices).nan_to_num(0.0, 0.0, 0.0)  # such a sample costs a step, not the run
        z = torch.cat([draw(config.seed, s, (self.rows, *x.shape[1:]), part).z for s in steps])
        labels = None if self.labels is None else self.labels[indices]
        perm = config.coupler(x, z, labels=labels, generator=self._generator(pool, Stream.COUPLING, part))
        return z[perm].split(self.rows)


def check_labels(config: TrainConfig, labels: Tensor | None) -> None:
    """Refuse a coupler or a network that asks for classes where the data have none.

    Raises:
        UserError: just that.
    """
    if labels is None and config.classes is not None:
        raise UserError(
            f"classes=ByClass trains by class, and the images of {type(config.data).__name__} have no labels: put the "
            "images of each class into a folder of their own, two classes or more, or take classes=None"
        )
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
        if (elements := len(latents) * math.prod(latents.shape)) > MOST_PAIRED:
            raise UserError(
                "objective.coupler=Semidiscrete compares each noise with every latent, and holds them all in memory: "
                f"{MOST_PAIRED} numbers at most, {elements} here: take exact, Entropic or independent"
            )
        latents = InMemory(latents.take(torch.arange(len(latents))))
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


def pairs_measured(shape: Sequence[int]) -> int:
    """From how many samples of ``shape``, with their noise, ``KeepCovariance`` learns how the two go together."""
    return max(2, min(PAIRS_MEASURED, MOST_MEASURED // math.prod(shape)))


def asks_what_the_teacher_sees(objective: FewStepObjective) -> bool:
    """Whether what its teacher is shown has to be measured first."""
    return isinstance(objective, HAVE_A_TEACHER) and isinstance(objective.teacher_input, KeepCovariance)


def with_measured_teacher(
    objective: AnyObjective, latents: Tensor | Latents, paired: tuple[Tensor, Tensor] | None
) -> AnyObjective:
    """``objective`` with what its teacher is shown measured on ``latents [n, ch, h, w]``, if it asks for that.

    Args:
        paired: samples and their noise, as they are trained on; None: no coupling.
    Raises:
        UserError: a single latent, all the same, or not finite.
    """
    if not (isinstance(objective, HAVE_A_TEACHER) and isinstance(objective.teacher_input, KeepCovariance)):
        return objective
    some, asked = some_of(latents), objective.teacher_input
    if min(len(some), some[0].numel()) > SLOW:
        tqdm.write(f"measuring principal components of {some[0].numel()} elements")
    try:
        return replace(objective, teacher_input=asked.on(some, paired))
    except ValueError as error:
        raise UserError(f"objective.teacher_input={objective.teacher_input}: {error}") from error


def with_measured_parts(objective: AnyObjective, x: Tensor, labels: Tensor | None = None) -> AnyObjective:
    """``objective`` with all that asks the data measured on ``x [n, ch, h, w]`` in memory, for a loop without
    ``Batches``: the gate, and what the teacher is shown, by noise paired 256 at a time.

    Raises:
        UserError: a single sample, or all the same.
    """
    objective = with_measured_gate(objective, x)
    if not asks_what_the_teacher_sees(objective) or objective.coupler is independent:
        return with_measured_teacher(objective, x, None)
    x = x[: pairs_measured(x.shape[1:])]
    generator = step_generator(0, 0, Stream.COUPLING)
    noise = []
    for start in range(0, len(x), 256):
        part = x[start : start + 256]
        z = torch.randn(part.shape, generator=generator)
        told = None if labels is None else labels[start : start + 256]
        noise.append(z[objective.coupler(part, z, labels=told, generator=generator)])
    return with_measured_teacher(objective, x, (x, torch.cat(noise)))


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
