"""The robust distance with its measured scale, for a training loop of one's own: as a function, and as a module.

::

    robust = RobustLoss(cauchy)                                # once
    loss = (weight * robust(prediction, target)).mean()        # in the place of mse_loss

``robust_distance`` is the function underneath: state in, state out, nothing ambient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustcm.losses import Distance, Scale, cauchy, sample_r2
from robustcm.noise import Axis
from robustcm.scales import CSchedule, MeasuredC
from robustcm.shapes import one_a_sample


class Measured(NamedTuple):
    """What ``robust_distance`` gives for one batch."""

    distance: Tensor
    """``[b]``; carries the gradient."""
    r: Tensor
    """``[b]``: residual norm of each whole sample, detached."""
    c: Scale
    """The scale, in units of r."""
    seen: Tensor
    """What this batch adds to the scale's state: to be summed over the step, then observed once."""


def robust_distance(
    student: Tensor,
    teacher: Tensor,
    state: Tensor,
    *,
    depth: Tensor,
    num_levels: int = 2,
    distance: Distance = cauchy,
    c: CSchedule = MeasuredC(),  # noqa: B008 (frozen)
    seen: Tensor | None = None,
) -> Measured:
    """The distance of each sample at the scale c its state says; nothing here waits for the device.

    Args:
        student, teacher: ``[b, ...]``; the gradient goes to the student if the teacher has none.
        state: of ``c``, from before the step.
        depth: ``[b]`` in [0, 1], 0 at the largest noise, 1 at the smallest.
        num_levels: N of the present stage; residuals are expected to shrink like 1 / (N - 1).
        distance: a ``PerToken`` or ``PerElement`` is given c divided by the root of its norms a sample, the scale of
            one of them where the residual is spread evenly.
        seen: counts of the whole step, where this batch is a part of it; used only while ``state`` is empty.
    Raises:
        ValueError: shapes that do not fit, or fewer than two levels.
    """
    need_levels(num_levels)
    depth = one_a_sample("depth", depth, len(student))
    r = sample_r2(student.detach(), teacher.detach()).sqrt()
    own = c.count(r, depth, num_levels)
    scale = c(state, own if seen is None else seen, depth, num_levels, student.shape[1:].numel())
    return Measured(_at(scale, distance, student, teacher), r, scale, own)


def _at(c: Scale, distance: Distance, student: Tensor, teacher: Tensor) -> Tensor:
    return distance(student, teacher, c / norms_per_sample(distance, student) ** 0.5)


def need_levels(num_levels: int) -> int:
    """``num_levels``, if a student and a teacher have a level each.

    Raises:
        ValueError: fewer than two.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, a student's and a teacher's, got {num_levels}")
    return num_levels


def norms_per_sample(distance: Distance, x: Tensor) -> int:
    """How many residual norms ``distance`` takes of one sample of ``x [b, ...]``: 1 unless it says otherwise."""
    count = getattr(distance, "norms_per_sample", None)
    return 1 if count is None else int(count(x.shape[1:]))


def all_ranks() -> Any:
    """The group of all ranks, None in a single process; ``RobustLoss(group=all_ranks)`` asks when it is called."""
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


class RobustLoss(nn.Module):
    """A robust distance whose scale c follows the residuals; the state is in buffers, so it is saved and moved along.

    ::

        robust = RobustLoss(cauchy)
        loss = robust(student, teacher).mean()

    Every call in training mode with a student that has a gradient counts its residuals; those of the calls of one
    optimizer step are observed together, once. So c of a step comes from the steps before it. (In the first step there
    are none: there every call takes c from its own residuals and those of the calls before it; ``look`` at all
    micro-batches first where even that step has to be the same for any number of them.) Other calls, of a validation
    say, count nothing and wait for no other rank.

    The value stays where it is while residuals and c fall together: watch ``scales``, or the error you always watched.
    ``LikeSquares(cauchy_of_r2)`` is r^2 itself for r << c, so a trainer's weights, clip and learning rate go on meaning
    what they meant.

    Args:
        distance: of ``robustcm.losses``, or any ``distance(student, teacher, c) -> [b]``.
        c: how c follows; ``MeasuredC(bins=8)`` with an ``axis`` has a c for each of 8 ranges of noise levels.
        axis: what ``t`` is measured on: ``NoiseRange().depth`` for sigma, ``flow_time``, ``data_time``,
            ``TimestepIndex(1000)``.
        accumulation: calls (micro-batches) an optimizer step, unless a call says whether it ``closes`` one.
        group: a process group, or a function that gives it: residuals of all its ranks are counted, so c is the same
            on each. ``all_ranks`` for all there are; None: this process alone.
    """

    state: Tensor
    """Of ``c``."""
    pending: Tensor
    """Counted since the last optimizer step."""
    first: Tensor
    """Counted by ``look``."""
    calls: Tensor
    """int64, 0-dim: counted in ``pending``."""

    def __init__(
        self,
        distance: Distance = cauchy,
        c: CSchedule = MeasuredC(),  # noqa: B008 (frozen)
        *,
        axis: Axis | None = None,
        accumulation: int = 1,
        group: Any = None,
    ) -> None:
        super().__init__()
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1 call an optimizer step, got {accumulation}")
        self.bins = getattr(c, "bins", 1)
        if self.bins > 1 and axis is None:
            raise ValueError(f"{self.bins} ranges of noise levels need an axis: {_AXES}")
        self.distance, self.c, self.axis, self.accumulation, self.group = distance, c, axis, accumulation, group
        nothing = c.count(torch.zeros(0), torch.zeros(0), 2)
        self.register_buffer("state", c.init())
        self.register_buffer("pending", nothing)
        self.register_buffer("first", nothing.clone())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        t: Tensor | None = None,
        num_levels: int | None = None,
        weight: Tensor | None = None,
        closes: bool | None = None,
    ) -> Tensor:
        """The (weighted) distance of each sample, ``[b]``; nothing here waits for the device.

        Args:
            student, teacher: ``[b, ...]``; detach the teacher.
            t: ``[b]`` noise levels on ``axis``; needed if there is one.
            num_levels: N of the present stage, where residuals shrink as it grows (consistency training).
            weight: ``[b]``.
            closes: whether this call is the last of its optimizer step (``accelerator.sync_gradients``); None: by
                ``accumulation``.
        Raises:
            ValueError: shapes that do not fit, ``t`` without ``axis``, ``axis`` without ``t``, or fewer than two
                levels.
        """
        num_levels = need_levels(2 if num_levels is None else num_levels)
        depth = self._depth(student, t)
        counts = self.training and student.requires_grad
        with torch.no_grad():
            seen = self.pending + self._count(student, teacher, depth, num_levels, self.group if counts else None)
            basis = torch.where(self.first.sum() > 0, self.first, seen)
            c = self.c(self.state, basis, depth, num_levels, student.shape[1:].numel())
        distance = _at(c, self.distance, student, teacher)
        if counts:
            self._observe(seen, closes)
        return distance if weight is None else one_a_sample("weight", weight, len(student)) * distance

    def look(self, student: Tensor, teacher: Tensor, t: Tensor | None = None, num_levels: int | None = None) -> None:
        """Count these residuals towards the c of the first step, and of that step alone.

        For a first step in several micro-batches: look at all of them, then train on them as always.
        """
        num_levels = need_levels(2 if num_levels is None else num_levels)
        self.first.add_(self._count(student, teacher, self._depth(student, t), num_levels, self.group))

    def scales(self, d: int, num_levels: int = 2) -> Tensor:
        """c of each range of noise levels in the next step, from the largest noise to the smallest, ``[bins]``.

        For logs. NaN before the first step where c is measured.

        Args:
            d: elements of a sample.
            num_levels: as the calls have it: c of a consistency run is N - 1 times too large without.
        """
        depth = (torch.arange(self.bins, device=self.state.device) + 0.5) / self.bins
        c = self.c(self.state, self.pending, depth, num_levels, d)
        return torch.as_tensor(c, device=self.state.device).expand(self.bins)

    @torch.no_grad()
    def _count(self, student: Tensor, teacher: Tensor, depth: Tensor, num_levels: int, group: Any) -> Tensor:
        """Of all ranks of ``group``; whole numbers, so their sum does not depend on the order."""
        r = sample_r2(student.detach(), teacher.detach()).sqrt()
        counts = self.c.count(r, depth, num_levels)
        group = group() if callable(group) else group
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        return counts

    @torch.no_grad()
    def _observe(self, seen: Tensor, closes: bool | None) -> None:
        calls = self.calls + 1
        closed = calls >= self.accumulation if closes is None else torch.full_like(calls, closes, dtype=torch.bool)
        self.state.copy_(torch.where(closed, self.c.observe(self.state, seen), self.state))
        self.pending.copy_(torch.where(closed, 0.0, seen))
        self.calls.copy_(torch.where(closed, 0, calls))

    def _apply(self, fn: Any, recurse: bool = True) -> RobustLoss:
        """``to``, ``half`` and the like: the counts move along, and stay float64, which they need to fade slowly."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    def _depth(self, student: Tensor, t: Tensor | None) -> Tensor:
        if self.axis is None:
            if t is not None:
                raise ValueError(f"t needs an axis to be measured on, as in RobustLoss(axis=flow_time): {_AXES}")
            return student.new_zeros(len(student), dtype=torch.float32)
        if t is None:
            raise ValueError("this RobustLoss has an axis: pass the noise levels as t")
        return self.axis(one_a_sample("t", t, len(student)).float())

    def extra_repr(self) -> str:
        """The parts."""
        name = getattr(self.distance, "__name__", repr(self.distance))
        return f"{name}, {self.c}, axis={self.axis}, accumulation={self.accumulation}"


_AXES = "NoiseRange().depth for sigma, flow_time, data_time, or TimestepIndex(num_timesteps)"
