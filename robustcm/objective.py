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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from robustcm.consistency import ConsistencyFunction, replayed_rng, sample, temporal_difference
from robustcm.couplers import Coupler, independent
from robustcm.gates import Gate, everywhere, gated_noise
from robustcm.losses import Distance, Scale, cauchy, sample_r2
from robustcm.noise import FlowRange, NoiseRange
from robustcm.preconditioning import Network, Preconditioned, Preconditioning, Skip
from robustcm.randomness import Stream, counter_generator, normal, uniform
from robustcm.robust import robust_distance
from robustcm.scales import CSchedule, MeasuredC
from robustcm.schedules import LevelGrid, LevelPairs, PairLaw, PairWeight, inverse_gap
from robustcm.teacher_input import TeacherInput

ExtraTerm = Callable[[Tensor, Tensor, LevelPairs], Tensor]
"""``(student [b, ...], x [b, ...], pairs) -> [b]``, added to the weighted distance."""


class Draws(NamedTuple):
    """The random numbers of one step, for the batch or a block of its rows."""

    z: Tensor
    """Standard noise, the shape of the batch, float32, CPU."""
    uniform: Tensor
    """``[b]`` in [0, 1), float64, CPU: picks the noise levels."""
    gate: Tensor
    """``[b]`` in [0, 1), float64, CPU: picks who takes the coupled noise where the gate leaves it to chance."""
    generator: torch.Generator
    """For what draws a varying amount (an entropic coupler); seeded behind the tensors above."""


def draw(seed: int, step: int, shape: torch.Size | tuple[int, ...], block: int = 0) -> Draws:
    """All random numbers of ``step``, a pure function of its arguments: a resumed run has nothing to restore.

    Args:
        seed: of the run.
        step: 0-based.
        shape: ``[b, ...]`` of the batch, or of one block of its rows.
        block: which block, 0-based: a rank draws the rows it trains on, and no others.
    """
    numbers = counter_generator(seed, step, Stream.DRAW, block)
    z = normal(numbers, tuple(shape))
    levels, gate = uniform(numbers, (2, shape[0]))
    return Draws(z, levels, gate, torch.Generator().manual_seed(int(numbers.integers(2**63))))


class Batch(NamedTuple):
    """What a step trains on: data, its noise, its pairs of levels, and what f is told beside them."""

    x: Tensor
    z: Tensor
    pairs: LevelPairs
    conditions: Mapping[str, Any] = MappingProxyType({})
    """Keyword arguments of f: labels, texts; tensors, or mappings, lists and tuples of them."""
    progress: Tensor | float = 0.0
    """Share of the training done, 0-dim, for parts that move with it."""
    x_lo: Tensor | None = None
    """What the teacher is shown, ``[b, ...]``; None: ``x + t_lo z``."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        pairs = LevelPairs(*(_there(value, device) for value in self.pairs))
        conditions = _there(self.conditions, device)
        x, z, progress, x_lo = (_there(value, device) for value in (self.x, self.z, self.progress, self.x_lo))
        return Batch(x, z, pairs, conditions, progress, x_lo)


def _there(value: Any, device: torch.device | str) -> Any:
    """``value`` with the tensors in it, however deep, on ``device``."""
    if isinstance(value, Mapping):
        return {name: _there(part, device) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_there(part, device) for part in value)
    if not isinstance(value, Tensor):
        return value
    # Not towards the CPU: nothing there waits until the values have come.
    return value.to(device, non_blocking=torch.device(device).type != "cpu")


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
class FewStepObjective:
    """What the objectives of one-step and few-step generators share; each says what student and teacher are.

    The scale ``c`` is always that of a whole sample's residual norm r; a distance with ``norms_per_sample`` (per
    token, per element) is given c divided by the root of that number, the scale of one of its norms where the
    residual is spread evenly.
    """

    distance: Distance = cauchy
    """How far student and teacher are apart (technique 1)."""
    c: CSchedule = MeasuredC()
    """The scale of the distance (technique 4)."""
    levels: PairLaw
    """Which pairs of noise levels are trained on, and how often."""
    weight: PairWeight
    """Of a pair of noise levels in the loss."""
    coupler: Coupler = independent
    """Which noise goes with which sample (technique 3)."""
    gate: Gate = everywhere
    """Which samples take the coupled noise; the others keep their own."""

    num_times: ClassVar[int] = 1
    """How many times the network is told beside its input."""
    range_of_levels: ClassVar[type] = NoiseRange
    """What the noise levels are measured in: sigma, or flow time."""

    def __post_init__(self) -> None:
        made_for = getattr(self.levels, "noise", None)
        if isinstance(made_for, (NoiseRange, FlowRange)) and not isinstance(made_for, self.range_of_levels):
            in_flow = self.range_of_levels is FlowRange
            wanted = "flow time, as LogitNormalTimes()" if in_flow else "sigma, as LevelGrid()"
            raise ValueError(f"the levels of {type(self).__name__} are in {wanted}, got {self.levels}")

    def init(self, device: torch.device | str | None = None) -> Tensor:
        """The state before the first step."""
        return self.c.init(device)

    @property
    def noise(self) -> Any:
        """The range of the noise levels, ``NoiseRange`` or ``FlowRange``; f and sampler have to have the same."""
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
        pairs, z, progress = self.levels(step, total_steps, self._for_levels(draws)), draws.z, step / total_steps
        if self.coupler is not independent or coupled is not None:
            if coupled is None:
                coupled = z[self.coupler(x, z, labels=labels, generator=draws.generator)]
            z = gated_noise(z, coupled, self._coupled_at(pairs.t_hi, progress), draws.gate)
        batch = Batch(x, z, pairs, conditions or {}, torch.tensor(progress))
        return self._completed(batch, draws, progress, coupled is not None)

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
        student, target = self._compared(f, batch, teacher)
        pairs = batch.pairs
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
        extra = self._added(student, batch, found.r)
        after = self.c.observe(state, found.seen)
        return Terms(
            (consistency + extra).mean(), consistency, extra, found.r, found.c, student, target, found.seen, after
        )

    @torch.no_grad()
    def look(self, f: ConsistencyFunction, batch: Batch, *, teacher: ConsistencyFunction | None = None) -> Tensor:
        """What ``batch`` adds to the c schedule's state: for a first step in several micro-batches, a pass ahead."""
        with replayed_rng(batch.x.device):
            student, target = self._compared(f, batch, teacher)
        return self.c.count(sample_r2(student, target).sqrt(), batch.pairs.depth, batch.pairs.num_levels)

    def function_of(self, network: Network) -> Any:
        """The function this objective trains, with ``network`` inside: the same object trains and samples."""
        raise NotImplementedError

    def sampling_levels(self, evaluations: int, second: float, step: int, total_steps: int) -> tuple[float, ...]:
        """Where ``sample`` evaluates: ``evaluations`` falling levels, those trained at in ``step``.

        Args:
            second: where consistency functions are best evaluated a second time, in sigma.
        Raises:
            ValueError: more evaluations than there are levels.
        """
        raise NotImplementedError

    def sample(
        self,
        f: Any,
        z: Tensor,
        levels: Sequence[float],
        generator: torch.Generator,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Samples of the data out of noise ``z [b, ...]``, with ``len(levels)`` evaluations of ``function_of``.

        Args:
            conditions: keyword arguments of f, such as ``{"labels": labels}``.
        """
        raise NotImplementedError

    def _compared(
        self, f: ConsistencyFunction, batch: Batch, teacher: ConsistencyFunction | None
    ) -> tuple[Tensor, Tensor]:
        """Student, with a gradient, and teacher, without, each ``[b, ...]``."""
        raise NotImplementedError

    def _coupled_at(self, t: Tensor, progress: float) -> Tensor:
        return self.gate(t, progress)

    def _for_levels(self, draws: Draws) -> Tensor:
        """The random numbers ``[b]`` that pick the levels."""
        return draws.uniform

    def _completed(self, batch: Batch, draws: Draws, progress: float, paired: bool) -> Batch:
        """``batch``, which has its levels and its noise, with what else this objective trains on."""
        return batch

    def _shown(self, batch: Batch, teacher_input: TeacherInput | None, progress: float, paired: bool) -> Batch:
        """``batch`` with what its teacher is shown; ``paired``: its noise was, whatever the coupler."""
        if teacher_input is None:
            return batch
        x, z, pairs = batch[:3]
        if self.coupler is independent and not paired:  # whose gate has perhaps seen no data
            p_hi = p_lo = torch.zeros_like(pairs.t_hi)
        else:
            p_hi, p_lo = (self._coupled_at(t, progress) for t in (pairs.t_hi, pairs.t_lo))
        return batch._replace(x_lo=teacher_input(x, z, pairs, p_hi, p_lo))

    def _added(self, student: Tensor, batch: Batch, r: Tensor) -> Tensor:
        return torch.zeros_like(r)

    def _check_range(self, f: ConsistencyFunction) -> None:
        made_for = getattr(f, "noise", None)
        if isinstance(made_for, (NoiseRange, FlowRange)) and made_for != self.noise:
            raise ValueError(
                f"f is made for {made_for}, the levels are drawn from {self.noise}: give both the same, as in "
                "f = objective.function_of(network)"
            )


@dataclass(frozen=True, kw_only=True)
class Objective(FewStepObjective):
    """Consistency training on batches of data; each field is one choice, none knows of the others.

    Every field takes the library's parts or any callable of the same signature.
    """

    levels: PairLaw = LevelGrid()
    """Which pairs of noise levels are trained on, and how often."""
    weight: PairWeight = inverse_gap
    """Of a pair of noise levels in the loss."""
    extra: ExtraTerm | None = None
    """A term beside the distance (technique 2: EarlyDiffusion)."""
    teacher_input: TeacherInput | None = None
    """What the teacher is shown; None: ``x + t_lo z``."""

    def function_of(self, network: Network, skip: Skip | None = None) -> Preconditioned:
        """The consistency function of ``network``, for the noise levels it is trained at; ``skip``: see there."""
        return Preconditioned(network, Preconditioning(noise=self.noise), skip)

    def sampling_levels(self, evaluations: int, second: float, step: int, total_steps: int) -> tuple[float, ...]:
        """sigma_max, ``second``, then halving it each time; each but the first the level nearest to that."""
        noise, nearest = self.noise, self.levels.nearest
        wanted = (second / 2**i for i in range(evaluations - 1))
        levels = (noise.sigma_max, *(nearest(t, step, total_steps) for t in wanted))
        if any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"{evaluations} evaluations are more than there are trained noise levels to halve through")
        return levels

    def sample(
        self,
        f: ConsistencyFunction,
        z: Tensor,
        levels: Sequence[float],
        generator: torch.Generator,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """See ``robustcm.consistency.sample``."""
        return sample(f, z, sigmas=levels, noise=self.noise, generator=generator, conditions=conditions)

    def _completed(self, batch: Batch, draws: Draws, progress: float, paired: bool) -> Batch:
        return self._shown(batch, self.teacher_input, progress, paired)

    def _compared(
        self, f: ConsistencyFunction, batch: Batch, teacher: ConsistencyFunction | None
    ) -> tuple[Tensor, Tensor]:
        x, z, pairs, conditions = batch[:4]
        return temporal_difference(
            f, x, z, pairs.t_hi, pairs.t_lo, teacher=teacher, x_lo=batch.x_lo, conditions=conditions
        )

    def _added(self, student: Tensor, batch: Batch, r: Tensor) -> Tensor:
        return super()._added(student, batch, r) if self.extra is None else self.extra(student, batch.x, batch.pairs)
