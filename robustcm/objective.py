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

In micro-batches c stays that of the whole step: ``state`` is handed to each as it was before the step, ``terms.seen``
are added, and ``state = objective.c.observe(state, seen)`` closes the step (``Objective.look`` for the first one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustcm.consistency import ConsistencyFunction, replayed_rng, temporal_difference
from robustcm.couplers import Coupler, independent
from robustcm.gates import Gate, everywhere, gated_noise
from robustcm.losses import Distance, Scale, cauchy, sample_r2
from robustcm.noise import NoiseRange
from robustcm.randomness import step_generator
from robustcm.robust import robust_distance
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
    """What a step trains on: data, its noise, its pairs of levels, and what f is told beside them."""

    x: Tensor
    z: Tensor
    pairs: LevelPairs
    conditions: Mapping[str, Any] = MappingProxyType({})
    """Keyword arguments of f: labels, texts."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        t_hi, t_lo, depth, num_levels = self.pairs
        x, z, t_hi, t_lo, depth = (v.to(device, non_blocking=True) for v in (self.x, self.z, t_hi, t_lo, depth))
        conditions = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.conditions.items()
        }
        return Batch(x, z, LevelPairs(t_hi, t_lo, depth, num_levels), conditions)


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
    seen: Tensor
    """What this batch adds to the c schedule's state; summed over the micro-batches and ranks of a step."""
    state: Tensor
    """The c schedule's state after the step, if this batch was all of it."""


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

    @property
    def noise(self) -> NoiseRange:
        """The range of the noise levels; f and sampler have to have the same."""
        return getattr(self.levels, "noise", None) or NoiseRange()

    def prepare(
        self,
        x: Tensor,
        draws: Draws,
        step: int,
        total_steps: int,
        *,
        labels: Tensor | None = None,
        coupled: Tensor | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Levels and coupling for ``x [b, ...]`` (CPU).

        Args:
            labels: ``[b]``, for couplers that need them.
            coupled: noise ``[b, ...]`` paired with ``x`` elsewhere, say in a pool of several batches; the coupler is
                then not asked.
            conditions: keyword arguments for f, such as ``{"class_labels": labels}``.
        """
        pairs, z = self.levels(step, total_steps, draws.uniform), draws.z
        if self.coupler is not independent or coupled is not None:
            if coupled is None:
                coupled = z[self.coupler(x, z, labels=labels, generator=draws.generator)]
            z = gated_noise(z, coupled, self.gate(pairs.t_hi, step / total_steps), draws.gate)
        return Batch(x, z, pairs, conditions or {})

    def __call__(
        self,
        f: ConsistencyFunction,
        batch: Batch,
        state: Tensor,
        *,
        teacher: ConsistencyFunction | None = None,
        seen: Tensor | None = None,
    ) -> Terms:
        """The loss of ``f`` on ``batch``, both on one device; no synchronisation.

        Args:
            state: of the c schedule, from before the step.
            teacher: another function in the place of f, such as one of averaged weights.
            seen: where ``batch`` is a part of a step: the counts of the whole (``look``); needed in the first only.
        Raises:
            ValueError: f is made for another range of noise levels.
        """
        self._check_range(f)
        x, z, pairs, conditions = batch
        student, target = temporal_difference(f, x, z, pairs.t_hi, pairs.t_lo, teacher=teacher, conditions=conditions)
        found = robust_distance(
            student,
            target,
            state,
            depth=pairs.depth,
            num_levels=pairs.num_levels,
            distance=self.distance,
            c=self.c,
            seen=seen,
        )
        consistency = self.weight(pairs.t_hi, pairs.t_lo) * found.distance
        extra = torch.zeros_like(found.r) if self.extra is None else self.extra(student, x, pairs)
        after = self.c.observe(state, found.seen)
        return Terms(
            (consistency + extra).mean(), consistency, extra, found.r, found.c, student, target, found.seen, after
        )

    @torch.no_grad()
    def look(self, f: ConsistencyFunction, batch: Batch, *, teacher: ConsistencyFunction | None = None) -> Tensor:
        """What ``batch`` adds to the c schedule's state: for a first step in several micro-batches, a pass ahead."""
        x, z, pairs, conditions = batch
        with replayed_rng(x.device):
            student, target = temporal_difference(
                f, x, z, pairs.t_hi, pairs.t_lo, teacher=teacher, conditions=conditions
            )
        return self.c.count(sample_r2(student, target).sqrt(), pairs.depth, pairs.num_levels)

    def _check_range(self, f: ConsistencyFunction) -> None:
        made_for = getattr(f, "noise", None)
        if isinstance(made_for, NoiseRange) and made_for != self.noise:
            raise ValueError(
                f"f is made for {made_for}, the levels are drawn from {self.noise}: give both the same, as in "
                "Preconditioned(network, Preconditioning(noise=objective.noise))"
            )
