"""One objective out of interchangeable parts: levels x coupler x distance x c x weight x extra term.

Usable in any loop::

    objective = Objective(distance=cauchy, c=MeasuredC(), coupler=exact, gate=Above(3.0))
    state = objective.init(device)
    for step in range(total_steps):
        draws = draw(seed, step, x.shape)                            # all randomness of the step
        batch = objective.prepare(x, draws, step, total_steps)       # CPU: levels, coupling
        terms = objective(f, batch.to(device), state)                # device: no synchronisation
        terms.loss.backward()
        state = terms.state
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustcm.consistency import ConsistencyFunction, temporal_difference
from robustcm.couplers import Coupler, independent
from robustcm.gates import Gate, everywhere, gated_noise
from robustcm.losses import Distance, Scale, cauchy, sample_r2
from robustcm.randomness import step_generator
from robustcm.scales import CSchedule, MeasuredC
from robustcm.schedules import LevelGrid, LevelPairs, PairLaw, PairWeight, inverse_gap

ExtraTerm = Callable[[Tensor, Tensor, LevelPairs], Tensor]
"""``(student [b, ...], x [b, ...], pairs) -> [b]``, added to the weighted distance."""


class Draws(NamedTuple):
    """The random numbers of one step, for the whole (global) batch."""

    z: Tensor
    """Standard noise, the shape of the batch, float32, CPU."""
    uniform: Tensor
    """``[b]`` in [0, 1), float64, CPU: picks the noise levels."""
    gate: Tensor
    """``[b]`` in [0, 1), float64, CPU: picks who takes the coupled noise where the gate leaves it to chance."""
    generator: torch.Generator
    """For what draws a varying amount (an entropic coupler); placed behind the tensors above."""


def draw(seed: int, step: int, shape: torch.Size | tuple[int, ...]) -> Draws:
    """All random numbers of ``step``, a pure function of its arguments: a resumed run has nothing to restore.

    Args:
        seed: of the run.
        step: 0-based.
        shape: ``[b, ...]`` of the global batch; a rank takes its slice of what comes back.
    """
    generator = step_generator(seed, step)
    z = torch.randn(shape, generator=generator)
    uniform, gate = torch.rand(2, shape[0], generator=generator, dtype=torch.float64)
    return Draws(z, uniform, gate, generator)


class Batch(NamedTuple):
    """What a step trains on: data, its noise, its pairs of levels."""

    x: Tensor
    z: Tensor
    pairs: LevelPairs

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        t_hi, t_lo, depth, num_levels = self.pairs
        x, z, t_hi, t_lo, depth = (v.to(device, non_blocking=True) for v in (self.x, self.z, t_hi, t_lo, depth))
        return Batch(x, z, LevelPairs(t_hi, t_lo, depth, num_levels))


class Terms(NamedTuple):
    """What an objective gives for one batch."""

    loss: Tensor
    """0-dim: the mean over the batch of ``consistency + extra``."""
    consistency: Tensor
    """``[b]``: weight * distance; carries the gradient."""
    extra: Tensor
    """``[b]``: the extra term, 0 without one."""
    r: Tensor
    """``[b]``: residual norm of each sample, detached."""
    c: Scale
    """The scale, in units of r (a distance per token or element got its share of it)."""
    student: Tensor
    """``[b, ...]``: the student's output, for diagnostics such as ``gradient_share``."""
    teacher: Tensor
    """``[b, ...]``, detached."""
    state: Tensor
    """The c schedule's state after this batch."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Consistency training on batches of data; each field is one choice, none knows of the others.

    Every field takes the library's parts or any callable of the same signature. The scale ``c`` is always that of a
    whole sample's residual norm r; a distance with ``norms_per_sample`` (per token, per element) is given c divided by
    the root of that number, the scale of one of its norms where the residual is spread evenly.
    """

    distance: Distance = cauchy
    """How far student and teacher are apart (technique 1)."""
    c: CSchedule = MeasuredC()
    """The scale of the distance (technique 4)."""
    levels: PairLaw = LevelGrid()
    """Which pairs of noise levels are trained on, and how often."""
    weight: PairWeight = inverse_gap
    """Of a pair of noise levels in the loss."""
    coupler: Coupler = independent
    """Which noise goes with which sample (technique 3)."""
    gate: Gate = everywhere
    """Which samples take the coupled noise; the others keep their own."""
    extra: ExtraTerm | None = None
    """A term beside the distance (technique 2: EarlyDiffusion)."""

    def init(self, device: torch.device | str | None = None) -> Tensor:
        """The state before the first step."""
        return self.c.init(device)

    def prepare(
        self,
        x: Tensor,
        draws: Draws,
        step: int,
        total_steps: int,
        *,
        labels: Tensor | None = None,
        coupled: Tensor | None = None,
    ) -> Batch:
        """Levels and coupling for ``x [b, ...]`` (CPU).

        Args:
            labels: ``[b]``, for couplers that need them.
            coupled: noise ``[b, ...]`` paired with ``x`` elsewhere, say in a pool of several batches; the coupler is
                then not asked.
        """
        pairs = self.levels(step, total_steps, draws.uniform)
        if coupled is None:
            if self.coupler is independent:
                return Batch(x, draws.z, pairs)
            coupled = draws.z[self.coupler(x, draws.z, labels=labels, generator=draws.generator)]
        probability = self.gate(pairs.t_hi, step / total_steps)
        return Batch(x, gated_noise(draws.z, coupled, probability, draws.gate), pairs)

    def __call__(self, f: ConsistencyFunction, batch: Batch, state: Tensor) -> Terms:
        """The loss of ``f`` on ``batch``, both on one device; no synchronisation."""
        x, z, pairs = batch
        student, teacher = temporal_difference(f, x, z, pairs.t_hi, pairs.t_lo)
        r = sample_r2(student.detach(), teacher).sqrt()
        state = self.c.observe(state, r, pairs)
        c = self.c(state, pairs, x[0].numel())
        distance = self.distance(student, teacher, c / norms_per_sample(self.distance, x) ** 0.5)
        consistency = self.weight(pairs.t_hi, pairs.t_lo) * distance
        extra = torch.zeros_like(r) if self.extra is None else self.extra(student, x, pairs)
        return Terms((consistency + extra).mean(), consistency, extra, r, c, student, teacher, state)


def norms_per_sample(distance: Distance, x: Tensor) -> int:
    """How many residual norms ``distance`` takes of one sample of ``x [b, ...]``: 1 unless it says otherwise."""
    count = getattr(distance, "norms_per_sample", None)
    return 1 if count is None else int(count(x.shape[1:]))
